"""What is known of records without their pictures: columns in one Arrow file beside a dataset's shards.

A start of training asks for tasks, splits, sizes and the names of prompts and pictures of every record, and for hardly
any picture. The file is memory-mapped, so that a million records' columns are there at once, and are in memory once
for all processes of a machine. It is made of the records and can be made again from them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from danceopd.data.pictures import read_size
from danceopd.data.records import Record
from danceopd.data.splits import group_records

log = logging.getLogger(__name__)
INDEX = "index.arrow"
KEY_BYTES = 16
KEY = pa.binary(KEY_BYTES)
_NAME = pa.dictionary(pa.int32(), pa.string())
# `group` numbers the records that share a picture; `height` and `width` are a record's own, null without a picture;
# `bytes` counts its pictures; `file` and `row` say where the record itself lies.
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("task", _NAME),
        ("split", _NAME),
        ("prompt", pa.string()),
        ("prompt_key", KEY),
        ("source_key", KEY),
        ("target_key", KEY),
        ("group", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("bytes", pa.int64()),
        ("file", _NAME),
        ("row", pa.int32()),
    ]
)
_CONTENT, _VERSION = b"content", b"1"


def key_of(content: str | bytes) -> bytes:
    """The name of a prompt or a picture's bytes: the first half of its SHA-256."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()[:KEY_BYTES]


@dataclass(frozen=True)
class RecordTable:
    """Records known by their columns; the records themselves, with their pictures, are read when they are asked for.

    Attributes:
        columns: a row a record, in `COLUMNS`.
        read: gives the records of rising rows.
    """

    columns: pa.Table
    read: Callable[[Sequence[int]], Iterator[Record]]

    def __len__(self) -> int:
        return self.columns.num_rows

    def texts(self, name: str, rows: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """A text column, of all rows or some."""
        column = self.columns[name]
        return (column if rows is None else column.take(pa.array(rows, pa.int64()))).to_pylist()


def table_of(records: Sequence[Record]) -> RecordTable:
    """Records that are in memory."""
    return RecordTable(columns_of(records), lambda rows: (records[row] for row in rows))


def columns_of(records: Iterable[Record], files: Sequence[tuple[str, int]] = ()) -> pa.Table:
    """The columns of records, each looked at once.

    Args:
        records: in the order of the rows.
        files: names and numbers of records of the shards they lie in, in that order.
    """
    found: dict[str, list] = {name: [] for name in COLUMNS.names if name not in ("group", "file", "row")}
    for record in records:
        for name in ("id", "task", "split", "prompt"):
            found[name].append(getattr(record, name))
        found["prompt_key"].append(key_of(record.prompt))
        pictures = (record.source, record.target)
        for name, picture in zip(("source_key", "target_key"), pictures, strict=True):
            found[name].append(None if picture is None else key_of(picture))
        first = next((picture for picture in pictures if picture is not None), None)
        size = (None, None) if first is None else read_size(first, f"record {record.id!r}")
        found["height"].append(size[0])
        found["width"].append(size[1])
        found["bytes"].append(sum(len(picture) for picture in pictures if picture is not None))
    return with_places(found, files)


def hex_names(keys: Iterable[bytes | None]) -> list[str | None]:
    """Keys as text."""
    return [None if key is None else key.hex() for key in keys]


def with_places(found: dict[str, list], files: Sequence[tuple[str, int]]) -> pa.Table:
    """Columns by name as one table; groups and the places of the rows are added."""
    pictures = list(zip(*(hex_names(found[name]) for name in ("source_key", "target_key")), strict=True))
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(name, len(numbers)) for name in group_records(found["id"], pictures)]
    names: list[str | None] = [name for name, count in files for _ in range(count)] or [None] * len(groups)
    rows: list[int | None] = [row for _, count in files for row in range(count)] or [None] * len(groups)
    whole = found | {"group": groups, "file": names, "row": rows}
    return pa.table([pa.array(whole[field.name], field.type) for field in COLUMNS], schema=COLUMNS)


def write_columns(columns: pa.Table, folder: Path, content: str) -> None:
    """Write a dataset's columns into its folder; `content` is the hash of the records they were made of."""
    path = folder / INDEX
    scratch = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
    marked = columns.replace_schema_metadata({_CONTENT: content.encode(), b"version": _VERSION})
    try:
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, marked.schema) as writer:
            writer.write_table(marked)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def open_columns(folder: Path, content: str) -> pa.Table | None:
    """A dataset's columns, memory-mapped; None if there are none, or they are of other records."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(folder / INDEX))).read_all()
    except (OSError, pa.ArrowException):
        return None
    told = table.schema.metadata or {}
    if told.get(_CONTENT) != content.encode() or told.get(b"version") != _VERSION:
        return None
    return table if table.schema.names == COLUMNS.names else None


def rows_where(columns: pa.Table, **values: str) -> np.ndarray:
    """Numbers of the rows whose named columns have these values, rising."""
    held = np.ones(columns.num_rows, dtype=bool)
    for name, value in values.items():
        held &= pc.equal(columns[name], value).to_numpy()
    return np.flatnonzero(held)
