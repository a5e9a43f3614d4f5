"""Rows of Parquet files, picture folders and tar shards, one after another, from disk or an object store.

No more than a batch of rows is in memory. A row has a position (file, number), so that reading can begin anywhere:
Parquet row groups before it are not read at all.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from danceopd.data.importers.layouts import CAPTION, COMMON
from danceopd.data.importers.spec import ImportSpec
from danceopd.data.pictures import Refused
from danceopd.errors import UserError

BATCH_ROWS = 16
READ_AHEAD = 1 << 20  # bytes of a column read at a time
MOST_BYTES = 1 << 28  # of one file inside a tar
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
CAPTIONS = (".txt", ".caption")
METADATA = "metadata.jsonl"
SUFFIX = {"parquet": (".parquet",), "tar": (".tar", ".tar.gz", ".tgz")}
NO_KIND = "(none)"


@dataclass(frozen=True)
class InputFile:
    """One file, or one folder of pictures, wherever it lies.

    Attributes:
        system: what opens it.
        path: in that system.
        size: bytes; of a folder 0.
    """

    system: AbstractFileSystem
    path: str
    size: int

    @property
    def name(self) -> str:
        """Without the folders before it."""
        return posixpath.basename(self.path.rstrip("/"))


@dataclass(frozen=True)
class RawRow:
    """A row as its data set has it.

    Attributes:
        file: number of its file in the list of inputs.
        number: of the row in the file.
        where: both in words.
        values: id, prompt, source, target, kind (None where there is none), and `carried`: a mapping.
        broken: why the row cannot be read at all, or None.
    """

    file: int
    number: int
    where: str
    values: dict[str, Any]
    broken: Refused | None = None


def find_inputs(spec: ImportSpec) -> list[InputFile]:
    """The files to read, in a fixed order.

    Raises:
        UserError: if an input is not there, cannot be reached, or holds no such files.
    """
    found: list[InputFile] = []
    for location in spec.inputs:
        try:
            system, path = fsspec.core.url_to_fs(location)
            here = _list(system, path, spec.form.reads)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"input {location}: cannot be read ({error}); check path, credentials and network"
            ) from error
        found += here
        if not here:
            kinds = " or ".join(SUFFIX.get(spec.form.reads, ("a folder",)))
            raise UserError(f"input {location}: layout {spec.layout} reads {kinds}, and there is none")
    return found


def _list(system: AbstractFileSystem, path: str, reads: str) -> list[InputFile]:
    if reads == "folder":
        return [InputFile(system, path, 0)] if system.isdir(path) else []
    if any(sign in path for sign in "*?["):
        paths = system.glob(path)
    elif system.isdir(path):
        paths = [p for p in system.find(path) if p.endswith(SUFFIX[reads])]
    else:
        paths = [path]
    return [InputFile(system, p, system.size(p) or 0) for p in sorted(paths)]


def read_rows(spec: ImportSpec, files: list[InputFile], start: tuple[int, int] = (0, 0)) -> Iterator[RawRow]:
    """Every row from position `start` on.

    Raises:
        UserError: if a file cannot be read, or lacks a column.
    """
    readers = {"parquet": _parquet_rows, "folder": _folder_rows, "tar": _tar_rows}
    read = readers[spec.form.reads]
    for number in range(start[0], len(files)):
        skip = start[1] if number == start[0] else 0
        for row, values in read(spec, files[number], skip):
            where = f"{files[number].name}, row {row}"
            if isinstance(values, Refused):
                yield RawRow(number, row, where, {}, values)
                continue
            if isinstance(values["target"], str):
                where += f" ({values['target']})"
            yield RawRow(number, row, where, values)


def _roles(spec: ImportSpec, values: dict[str, Any]) -> dict[str, Any]:
    """A row's values by what they are."""
    roles: dict[str, Any] = {}
    for role in ("id", "prompt", "source", "target", "kind"):
        roles[role] = next((values[name] for name in spec.column(role) if values.get(name) is not None), None)
    names = (*spec.form.carried, *COMMON, *spec.scores)
    roles["carried"] = {name: values[name] for name in names if values.get(name) is not None}
    return roles


# ------------------------------------------------------------------------------------------------------------- Parquet


def _parquet_rows(spec: ImportSpec, file: InputFile, skip: int) -> Iterator[tuple[int, dict]]:
    try:
        with file.system.open(file.path, "rb") as handle:
            # Without these two a whole row group of pictures would be read at once.
            table = pq.ParquetFile(handle, buffer_size=READ_AHEAD, pre_buffer=False)
            wanted = _wanted(spec, file, table.schema_arrow.names)
            kind = _kind_of_file(file.name) if spec.form.kind_from_file else None
            yield from _batches(spec, table, wanted, kind, skip)
    except (OSError, pa.ArrowException) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{file.path}: not a readable Parquet file ({text}); fetch it again and go on") from error


