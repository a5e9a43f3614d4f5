"""Assemble any number of inputs into one task-tagged dataset folder, checked, counted and hashed."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from danceopd.config.recipe import DataRecipe
from danceopd.data.columns import (
    INDEX,
    KEY_BYTES,
    RecordTable,
    columns_of,
    hex_names,
    key_of,
    open_columns,
    rows_where,
    with_places,
    write_columns,
)
from danceopd.data.records import (
    MANIFEST,
    SHARD_ROWS,
    SPLITS,
    SYNONYMS,
    Record,
    check_images,
    check_record,
    content_hash,
    read_parquet,
    record_from,
    spread,
    unknown_fields,
    write_shard,
)
from danceopd.data.splits import Pictures, TwoSides, count_alike, on_two_sides, settle_splits
from danceopd.data.world import world_records
from danceopd.errors import UserError
from danceopd.files import at_home, hash_file, output_folder, read_json, write_json
from danceopd.text import json_lines, parse_csv, read_bytes, read_text

METADATA = ("metadata.jsonl", "metadata.csv")
PARQUET = ".parquet"
OWN_FILES = (MANIFEST, INDEX, "import.json")  # of a dataset or an import, beside its shards
SHARD_BYTES = 1 << 28  # of a shard's pictures; `SHARD_ROWS` is reached first where they are small
SPOOL_BYTES = 1 << 29  # of pictures kept in memory while a dataset is sorted; more wait on disk
_PICTURES = ("source", "target", *SYNONYMS["target"])  # fields that name one in a metadata file
T = TypeVar("T")

log = logging.getLogger(__name__)


def read_image_folder(folder: Path, metadata: Path | None = None, taken: set[Path] | None = None) -> Iterator[Record]:
    """Read a folder of pictures described by its `metadata.jsonl` or `metadata.csv`.

    Each line is an object (a row) with `task` and `prompt`, and optionally `source`, `target` (or `file_name`: names of
    files in the folder), `id`, `split`, `provenance` (an object). Without an `id`, the line's own content makes one.

    Args:
        folder: that names in the file start from.
        metadata: the file; default: the folder's `metadata.jsonl`.
        taken: gets the pictures that are read.

    Raises:
        UserError: naming file and line.
    """
    metadata = metadata or folder / METADATA[0]
    unknown: Counter[str] = Counter()
    for line, data in _metadata_lines(metadata):
        where = f"{metadata}, line {line}"
        if isinstance(data, UserError):
            raise data
        unknown.update(unknown_fields(data))
        if data.get("id") is None:
            whole = json.dumps(data, sort_keys=True)
            data = data | {"id": hashlib.sha256(whole.encode()).hexdigest()[:16]}
        given = [name for name in _PICTURES if data.get(name) is not None]
        found = {name: _find_picture(folder, data[name], where, name) for name in given}
        if taken is not None:
            taken.update(found.values())
        data = data | {name: read_bytes(path, f"{where}, field '{name}'") for name, path in found.items()}
        if isinstance(data.get("provenance"), dict):
            data["provenance"] = json.dumps(data["provenance"], sort_keys=True)
        yield record_from(data, where)
    if unknown:
        log.warning("%s: ignored field(s): %s", metadata, ", ".join(f"{n} ({c})" for n, c in sorted(unknown.items())))


def named_pictures(metadata: Path) -> Iterator[Path]:
    """What a metadata file names as pictures, whether it is there or not; lines that cannot be read name none.

    Raises:
        UserError: if the file cannot be read.
    """
    for _, data in _metadata_lines(metadata):
        if isinstance(data, dict):
            yield from (metadata.parent / data[name] for name in _PICTURES if isinstance(data.get(name), str))


def _metadata_lines(metadata: Path) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    if metadata.suffix == ".jsonl":
        yield from json_lines(io.BytesIO(read_bytes(metadata)), str(metadata))
        return
    _, rows = parse_csv(read_text(metadata), str(metadata))
    for line, cells in rows:
        found = {name: cell for name, cell in cells.items() if cell} if isinstance(cells, dict) else cells
        yield line, found


def _find_picture(folder: Path, name: object, where: str, field: str) -> Path:
    if not isinstance(name, str):
        raise UserError(f"{where}: field '{field}' is {type(name).__name__}; give the name of a file in the folder")
    try:
        path = (folder / name).resolve()
        inside, there = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: field '{field}' names no file ({said}); give a file in the folder") from error
    if not inside:
        raise UserError(f"{where}: field '{field}' leads out of the folder ({name}); put the picture inside it")
    if not there:
        raise UserError(f"{where}: field '{field}' names {name}, which is not in the folder")
    return path


def read_input(location: str) -> Iterator[Record]:
    """Read one input: a Parquet file, or a folder with Parquet files or metadata files anywhere in it.

    What lies there and is not read is told in the log.

    Raises:
        UserError: if it is none of these.
    """
    return each_file(location, read_file)


def each_file(location: str, read: Callable[[Path, set[Path]], Iterator[T]]) -> Iterator[T]:
    """What `read` makes of each file of an input, in their order; it adds the pictures it reads to the set it is given.

    Raises:
        UserError: as `read_input` does.
    """
    files, others = _find_files(location)
    taken = {file.resolve() for file in files}
    for file in files:
        yield from read(file, taken)
    if other := [file for file in others if file.resolve() not in taken]:
        log.warning("data input %s: ignored file(s): %s", location, _endings(other))


def read_file(file: Path, taken: set[Path] | None = None) -> Iterator[Record]:
    """Read one of the `input_files`."""
    if file.suffix.lower() == PARQUET:
        return read_parquet(file)
    return read_image_folder(file.parent, file, taken)


def input_files(location: str) -> list[Path]:
    """The Parquet files or metadata files of one input, in the order in which they are read; one at least.

    Raises:
        UserError: as `read_input` does.
    """
    return _find_files(location)[0]


def _find_files(location: str) -> tuple[list[Path], list[Path]]:
    """The files of an input that are read, and those beside them that may be pictures or nothing of ours."""
    try:
        path = at_home(location)
        there = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data input {location}: no such file or folder ({error})") from error
    if not there:
        raise UserError(f"data input {location}: no such file or folder")
    if path.is_file():
        if path.suffix.lower() != PARQUET:
            raise UserError(f"data input {location}: give a {PARQUET} file, or a folder of them or with {METADATA[0]}")
        return [path], []
    files = _files_below(path)
    shards = [file for file in files if file.suffix.lower() == PARQUET]
    metadata = [file for file in files if file.name in METADATA]
    if shards and metadata:
        raise UserError(f"data input {location}: holds both {shards[0].name} and {metadata[0].name}; name one of them")
    if not shards and not metadata:
        raise UserError(
            f"data input {location}: give a {PARQUET} file, a folder of them, or one with {' or '.join(METADATA)}; "
            f"there are {_endings(files) or 'no files'}"
        )
    if twice := [file for file in metadata if file.name != METADATA[0] and file.with_name(METADATA[0]) in metadata]:
        raise UserError(f"data input {location}: holds both {METADATA[0]} and {twice[0].name}; remove one of them")
    return shards or metadata, [file for file in files if not (shards and file.name in OWN_FILES)]


def _files_below(folder: Path) -> list[Path]:
    """Files below a folder and the folders linked in it, each once, without those that systems leave behind."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _endings(files: list[Path]) -> str:
    counts = Counter(file.suffix.lower() or "(no ending)" for file in files)
    return ", ".join(f"{count} {ending}" for ending, count in sorted(counts.items()))


