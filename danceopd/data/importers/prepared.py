"""Rows of an import converted beforehand, by any number of workers on any number of machines.

Decoding, resizing and encoding pictures is nearly all of an import's work, and no row needs another for it. Which rows
are kept does depend on those before them (duplicates, ids, splits), so one process decides that at the end, over what
is prepared, as an import by itself does over what it converts: what comes out is the same, byte for byte.

A worker takes every n-th input file and writes one Parquet file for each, whole or not at all, into `<out>.prepared`.
The name is of the settings and the input file, so that a worker that begins again goes on at the first it lacks.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from danceopd.data.importers.convert import Outcome
from danceopd.data.importers.inputs import NO_KIND, InputFile, RawRow
from danceopd.data.importers.spec import ImportSpec
from danceopd.data.pictures import Refused
from danceopd.data.records import Record
from danceopd.errors import UserError
from danceopd.files import content_key

_PICTURES = ("source", "target")
_RECORD = pa.struct([(f.name, pa.binary() if f.name in _PICTURES else pa.string()) for f in fields(Record)])
# `facts` is JSON, which holds any text that a row may have.
_SCHEMA = pa.schema([("number", pa.int64()), ("facts", pa.string()), ("record", _RECORD)])
GROUP_ROWS, GROUP_BYTES = 32, 16_000_000  # whichever comes first: what is in memory at once


def prepared_folder(out: Path) -> Path:
    """Where what is prepared for an import waits."""
    return out.with_name(out.name + ".prepared")


def prepared_file(folder: Path, spec: ImportSpec, file: InputFile) -> Path:
    """The place of one input file's rows."""
    return folder / f"{content_key(spec.key(), file.path, file.size)}.parquet"


def lacking(folder: Path, spec: ImportSpec, files: Iterable[InputFile]) -> list[InputFile]:
    """The input files whose rows are not prepared."""
    with suppress(FileNotFoundError):
        there = set(os.listdir(folder))  # all at once: what others on a network's file system wrote meanwhile shows
        return [file for file in files if prepared_file(folder, spec, file).name not in there]
    return list(files)


def prepare(folder: Path, spec: ImportSpec, file: InputFile, outcomes: Iterator[Outcome]) -> None:
    """Keep what became of an input file's rows."""
    place = prepared_file(folder, spec, file)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{place.name}.{uuid.uuid4().hex[:8]}"
    try:
        with pq.ParquetWriter(scratch, _SCHEMA, compression="none", use_dictionary=False) as writer:
            rows: list[dict] = []
            size = 0
            for outcome in outcomes:
                rows.append(_row(outcome))
                size += sum(len(getattr(outcome.record, name, None) or b"") for name in _PICTURES)
                if len(rows) == GROUP_ROWS or size >= GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                    rows, size = [], 0
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
        os.replace(scratch, place)
    finally:
        scratch.unlink(missing_ok=True)


def _row(outcome: Outcome) -> dict:
    row, record = outcome.row, outcome.record
    facts = {
        "where": row.where,
        "kind": None if row.broken is not None else str(row.values["kind"] or NO_KIND),
        "ignored": row.ignored,
        "fate": outcome.fate,
        "label": outcome.label,
        "message": outcome.message,
        "hashes": outcome.hashes,
    }
    kept = None if record is None else {f.name: getattr(record, f.name) for f in fields(Record)}
    return {"number": row.number, "facts": json.dumps(facts), "record": kept}


def read_prepared(path: Path, number: int, start: int) -> Iterator[Outcome]:
    """What became of a file's rows, from row `start` on.

    Args:
        path: as `prepare` wrote it.
        number: of the file in the list of inputs.
        start: number of the first row.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        with pq.ParquetFile(path) as table:
            for group in range(table.num_row_groups):
                for row in table.read_row_group(group).to_pylist():
                    if row["number"] >= start:
                        yield _outcome(row, number)
    except (OSError, pa.ArrowException) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is damaged ({said}); remove it, and run the import again") from error


def _outcome(row: dict, number: int) -> Outcome:
    facts = json.loads(row["facts"])
    broken = Refused(facts["label"], facts["message"]) if facts["kind"] is None else None
    ignored = tuple((what, example) for what, example in facts["ignored"])
    raw = RawRow(number, row["number"], facts["where"], {"kind": facts["kind"]}, broken, ignored)
    record = None if row["record"] is None else Record(**row["record"])
    return Outcome(raw, facts["fate"], facts["label"], facts["message"], record, tuple(facts["hashes"]))


def outcomes(
    folder: Path,
    spec: ImportSpec,
    files: list[InputFile],
    start: tuple[int, int],
    converted: Callable[[list[InputFile], tuple[int, int]], Iterator[Outcome]],
) -> Iterator[Outcome]:
    """All rows' outcomes in their order from position `start` on: as prepared, else by `converted`."""
    if len(lacking(folder, spec, files)) == len(files):
        yield from converted(files, start)
        return
    for number in range(start[0], len(files)):
        first, place = start[1] if number == start[0] else 0, prepared_file(folder, spec, files[number])
        if place.is_file():
            yield from read_prepared(place, number, first)
        else:
            yield from converted(files[: number + 1], (number, first))


def forget_prepared(folder: Path, spec: ImportSpec, files: Iterable[InputFile]) -> None:
    """Remove what was prepared for an import, and the folder if it holds nothing else."""
    own = {prepared_file(folder, spec, file).name for file in files}
    for path in folder.glob("*"):
        if path.name in own or path.name.lstrip(".").rpartition(".")[0] in own:  # the last are of killed workers
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