def _wanted(spec: ImportSpec, file: InputFile, there: list[str]) -> list[str]:
    needed = ["prompt", "target"] + ["source"] * spec.form.pairs + ["id"] * spec.form.numbered
    for role in dict.fromkeys((*needed, *spec.columns)):
        if not set(spec.column(role)) & set(there):
            raise UserError(
                f"{file.path}: no column for the {role} ({' or '.join(spec.column(role))}); found {', '.join(there)}; "
                f"name it under 'columns', or choose another layout than {spec.layout}"
            )
    if lost := sorted(set(spec.scores) - set(there)):
        raise UserError(
            f"{file.path}: min_scores or max_scores names {', '.join(lost)}, not a column; found {', '.join(there)}"
        )
    roles = {name for role in spec.form.columns for name in spec.column(role)}
    return [name for name in there if name in roles | {*spec.form.carried, *COMMON, *spec.scores}]


def _batches(
    spec: ImportSpec, table: pq.ParquetFile, wanted: list[str], kind: str | None, skip: int
) -> Iterator[tuple[int, dict]]:
    first = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if first + count > skip:
            row = first
            for batch in table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=wanted):
                if row + len(batch) > skip:
                    for number, values in enumerate(batch.to_pylist(), start=row):
                        if number >= skip:
                            roles = _roles(spec, values)
                            yield number, roles | {"kind": roles["kind"] or kind}
                row += len(batch)
        first += count


def _kind_of_file(name: str) -> str:
    """`remove_part3.parquet` holds removals."""
    stem = name.removesuffix(".parquet")
    return stem.rpartition("_part")[0] or stem


# -------------------------------------------------------------------------------------------------------------- folder


def _folder_rows(spec: ImportSpec, folder: InputFile, skip: int) -> Iterator[tuple[int, dict | Refused]]:
    metadata = f"{folder.path}/{METADATA}"
    rows = _listed(folder, metadata) if folder.system.isfile(metadata) else _captioned(folder)
    for number, values in enumerate(rows):
        if number >= skip:
            yield number, values if isinstance(values, Refused) else _with_kind(_roles(spec, values))


def _with_kind(roles: dict) -> dict:
    """A picture with a caption and no source can only be a drawing."""
    return roles | {"kind": roles["kind"] or (CAPTION if roles["source"] is None else NO_KIND)}


def _listed(folder: InputFile, metadata: str) -> Iterator[dict | Refused]:
    with folder.system.open(metadata, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            if isinstance(values, dict):
                yield values
            elif line.strip():
                yield Refused("line-not-json", f"{metadata}, line {number}: not a JSON object; write one a line")


def _captioned(folder: InputFile) -> Iterator[dict]:
    names = sorted(folder.system.find(folder.path))
    there = set(names)
    if not any(name.lower().endswith(PICTURES) for name in names):
        raise UserError(f"{folder.path}: no pictures ({', '.join(PICTURES)}) in the folder")
    for name in names:
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in PICTURES:
            caption = next((stem + end for end in CAPTIONS if stem + end in there), None)
            text = None if caption is None else folder.system.cat_file(caption)
            # Read later and by whoever decodes it: only its path goes along.
            yield {"prompt": text, "target": name[len(folder.path) :].lstrip("/"), "id": None}


# ---------------------------------------------------------------------------------------------------------- WebDataset


def _tar_rows(spec: ImportSpec, file: InputFile, skip: int) -> Iterator[tuple[int, dict | Refused]]:
    number = -1
    try:
        with file.system.open(file.path, "rb") as handle, tarfile.open(fileobj=handle, mode="r|*") as tar:
            for number, (key, values) in enumerate(_samples(tar)):
                if number >= skip:
                    if isinstance(values, Refused):
                        yield number, values
                    else:
                        yield number, _with_kind(_roles(spec, {"__key__": key} | values))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{file.path}: damaged after sample {number} ({error}); fetch it again and go on") from error


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict | Refused]]:
    """Files of one stem, which lie one after another, as one sample."""
    key, values = None, {}
    for member in tar:
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, field = base.partition(".")
        found = f"{folder}/{stem}" if folder else stem
        if found != key:
            if key is not None:
                yield key, values
            key, values = found, {}
        if isinstance(values, Refused):
            continue
        if member.size > MOST_BYTES:
            values = Refused("file-too-large", f"{member.name}: {member.size} bytes; at most {MOST_BYTES} are read")
            continue
        try:
            values |= _field(field.lower(), tar.extractfile(member).read())
        except ValueError:
            values = Refused("line-not-json", f"{member.name}: not valid JSON; write the tar again")
    if key is not None:
        yield key, values


def _field(name: str, data: bytes) -> dict[str, Any]:
    """`edited_img.jpg` is the picture `edited_img`; `json` holds many fields; a plain `jpg` or `txt` is its own."""
    stem, _, suffix = name.rpartition(".")
    if suffix == "json":
        value = json.loads(data)
        return {stem: value} if stem else value if isinstance(value, dict) else {"json": value}
    if suffix in ("txt", "cls") and stem:
        return {stem: data.decode("utf-8", errors="replace")}
    return {stem or suffix: data}