def recipe_records(data: DataRecipe) -> Iterator[Record]:
    """The records a recipe asks for: generated, or read from its inputs."""
    if data.world is not None:
        yield from world_records(
            {task: {split: n for split, n in sizes.items()} for task, sizes in data.world.items()},
            data.seed,
            data.open_words,
        )
    for location in data.inputs:
        yield from read_input(location)


def assemble(
    records: Iterable[Record], folder: Path, needs_source: dict[str, bool] | None = None, workers: int = 1
) -> dict:
    """Write records as a dataset folder and return its manifest.

    Args:
        records: in any order; they are sorted by split and id.
        folder: where the dataset appears, whole, by rename.
        needs_source: for each known task whether its records need a source image; None accepts any task.
        workers: threads that decode and hash pictures; what comes out does not depend on it.

    Raises:
        UserError: for an invalid record, a duplicate id, an unknown task, a missing source, or an empty input; or if
            `folder` holds anything but an older dataset.
    """
    return assemble_seen(in_threads(look_at, records, workers), folder, needs_source)


def assemble_seen(looked: Iterable[Seen], folder: Path, needs_source: dict[str, bool] | None = None) -> dict:
    """`assemble` for records that were looked at, which are asked for once the place is ours."""
    seen: set[str] = set()
    kept: list[Seen] = []
    with output_folder(folder, strangers) as scratch, _Spool(scratch) as spool:
        for found in looked:
            record = found.record
            if record.id in seen:
                raise UserError(f"record {record.id!r}: the id occurs twice; ids must be unique across all inputs")
            if needs_source is not None:
                check_task(record, needs_source)
            seen.add(record.id)
            kept.append(replace(found, record=spool.put(record)))
        if not kept:
            raise UserError(f"dataset {folder}: no records; check the recipe's data section")
        pictures = [found.pictures for found in kept]
        splits = settle_splits([found.record for found in kept], pictures)
        if sides := on_two_sides(splits, pictures):
            log.warning("dataset %s: %s", folder, sides)
        kept = [
            replace(found, record=replace(found.record, split=split)) for found, split in zip(kept, splits, strict=True)
        ]
        kept.sort(key=lambda found: (SPLITS.index(found.record.split), found.record.id))
        return _write(kept, spool, scratch)


