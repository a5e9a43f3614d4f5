"""What a build found in its input files, kept beside the dataset until that is there.

Decoding and hashing pictures is nearly all of a build's work, and no record needs another for it. So any number of
workers on any number of machines can share the input files, and a build that was killed goes on. Ids, splits and shards
depend on all records: one process settles them at the end, as a build by itself does, and reads the records again for
it; what comes out is the same, byte for byte.

Each input file has one small file in `<out>.looked`, whole or not at all. Its name is of the path, size and time of the
input file and of the pictures that a metadata file names, so that a file that changed is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from danceopd.config.recipe import DataRecipe
from danceopd.data.assemble import (
    PARQUET,
    Seen,
    check_task,
    each_file,
    in_threads,
    input_files,
    look_at,
    named_pictures,
    read_file,
)
from danceopd.data.records import Record
from danceopd.data.splits import Pictures
from danceopd.errors import UserError
from danceopd.files import write_atomic

log = logging.getLogger(__name__)
SMALL = 1 << 26  # bytes of pictures that are looked at in seconds: a build by itself keeps nothing of so few
_KEPT = TypeAdapter(list[tuple[str, Pictures, tuple[int, int] | None]])  # of each record what `_Facts` holds
_VERSION = b"1"  # of what is kept, and of the checks that its records have passed
_OWN = re.compile(r"[0-9a-f]{16}\.json|\.[0-9a-f]{16}\.json\.[0-9a-f]{8}")  # the second is a killed worker's


def looked_folder(out: Path) -> Path:
    """Where what was found for a dataset waits."""
    return out.with_name(out.name + ".looked")


def seen_records(data: DataRecipe, folder: Path, workers: int) -> Iterator[Seen]:
    """The records of a recipe's inputs, looked at: as `folder` has it, else now, and then kept there.

    Of a `SMALL` input nothing is kept.

    Args:
        data: what is read.
        folder: the dataset's `looked_folder`; it need not be there.
        workers: threads that decode and hash pictures.

    Raises:
        UserError: for an input or a record that is not valid, or an input file that changes while it is read.
    """
    rows = (row for location in data.inputs for row in each_file(location, partial(_rows, folder)))
    return _look_through(rows, workers, SMALL)


def look_at_share(
    data: DataRecipe, folder: Path, needs_source: dict[str, bool], share: tuple[int, int], workers: int
) -> list[Path]:
    """Look at one worker's share of the input files and keep what is found in `folder`.

    Args:
        data: what is read; generated records are nobody's share.
        folder: the dataset's `looked_folder`, for all workers the same.
        needs_source: as `assemble` takes it.
        share: this worker's number, from 0, and how many there are.
        workers: threads of this one.

    Returns:
        The input files that are not looked at yet, other workers'.

    Raises:
        UserError: for an input or a record that is not valid.
    """
    files = [file for location in data.inputs for file in input_files(location)]
    mine = _lacking(folder, files[share[0] :: share[1]])
    for seen in _look_through(_told(folder, mine), workers, 0):
        check_task(seen.record, needs_source)
    return _lacking(folder, files)


def forget_looked(folder: Path) -> None:
    """Remove all that was kept, and the folder if it holds nothing else."""
    for path in folder.glob("*"):
        if _OWN.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@dataclass(frozen=True)
class _Facts:
    """What is kept of a record: its id, the names of its pictures and their (height, width)."""

    id: str
    pictures: Pictures
    size: tuple[int, int] | None


@dataclass(frozen=True)
class _Row:
    """A record of an input file; without a record, the end of a file that is looked at now.

    Attributes:
        file: it lies in.
        place: where what is found in that file is kept.
        record: as it was read.
        facts: what is known of it already.
    """

    file: Path
    place: Path
    record: Record | None = None
    facts: _Facts | None = None


def _told(folder: Path, files: list[Path]) -> Iterator[_Row]:
    for number, file in enumerate(files, start=1):
        log.info("%s: file %d of this worker's %d", file, number, len(files))
        yield from _rows(folder, file)


def _rows(folder: Path, file: Path, taken: set[Path] | None = None) -> Iterator[_Row]:
    place = _place(folder, file)  # before it is read: what changes meanwhile is not taken for what was found
    known, records = _read_kept(place), read_file(file, taken)
    if known is None:
        for record in records:
            yield _Row(file, place, record)
        yield _Row(file, place)
        return
    changed = UserError(f"{file}: changed while it was read; build the dataset again")
    for read, facts in zip_longest(records, known):
        if read is None or facts is None or read.id != facts.id:
            raise changed
        yield _Row(file, place, read, facts)
    if _place(folder, file) != place:
        raise changed


def _look_through(rows: Iterable[_Row], workers: int, least: int) -> Iterator[Seen]:
    """Rows' records, looked at; what is found in a file is kept once `least` bytes of pictures were decoded."""
    found: list[_Facts] = []
    size = 0
    for row, seen in in_threads(_look, rows, workers):
        if seen is None:
            if size >= least:
                _keep(row.place, found)
            found = []
            continue
        if row.facts is None:
            found.append(_Facts(seen.record.id, seen.pictures, seen.size))
            size += len(seen.record.source or b"") + len(seen.record.target or b"")
        yield seen


def _look(row: _Row) -> tuple[_Row, Seen | None]:
    if row.record is None:
        return row, None
    if row.facts is not None:
        return row, Seen(row.record, row.facts.pictures, row.facts.size)
    try:
        return row, look_at(row.record)
    except UserError as error:
        raise UserError(f"{row.file}, {error}") from error


def _place(folder: Path, file: Path) -> Path:
    """Where what is found in an input file is kept: another place, once it or a picture it names has changed."""
    digest = hashlib.sha256(_VERSION)
    for path in chain([file], () if file.suffix.lower() == PARQUET else named_pictures(file)):
        digest.update(os.fsencode(path) + b"\0")
        with suppress(OSError, ValueError):  # reading it says what is wrong
            state = path.stat()
            digest.update(f"{state.st_size} {state.st_mtime_ns}\0".encode())
    return folder / f"{digest.hexdigest()[:16]}.json"


def _lacking(folder: Path, files: Iterable[Path]) -> list[Path]:
    """The input files of which nothing is kept."""
    there: set[str] = set()
    with suppress(FileNotFoundError):
        there.update(os.listdir(folder))  # all at once: what others on a network's file system wrote meanwhile shows
    return [file for file in files if _place(folder, file).name not in there]


def _keep(place: Path, found: list[_Facts]) -> None:
    write_atomic(place, json.dumps([(facts.id, facts.pictures, facts.size) for facts in found]))


def _read_kept(place: Path) -> list[_Facts] | None:
    if not place.is_file():
        return None
    try:
        rows = _KEPT.validate_json(place.read_bytes())
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        log.warning("%s: damaged (%s); the records are looked at again", place, what)
        return None
    return [_Facts(*row) for row in rows]
