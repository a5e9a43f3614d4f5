"""The task-tagged record, and how a table of them lies on disk.

One record is one sample of one task. On disk a dataset is a folder of Parquet shards with the pictures' bytes
inside, which `datasets.load_dataset("parquet", ...)` opens with its images decoded, and a `manifest.json` with counts
and a content hash. Distillation reads prompts and sources only; targets serve teachers' fine-tuning and evaluation.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from danceopd.data.pictures import read_picture
from danceopd.errors import UserError
from danceopd.text import parse_json

SPLITS = ("train", "val", "test")
UNDECIDED = ""  # split of a record that names none, until a dataset is assembled (see `splits`)
MANIFEST = "manifest.json"
SHARD_ROWS = 8192
READ_ROWS = 64  # in memory at once
SYNONYMS = {"target": ("file_name", "image")}  # as `datasets` calls a record's only picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        id: unique in its dataset.
        task: the capability it belongs to; decides its teacher.
        prompt: caption or instruction, not empty.
        source: encoded picture to edit, or None (drawing tasks).
        target: encoded wanted picture, or None (distillation needs none).
        split: `train`, `val` or `test`; `UNDECIDED` of a record that names none.
        provenance: where it came from, a JSON object as text.
    """

    id: str
    task: str
    prompt: str
    source: bytes | None
    target: bytes | None
    split: str
    provenance: str = "{}"

    def facts(self) -> dict:
        """The provenance, parsed."""
        return json.loads(self.provenance)


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXT_FIELDS = ("id", "task", "prompt", "split", "provenance")
_FEATURES = {f.name: {"dtype": "string", "_type": "Value"} for f in fields(Record)} | {
    "source": {"_type": "Image"},
    "target": {"_type": "Image"},
}
SCHEMA = pa.schema(
    [pa.field(f.name, _IMAGE if f.name in ("source", "target") else pa.string()) for f in fields(Record)],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decode picture bytes to (H, W, 3) uint8, upright, on white where they are transparent (see `pictures`).

    Raises:
        UserError: naming `where`, if the bytes are no picture.
    """
    return np.asarray(read_picture(data, where).image)


def check_record(record: Record, where: str) -> None:
    """Check one record's fields (pictures are decoded only by `check_images`).

    Raises:
        UserError: naming `where` and the field.
    """
    for name in ("id", "task", "prompt"):
        value = getattr(record, name)
        if not isinstance(value, str):
            raise UserError(
                f"{where}: field '{name}' is {type(value).__name__}, not text; every record needs text there"
            )
        if not value.strip():
            raise UserError(f"{where}: field '{name}' is empty; every record needs text there")
    if record.split not in (*SPLITS, UNDECIDED):
        raise UserError(f"{where}: field 'split' is {record.split!r}; use one of {', '.join(SPLITS)}")
    try:
        facts = parse_json(record.provenance, where)
    except (TypeError, UserError):
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"{where}: field 'provenance' is not a JSON object; write {{}} when there is none")


def check_images(record: Record, where: str) -> tuple[int, int] | None:
    """Decode the record's pictures and return their (height, width); source and target must have one size.

    Raises:
        UserError: naming `where` and the field.
    """
    sizes = {}
    for name in ("source", "target"):
        data = getattr(record, name)
        if data is not None:
            sizes[name] = decode_image(data, f"{where}, field '{name}'").shape[:2]
    if len(set(sizes.values())) > 1:
        raise UserError(f"{where}: source is {sizes['source']} and target {sizes['target']} (H, W); make them equal")
    return next(iter(sizes.values()), None)


def content_hash(records: Iterable[Record]) -> str:
    """SHA-256 over the records themselves, in order: the same on any machine, whatever writes the Parquet."""
    digest = hashlib.sha256()
    for record in records:
        for field in fields(Record):
            value = getattr(record, field.name)
            data = b"" if value is None else value if isinstance(value, bytes) else value.encode()
            digest.update(len(data).to_bytes(8, "big") + (b"\1" if value is None else b"\0") + data)
    return digest.hexdigest()


def to_table(records: list[Record]) -> pa.Table:
    """Records as one Arrow table in `SCHEMA`."""

    def column(name: str) -> pa.Array:
        values = [getattr(r, name) for r in records]
        if name in _TEXT_FIELDS:
            return pa.array(values, pa.string())
        return pa.array([None if v is None else {"bytes": v, "path": None} for v in values], _IMAGE)

    return pa.table([column(f.name) for f in fields(Record)], schema=SCHEMA)


def write_shard(records: list[Record], path: Path) -> None:
    """Write one Parquet shard without a codec, so that equal records give equal bytes."""
    pq.write_table(
        to_table(records),
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=1024,
    )


def _image_bytes(value: Any, where: str) -> bytes | None:
    if value is None or (isinstance(value, dict) and all(part is None for part in value.values())):
        return None
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value, bytes):
        return value
    raise UserError(f"{where}: holds no embedded image bytes; write it as struct<bytes, path> or binary")


def read_parquet(path: Path, rows: np.ndarray | None = None) -> Iterator[Record]:
    """Read the records of one Parquet file in this schema, checked.

    Args:
        path: of the file.
        rows: numbers of those that are wanted, rising; row groups without one are not read. None: all.

    Raises:
        UserError: if the file is not Parquet, a column is missing, or a record is not valid.
    """
    for start, batch in _batches(path, rows):
        if rows is None:
            inside: Iterable[int] = range(len(batch))
        else:
            first, last = np.searchsorted(rows, (start, start + len(batch)))
            inside = (rows[first:last] - start).tolist()
            batch = batch.take(pa.array(inside, pa.int64()))
        for number, data in zip(inside, batch.to_pylist(), strict=True):
            yield record_from(data, f"{path}, row {start + number}")


def _batches(path: Path, rows: np.ndarray | None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """A file's batches, each with the number of its first row; with `rows`, of the row groups that hold one."""
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            missing = {"id", "task", "prompt"} - names
            if missing:
                said = f"column(s) missing: {', '.join(sorted(missing))}; found {', '.join(sorted(names))}"
                raise UserError(f"{path}: {said}")
            if unknown := unknown_fields(names):
                log.warning("%s: ignored column(s): %s", path, ", ".join(unknown))
            for number in range(file.num_row_groups):
                after = row + file.metadata.row_group(number).num_rows
                if rows is not None and np.searchsorted(rows, row) == np.searchsorted(rows, after):
                    row = after
                    continue
                for batch in file.iter_batches(batch_size=READ_ROWS, row_groups=[number]):
                    yield row, batch
                    row += len(batch)
    except (OSError, pa.ArrowException) as error:
        said = " ".join(str(error).split())
        where = f"{path}, after row {row - 1}" if row else path
        raise UserError(f"{where}: not a readable Parquet file ({said}); fetch it again") from error


def unknown_fields(names: Iterable[str]) -> list[str]:
    """Names in a mapping that are neither a record's fields nor synonyms of one."""
    known = {f.name for f in fields(Record)}
    known |= {other for others in SYNONYMS.values() for other in others}
    return sorted(set(names) - known)


def record_from(data: dict, where: str) -> Record:
    """A checked record from a plain mapping; `split` and `provenance` may be missing.

    Raises:
        UserError: naming `where` and the field.
    """
    for name, others in SYNONYMS.items():
        given = [n for n in (name, *others) if data.get(n) is not None]
        if len(given) > 1:
            raise UserError(f"{where}: both '{given[0]}' and '{given[1]}' are the {name}; give one of them")
        data = data | {name: data[given[0]] if given else None}
    number = data.get("id")
    record = Record(
        id=str(number) if isinstance(number, int) and not isinstance(number, bool) else _or(number, ""),
        task=_or(data.get("task"), ""),
        prompt=_or(data.get("prompt"), ""),
        source=_image_bytes(data.get("source"), f"{where}, field 'source'"),
        target=_image_bytes(data.get("target"), f"{where}, field 'target'"),
        split=_or(data.get("split"), UNDECIDED),
        provenance=_or(data.get("provenance"), "{}"),
    )
    check_record(record, where)
    return record


def _or(value: Any, default: str) -> Any:
    return default if value is None else value


def spread(ids: Sequence[str], wanted: int) -> list[int]:
    """Which `wanted` of the records to take, as rising rows of `ids` (all, if there are no more).

    A hash of the id decides, so that records of every origin come in whatever order they lie in, and more records
    change few of the choices.
    """
    rows = heapq.nsmallest(wanted, range(len(ids)), key=lambda row: hashlib.sha256(ids[row].encode()).digest())
    return sorted(rows)


def split_of(record_id: str, val: float = 0.02, test: float = 0.02) -> str:
    """The split of a record that names none: a stable hash of its id, so that adding records moves no other."""
    share = int.from_bytes(hashlib.sha256(record_id.encode()).digest()[:8], "big") / 2**64
    return "test" if share < test else "val" if share < test + val else "train"