@dataclass(frozen=True)
class Seen:
    """A record that was checked, the names of its pictures and their (height, width)."""

    record: Record
    pictures: Pictures
    size: tuple[int, int] | None


def look_at(record: Record) -> Seen:
    """Check a record, decode its pictures and hash them.

    Raises:
        UserError: naming the record and the field.
    """
    where = f"record {record.id!r}"
    check_record(record, where)
    size = check_images(record, where)
    return Seen(record, (_name_of(record.source), _name_of(record.target)), size)


def in_threads(work: Callable[[Any], Any], items: Iterable, workers: int) -> Iterator:
    """What `work` makes of each item, in their order; with several workers a few items each are under way at once."""
    if workers == 1:
        yield from map(work, items)
        return
    under_way: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) >= 4 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _name_of(picture: bytes | None) -> str | None:
    return None if picture is None else hashlib.sha256(picture).hexdigest()


def strangers(folder: Path) -> list[str] | None:
    """What a dataset folder holds beside the dataset; None if it holds none. See `danceopd.files.check_output`."""
    try:
        manifest = read_json(folder / MANIFEST)
        known = {MANIFEST, INDEX, *manifest["files"]}
        if not {"content", "counts"} <= set(manifest):
            return None
    except (UserError, LookupError, TypeError):
        return None
    return [path.name for path in folder.iterdir() if path.name not in known]


@dataclass(frozen=True)
class _Place:
    """Where a picture's bytes wait."""

    start: int
    length: int


class _Spool:
    """Holds the pictures of records that are being sorted: in memory up to `SPOOL_BYTES`, else in a file."""

    def __init__(self, folder: Path):
        # Without a name where the system allows it: nothing is left in the folder, even by a kill.
        where = str(folder)
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES, dir=where)  # noqa: SIM115 (closed below)

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, record: Record) -> Record:
        """The record with places where its pictures were."""
        return _with_pictures(record, bytes, self._keep)

    def get(self, record: Record) -> Record:
        """The record as it was put."""
        return _with_pictures(record, _Place, self._read)

    @staticmethod
    def size(record: Record) -> int:
        """Bytes of the pictures of a record that was put."""
        return sum(v.length for v in (getattr(record, f.name) for f in fields(Record)) if isinstance(v, _Place))

    def _keep(self, data: bytes) -> _Place:
        start = self._file.seek(0, 2)
        self._file.write(data)
        return _Place(start, len(data))

    def _read(self, place: _Place) -> bytes:
        self._file.seek(place.start)
        return self._file.read(place.length)


