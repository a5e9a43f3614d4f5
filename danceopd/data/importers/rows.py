"""Rows of Parquet files, tar shards and picture folders (`folders.py`), one after another, from disk or a store.

No more than a batch of rows is in memory. A row has a position (file, number), so that reading can begin anywhere:
Parquet row groups before it are not read at all.
"""

from __future__ import annotations

import gzip
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from danceopd.data.importers.folders import folder_rows
from danceopd.data.importers.inputs import (
    MOST_BYTES,
    Found,
    Ignored,
    InputFile,
    RawRow,
    ignored_files,
    is_system_file,
    plain,
    roles_of,
    with_kind,
)
from danceopd.data.importers.layouts import COMMON
from danceopd.data.importers.spec import ImportSpec
from danceopd.data.pictures import Refused
from danceopd.errors import UserError
from danceopd.text import decode, parse_json

BATCH_ROWS = 16
READ_AHEAD = 1 << 20  # bytes of a column read at a time
# What reading a damaged tar raises, with its gzip or xz around it.
_TAR_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)


def read_rows(spec: ImportSpec, files: list[InputFile], start: tuple[int, int] = (0, 0)) -> Iterator[RawRow]:
    """Every row from position `start` on.

    Raises:
        UserError: if a file cannot be read, or lacks a column.
    """
    readers = {"parquet": _parquet_rows, "folder": folder_rows, "tar": _tar_rows}
    read = readers[spec.form.reads]
    for number in range(start[0], len(files)):
        skip = start[1] if number == start[0] else 0
        beside = ignored_files(files[number].ignored)
        for row, (values, ignored) in read(spec, files[number], skip):
            where = f"{files[number].name}, row {row}"
            if row == 0:
                ignored = (*beside, *ignored)
            if isinstance(values, Refused):
                yield RawRow(number, row, where, {}, values, ignored)
                continue
            if isinstance(values["target"], str):
                where += f" ({plain(values['target'])})"
            yield RawRow(number, row, where, values, None, ignored)


# ------------------------------------------------------------------------------------------------------------- Parquet


def _parquet_rows(spec: ImportSpec, file: InputFile, skip: int) -> Iterator[tuple[int, Found]]:
    try:
        with file.system.open(file.path, "rb") as handle:
            # Without these two a whole row group of pictures would be read at once.
            table = pq.ParquetFile(handle, buffer_size=READ_AHEAD, pre_buffer=False)
            wanted = _wanted(spec, file, table.schema_arrow.names)
            kind = _kind_of_file(file.name) if spec.form.kind_from_file else None
            yield from _batches(spec, file, table, wanted, kind, skip)
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
    spec: ImportSpec, file: InputFile, table: pq.ParquetFile, wanted: list[str], kind: str | None, skip: int
) -> Iterator[tuple[int, Found]]:
    unread = tuple((f"column {name!r}", file.name) for name in table.schema_arrow.names if name not in set(wanted))
    first = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if first + count > skip:
            row = first
            try:
                for batch in table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=wanted):
                    if row + len(batch) > skip:
                        for number, values in enumerate(batch.to_pylist(), start=row):
                            if number >= skip:
                                roles, ignored = roles_of(spec, values, file.name)
                                yield number, (roles | {"kind": roles["kind"] or kind}, unread + ignored)
                    row += len(batch)
            except (pa.ArrowException, OSError) as error:
                if not isinstance(error, pa.ArrowException) and error.errno is not None:  # a disk's or network's
                    raise
                said = " ".join(str(error).split())[:200]
                refused = Refused(
                    "rows-damaged", f"{file.name}, rows {row} to {first + count - 1}: {said}; fetch it again"
                )
                for number in range(max(row, skip), first + count):
                    yield number, (refused, ())
        first += count


def _kind_of_file(name: str) -> str:
    """`remove_part3.parquet` holds removals."""
    stem = posixpath.splitext(name)[0]
    return stem.rpartition("_part")[0] or stem


# ---------------------------------------------------------------------------------------------------------- WebDataset


def _tar_rows(spec: ImportSpec, file: InputFile, skip: int) -> Iterator[tuple[int, Found]]:
    number = -1
    try:
        _check_gzip(file)
        with file.system.open(file.path, "rb") as handle, tarfile.open(fileobj=handle, mode="r|*") as tar:
            for number, (key, values, ignored) in enumerate(_samples(tar)):
                if number >= skip:
                    if isinstance(values, Refused):
                        yield number, (values, ignored)
                    else:
                        roles, more = roles_of(spec, {"__key__": plain(key)} | values, f"{file.name}, {plain(key)}")
                        yield number, (with_kind(roles), (*ignored, *more))
    except _TAR_ERRORS as error:
        if isinstance(error, UserError):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file.path}: damaged after sample {number} ({said}); fetch it again and go on") from error


def _check_gzip(file: InputFile) -> None:
    """Read a .tar.gz to its end, where its checksum is: reading samples from it does not get there."""
    with file.system.open(file.path, "rb") as handle:
        if handle.read(2) != b"\x1f\x8b":
            return
        handle.seek(0)
        with gzip.open(handle) as plain_bytes:
            while plain_bytes.read(READ_AHEAD):
                pass


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict | Refused, Ignored]]:
    """Files of one stem, which lie one after another, as one sample."""
    key: str | None = None
    values: dict | Refused = {}
    ignored: list[tuple[str, str]] = []
    for member in tar:
        if member.isdir():
            continue
        name = member.name.removeprefix("./")
        folder, _, base = name.rpartition("/")
        stem, _, field = base.partition(".")
        if is_system_file(name) or not field or not member.isfile():
            ignored += ignored_files([name], "file" if member.isfile() else "link")
            continue
        found = f"{folder}/{stem}" if folder else stem
        if found != key:
            if key is not None:
                yield key, values, tuple(ignored)
                ignored = []
            key, values = found, {}
        if isinstance(values, dict):
            values = _with_field(values, tar, member, field.lower())
    if key is not None:
        yield key, values, tuple(ignored)


def _with_field(values: dict, tar: tarfile.TarFile, member: tarfile.TarInfo, field: str) -> dict | Refused:
    name = plain(member.name)
    if member.size > MOST_BYTES:
        return Refused("file-too-large", f"{name}: {member.size} bytes; at most {MOST_BYTES} are read")
    opened = tar.extractfile(member)
    assert opened is not None  # only files come here
    data = opened.read()
    try:
        found = _field(field, data, name)
    except UserError as error:
        return Refused("line-not-json", f"{error}; write the tar again")
    if twice := sorted(set(values) & set(found)):
        return Refused("field-repeated", f"{name}: '{twice[0]}' is in the sample already; write the tar again")
    return values | found


def _field(name: str, data: bytes, where: str) -> dict[str, Any]:
    """`edited_img.jpg` is the picture `edited_img`; `json` holds many fields; a plain `jpg` or `txt` is its own."""
    stem, _, suffix = name.rpartition(".")
    if suffix == "json":
        value = parse_json(decode(data, where), where)
        return {stem: value} if stem else value if isinstance(value, dict) else {"json": value}
    if suffix in ("txt", "cls") and stem:
        return {stem: data.decode("utf-8-sig", errors="replace")}
    return {stem or suffix: data}