def _with_pictures(record: Record, kind: type, change: Callable) -> Record:
    values: dict[str, Any] = {f.name: getattr(record, f.name) for f in fields(Record)}
    return replace(record, **{name: change(value) for name, value in values.items() if isinstance(value, kind)})


def _shards(kept: list[Seen]) -> list[list[Seen]]:
    """Cut records into shards by rows, and by bytes of their pictures."""
    shards: list[list[Seen]] = []
    size = 0
    for found in kept:
        size += _Spool.size(found.record)
        if not shards or len(shards[-1]) == SHARD_ROWS or size > SHARD_BYTES:
            shards.append([])
            size = _Spool.size(found.record)
        shards[-1].append(found)
    return shards


def check_task(record: Record, needs_source: dict[str, bool]) -> None:
    """Check that a record's task is a known one and has the source it needs; see `assemble`.

    Raises:
        UserError: naming the record.
    """
    where = f"record {record.id!r}"
    if record.task not in needs_source:
        raise UserError(f"{where}: task {record.task!r} is not in the recipe; tasks are: {', '.join(needs_source)}")
    if needs_source[record.task] and record.source is None:
        raise UserError(f"{where}: task {record.task!r} edits a source image and the record has none")


def _write(kept: list[Seen], spool: _Spool, folder: Path) -> dict:
    files, places = {}, []
    for split in SPLITS:
        shards = _shards([found for found in kept if found.record.split == split])
        for number, shard in enumerate(shards):
            name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            write_shard([spool.get(found.record) for found in shard], folder / name)
            files[name] = {"sha256": hash_file(folder / name), "rows": len(shard)}
            places.append((name, len(shard)))
    records = [found.record for found in kept]
    counts = Counter((r.task, r.split) for r in records)
    tasks = sorted({r.task for r in records})
    content = content_hash(map(spool.get, records))
    manifest = {
        "content": content,
        "counts": {task: {split: counts[task, split] for split in SPLITS} for task in tasks},
        "files": files,
        "schema": 1,
    }
    write_json(folder / MANIFEST, manifest)
    write_columns(with_places(_columns(kept), places), folder, content)
    return manifest


def _columns(kept: list[Seen]) -> dict[str, list]:
    """Everything that `columns_of` finds in records, of ones whose pictures were looked at before."""

    def key(name: str | None) -> bytes | None:
        return None if name is None else bytes.fromhex(name)[:KEY_BYTES]

    records = [found.record for found in kept]
    texts = {name: [getattr(record, name) for record in records] for name in ("id", "task", "split", "prompt")}
    return texts | {
        "prompt_key": [key_of(record.prompt) for record in records],
        "source_key": [key(found.pictures[0]) for found in kept],
        "target_key": [key(found.pictures[1]) for found in kept],
        "height": [found.size and found.size[0] for found in kept],
        "width": [found.size and found.size[1] for found in kept],
        "bytes": [_Spool.size(record) for record in records],
    }


@dataclass(frozen=True)
class DatasetFolder:
    """A dataset on disk, opened by `open_dataset`."""

    folder: Path
    manifest: dict
    _held: dict[str, pa.Table] = field(default_factory=dict, repr=False, compare=False)

    @property
    def content(self) -> str:
        """SHA-256 of the records."""
        return self.manifest["content"]

    def records(self, split: str, task: str | None = None, limit: int | None = None) -> list[Record]:
        """Records of a split in id order, of one task or all; at most `limit`, spread over them by a hash of the id."""
        columns = self.columns()
        rows = rows_where(columns, split=split, **({} if task is None else {"task": task}))
        if limit is not None:
            rows = rows[spread(columns["id"].take(pa.array(rows)).to_pylist(), limit)]
        return list(self._read(rows))

    def table(self, split: str, tasks: tuple[str, ...]) -> RecordTable:
        """A split's records by their columns, task after task and each in id order; no picture is read for it."""
        columns = self.columns()
        rows = np.concatenate([rows_where(columns, split=split, task=task) for task in tasks])
        return RecordTable(columns.take(pa.array(rows)), lambda wanted: self._read(rows[np.asarray(wanted, np.int64)]))

    def columns(self) -> pa.Table:
        """All records' columns, in the order of the splits and ids (`danceopd.data.columns`).

        A dataset of an earlier version has none: all records are read once, and the columns are kept where the folder
        can be written to.
        """
        if "columns" not in self._held:
            found = open_columns(self.folder, self.content)
            self._held["columns"] = self._look_through() if found is None else found
        return self._held["columns"]

    def _look_through(self) -> pa.Table:
        log.info("%s: has no %s; every record is read once", self.folder, INDEX)
        order = {split: number for number, split in enumerate(SPLITS)}
        names = sorted(self.manifest["files"], key=lambda name: (order[name.partition("-")[0]], name))
        records = (record for name in names for record in read_parquet(self.folder / name))
        found = columns_of(records, [(name, self.manifest["files"][name]["rows"]) for name in names])
        try:
            write_columns(found, self.folder, self.content)
        except OSError as error:
            log.warning("%s: %s is not kept (%s), and made again by every process", self.folder, INDEX, error)
        return found

    def read(self) -> Iterator[Record]:
        """All records, in the order of their columns."""
        return self._read(np.arange(self.columns().num_rows))

    def _read(self, rows: np.ndarray) -> Iterator[Record]:
        """Records by their rows in `columns`; of each shard only the row groups that hold one are read."""
        places = self.columns().select(["file", "row"]).take(pa.array(rows, pa.int64()))
        files, inside = places["file"].combine_chunks(), places["row"].to_numpy()
        codes = files.indices.to_numpy() if len(rows) else np.zeros(0, np.int32)
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(codes) | (np.diff(inside) < 0)) + 1):
            if len(part):
                name = files.dictionary[int(codes[part[0]])].as_py()
                yield from read_parquet(self.folder / name, inside[part])


def open_dataset(folder: Path) -> DatasetFolder:
    """Open a dataset folder.

    Raises:
        UserError: if it has no manifest, or a shard is missing.
    """
    folder = at_home(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no {MANIFEST}; build the dataset first with 'danceopd data build'")
    manifest = read_json(folder / MANIFEST)
    for name in manifest["files"]:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: shard {name} is missing; build the dataset again or 'dvc checkout'")
    return DatasetFolder(folder, manifest)


def count_two_sides(folder: Path) -> TwoSides:
    """What of a dataset lies on two sides of a split, by its pictures' bytes and by what they look like."""
    dataset = open_dataset(folder)
    columns = dataset.columns()
    splits = columns["split"].to_pylist()
    pictures = [hex_names(columns[name].to_pylist()) for name in ("source_key", "target_key")]
    alike = count_alike(zip(splits, dataset.read(), strict=True))
    return replace(on_two_sides(splits, list(zip(*pictures, strict=True))), alike=alike)


def verify_dataset(folder: Path) -> dict:
    """Check every shard's hash and every record and picture; returns the manifest.

    Raises:
        UserError: naming the first damaged shard or record.
    """
    dataset = open_dataset(folder)
    for name, facts in dataset.manifest["files"].items():
        if hash_file(dataset.folder / name) != facts["sha256"]:
            raise UserError(f"{folder}: shard {name} is damaged (its hash differs from the manifest); build it again")
        for record in read_parquet(dataset.folder / name):
            check_images(record, f"{name}, record {record.id!r}")
    held = open_columns(dataset.folder, dataset.content)
    if held is not None and held.num_rows != sum(facts["rows"] for facts in dataset.manifest["files"].values()):
        raise UserError(f"{folder}: {INDEX} has {held.num_rows} rows; delete it, and it is made of the records again")
    return dataset.manifest
