"""The import: rows in, shards of records out, in bounded memory, resumable after a kill.

It works in `<out>.partial`: finished shards and `journal.jsonl`, whose last whole line says which shards count, how far
the input is read, and the tally so far. A run with the same settings and inputs goes on from there and ends with the
very bytes of one that was never stopped; then the folder takes its name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from danceopd.data.dedup import DuplicateFinder
from danceopd.data.importers import prepared
from danceopd.data.importers.convert import Outcome, convert, kind_of
from danceopd.data.importers.inputs import InputFile, RawRow, find_inputs
from danceopd.data.importers.rows import read_rows
from danceopd.data.importers.spec import ANY, ImportSpec
from danceopd.data.records import SCHEMA, Record, to_table
from danceopd.data.splits import StreamedSplits
from danceopd.errors import UserError
from danceopd.files import HeldElsewhere, at_home, check_output, hash_file, lock_output, read_json, write_json

log = logging.getLogger(__name__)
JOURNAL, REPORT = "journal.jsonl", "import.json"
GROUP_ROWS, GROUP_BYTES = 32, 16_000_000  # of a row group, whichever comes first: what the writer keeps in memory
TELL_EVERY = 30.0  # seconds


@dataclass
class Tally:
    """What became of the rows read so far.

    Attributes:
        rows: read.
        kept: records by "task/split".
        dropped: by fate and label: how many, and the first of them in words.
        ignored: what lies there and is not read, by what it is: how many, and the first of them.
        kinds: of edits that rows name.
    """

    rows: int = 0
    kept: Counter = field(default_factory=Counter)
    dropped: dict[str, dict[str, dict]] = field(default_factory=dict)
    ignored: dict[str, dict] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)

    def drop(self, fate: str, label: str, message: str, examples: int) -> None:
        """Count a row that is not kept."""
        _count(self.dropped.setdefault(fate, {}), label, message, examples)

    def ignore(self, what: str, example: str, examples: int) -> None:
        """Count a file or a row's column that is not read."""
        _count(self.ignored, what, example, examples)

    @property
    def total(self) -> int:
        """Records kept."""
        return sum(self.kept.values())


def _count(table: dict[str, dict], label: str, example: str, examples: int) -> None:
    entry = table.setdefault(label, {"count": 0, "examples": []})
    entry["count"] += 1
    if len(entry["examples"]) < examples:
        entry["examples"].append(example)


class Journal:
    """The folder an import works in, and how far it is."""

    def __init__(self, folder: Path, header: dict):
        """Open or begin the work; shards that no line names are removed.

        Raises:
            UserError: if the folder holds an import with other settings or inputs.
        """
        self.folder, self._path, self._scratch = folder, folder / JOURNAL, (folder / JOURNAL).with_suffix(".new")
        self.tally, self.position, self.shards = Tally(), (0, 0), {}
        lines = self._lines()
        if lines and not _same_work(lines, header):
            raise UserError(
                f"{folder}: holds an unfinished import with other settings or inputs; remove it, or give another --out"
            )
        if not lines and folder.exists() and (found := sorted(set(os.listdir(folder)) - {self._scratch.name})):
            raise UserError(f"{folder}: holds {found[0]} and no import's journal; move it, or give another --out")
        for line in lines[1:]:
            self.shards[line["shard"]] = {"rows": line["rows"], "sha256": line["sha256"]}
        if len(lines) > 1:
            self.position = tuple(lines[-1]["position"])
            kept = lines[-1]["tally"]
            self.tally = Tally(
                kept["rows"],
                Counter(kept["kept"]),
                kept["dropped"],
                kept.get("ignored", {}),
                set(kept.get("kinds", ())),
            )
        folder.mkdir(parents=True, exist_ok=True)
        # Written anew and renamed, so that a line cut short by a kill is gone.
        whole = "".join(json.dumps(line, sort_keys=True) + "\n" for line in [header, *lines[1:]])
        self._scratch.write_text(whole)
        self._scratch.replace(self._path)
        for path in folder.glob("*.parquet*"):
            if path.name not in self.shards:
                path.unlink()

    def _lines(self) -> list[dict]:
        lines = []
        if self._path.is_file():
            for line in self._path.read_text().splitlines():
                with suppress(json.JSONDecodeError):
                    lines.append(json.loads(line))
                    continue
                break
        return lines

    def next_shard(self) -> Path:
        """Where the next shard is written."""
        return self.folder / f"part-{len(self.shards):05d}.parquet"

    def finish_shard(self, scratch: Path, rows: int, position: tuple[int, int]) -> None:
        """Give a written shard its name, then say in the journal that it counts."""
        path = self.next_shard()
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        facts = {"rows": rows, "sha256": hash_file(scratch)}
        scratch.replace(path)
        tally = vars(self.tally) | {"kept": dict(self.tally.kept), "kinds": sorted(self.tally.kinds)}
        line = {"shard": path.name, **facts, "position": list(position), "tally": tally}
        with open(self._path, "a") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.shards[path.name] = facts
        self.position = position


def _same_work(lines: list[dict], header: dict) -> bool:
    """Whether a journal is of these settings and inputs; a file that was not read to its end may have been mended."""
    if lines[0]["spec"] != header["spec"] or len(lines[0]["inputs"]) != len(header["inputs"]):
        return False
    read = lines[-1]["position"][0] if len(lines) > 1 else 0
    pairs = zip(lines[0]["inputs"], header["inputs"], strict=True)
    return all(old == new if number < read else old[0] == new[0] for number, (old, new) in enumerate(pairs))


class ShardWriter:
    """Writes one shard a few rows at a time."""

    def __init__(self, path: Path):
        self.path = path.with_name(path.name + ".new")
        self.rows = self.bytes = self._written = 0
        self._waiting: list[Record] = []
        # As `write_shard` does: no codec, so that equal records give equal bytes.
        self._writer = pq.ParquetWriter(
            self.path, SCHEMA, compression="none", use_dictionary=False, write_statistics=False
        )

    def add(self, record: Record) -> None:
        """Take one record."""
        self._waiting.append(record)
        self.rows += 1
        self.bytes += sum(len(picture) for picture in (record.source, record.target) if picture)
        if len(self._waiting) == GROUP_ROWS or self.bytes - self._written >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(to_table(self._waiting), row_group_size=GROUP_ROWS)
            self._waiting, self._written = [], self.bytes

    def close(self) -> None:
        """Write what is left and the file's end."""
        self._flush()
        self._writer.close()


def run_import(spec: ImportSpec, out: Path, workers: int = 1) -> dict:
    """Import a data set into `out`, a folder that a recipe's `data.inputs` names.

    Args:
        spec: what is read and how.
        out: the folder that appears, whole, at the end.
        workers: threads that decode and encode pictures; what comes out does not depend on it.

    Returns:
        The report, which also lies in `import.json`.

    Raises:
        UserError: if inputs cannot be read, nothing is kept, or `out` is there already or being written.
    """
    out = at_home(out)
    files = find_inputs(spec)
    _check_apart(out, spec)
    with lock_output(out):
        return _run(spec, files, out, workers)


def run_share(spec: ImportSpec, out: Path, share: tuple[int, int], workers: int = 1) -> dict | None:
    """One worker's part of an import that several make: its share of the input files is converted.

    The worker that finds all of them converted at its end writes `out`, as `run_import` does.

    Args:
        spec: what is read and how; the same for all.
        out: the folder that appears, whole, at the end; for all the same place.
        share: this worker's number, from 0, and how many there are.
        workers: threads of this one.

    Returns:
        The report of the whole import; None if other workers have files to convert still, or one is writing it.

    Raises:
        UserError: as `run_import` does.
    """
    out = at_home(out)
    files = find_inputs(spec)
    _check_apart(out, spec)
    if (done := _done(out, _header(spec, files))) is not None:
        return done
    check_output(out)
    folder = prepared.prepared_folder(out)
    mine = range(share[0], len(files), share[1])
    for number in mine:
        if prepared.lacking(folder, spec, [files[number]]):
            log.info("%s: file %d of this worker's %d", files[number].name, mine.index(number) + 1, len(mine))
            found = _converted(spec, workers, files[: number + 1], (number, 0))
            prepared.prepare(folder, spec, files[number], found)
    if left := prepared.lacking(folder, spec, files):
        log.info("%d of %d files are other workers'; the last of them writes %s", len(left), len(files), out)
        return None
    try:
        with lock_output(out):
            return _run(spec, files, out, workers)
    except HeldElsewhere:
        log.info("%s: another worker writes it", out)
        return None


def _check_apart(out: Path, spec: ImportSpec) -> None:
    """Refuse an output inside of what is read: the next run would read it."""
    for location in spec.inputs:
        if "://" not in location and out.resolve().is_relative_to(at_home(location).resolve()):
            raise UserError(f"{out}: lies in the input {location}; name a place outside of it")


def _header(spec: ImportSpec, files: list[InputFile]) -> dict:
    return {"spec": spec.key(), "inputs": [[file.path, file.size] for file in files]}


def _done(out: Path, header: dict) -> dict | None:
    """The report of an import that is there already, or None.

    Raises:
        UserError: if it is another one.
    """
    if not (out / REPORT).is_file():
        return None
    if (report := read_json(out / REPORT))["header"] != header:
        raise UserError(f"{out}: is there already, from other settings or inputs; remove it, or give another --out")
    log.info("%s: imported before with these settings", out)
    return report


def _run(spec: ImportSpec, files: list[InputFile], out: Path, workers: int) -> dict:
    header = _header(spec, files)
    if (done := _done(out, header)) is not None:
        return done
    check_output(out)
    journal, folder = Journal(out.with_name(out.name + ".partial"), header), prepared.prepared_folder(out)
    if journal.shards:
        log.info("going on after %d shards, %d rows read", len(journal.shards), journal.tally.rows)
    try:
        _write_shards(spec, files, journal, workers, folder)
    except BaseException:
        if not journal.shards:  # nothing to go on from
            shutil.rmtree(journal.folder)
        raise
    if not journal.tally.total:
        reasons = {f"{fate} {label}": e["count"] for fate, d in journal.tally.dropped.items() for label, e in d.items()}
        said = _first_message(journal.tally)
        shutil.rmtree(journal.folder)
        raise UserError(f"{out}: none of {journal.tally.rows} rows was kept ({_counts(reasons)}); {said}")
    report = _report(spec, journal, header)
    write_json(journal.folder / REPORT, report)
    journal.folder.replace(out)
    (out / JOURNAL).unlink()
    prepared.forget_prepared(folder, spec, files)
    return report


def _first_message(tally: Tally) -> str:
    first = next((e["examples"][0] for d in tally.dropped.values() for e in d.values()), "the inputs have no rows")
    hint = "; say which task it is with --task KIND=TASK" if "unmapped" in tally.dropped else ""
    return f"first: {first}{hint}"


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(reasons.items())) or "no rows"


def _report(spec: ImportSpec, journal: Journal, header: dict) -> dict:
    tally = journal.tally
    counts: dict[str, dict[str, int]] = {}
    for name, count in sorted(tally.kept.items()):
        task, _, split = name.rpartition("/")
        counts.setdefault(task, {})[split] = count
    return {
        "header": header,
        "settings": spec.model_dump(mode="json"),
        "rows": tally.rows,
        "kept": tally.total,
        "counts": counts,
        "dropped": tally.dropped,
        "ignored": tally.ignored,
        "unused": sorted(set(spec.tasks) - {ANY} - tally.kinds),
        "files": journal.shards,
    }


def _write_shards(spec: ImportSpec, files: list[InputFile], journal: Journal, workers: int, folder: Path) -> None:
    finder, ids, splits = _remembered(spec, journal)
    tally, writer, last = journal.tally, None, journal.position
    told = started = time.monotonic()
    begun = tally.rows
    found = prepared.outcomes(folder, spec, files, journal.position, partial(_converted, spec, workers))
    for outcome in found:
        row = outcome.row
        last = (row.file, row.number + 1)
        tally.rows += 1
        if row.broken is None:
            tally.kinds.add(kind_of(row))
        for what, example in row.ignored:
            tally.ignore(what, example, spec.examples)
        record = _admit(outcome, spec, finder, ids, splits, tally)
        if record is not None:
            writer = writer or ShardWriter(journal.next_shard())
            writer.add(record)
            if writer.rows >= spec.shard_rows or writer.bytes >= spec.shard_mb * 1_000_000:
                writer.close()
                journal.finish_shard(writer.path, writer.rows, last)
                writer = None
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            speed = (tally.rows - begun) / (told - started)
            log.info("%s: %d rows read, %d kept, %.0f rows/s", files[row.file].name, tally.rows, tally.total, speed)
    if writer is not None:
        writer.close()
        journal.finish_shard(writer.path, writer.rows, last)


def _admit(
    outcome: Outcome,
    spec: ImportSpec,
    finder: DuplicateFinder | None,
    ids: set[str],
    splits: StreamedSplits,
    tally: Tally,
) -> Record | None:
    """The record of a row that is kept; every other row is counted."""
    record = outcome.record
    if record is None:
        tally.drop(outcome.fate, outcome.label, outcome.message, spec.examples)
        return None
    where = outcome.row.where
    if finder is not None:
        text = record.prompt if record.source is not None else ""
        other = finder.seen(outcome.hashes, text, record.id)
        if other is not None:
            tally.drop("duplicate", "duplicate", f"{where}: looks like {other}", spec.examples)
            return None
    if record.id in ids:
        tally.drop("refused", "id-repeated", f"{where}: the id {record.id!r} occurs twice", spec.examples)
        return None
    split = splits.settle(outcome.hashes)
    if split is None:
        message = f"{where}: its pictures lie in two splits already; it would stand on both sides"
        tally.drop("refused", "split-between", message, spec.examples)
        return None
    record = replace(record, split=split)
    ids.add(record.id)
    tally.kept[f"{record.task}/{record.split}"] += 1
    return record


def _remembered(spec: ImportSpec, journal: Journal) -> tuple[DuplicateFinder | None, set[str], StreamedSplits]:
    """Ids, perceptual hashes and splits of the shards that are done."""
    splits = StreamedSplits()
    finder = None if spec.duplicates is None else DuplicateFinder(spec.duplicates)
    ids: set[str] = set()
    for name in journal.shards:
        table = pq.read_table(journal.folder / name, columns=["id", "prompt", "provenance", "split"])
        for row in table.to_pylist():
            ids.add(row["id"])
            hashes = tuple(int(value, 16) for value in json.loads(row["provenance"])["hash"])
            splits.remember(hashes, row["split"])
            if finder is not None:
                finder.seen(hashes, row["prompt"] if len(hashes) > 1 else "", row["id"])
    return finder, ids, splits


def _converted(spec: ImportSpec, workers: int, files: list[InputFile], start: tuple[int, int]) -> Iterator[Outcome]:
    """Outcomes in the order of the rows; a few rows per worker are on their way at once."""
    rows = read_rows(spec, files, start)
    if workers == 1:
        for row in rows:
            yield convert(row, spec, files[row.file])
        return
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes and resizes without the interpreter's lock
        for row in rows:
            waiting.append(_submit(pool, row, spec, files))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _submit(pool: ThreadPoolExecutor, row: RawRow, spec: ImportSpec, files: list[InputFile]) -> Future:
    return pool.submit(convert, row, spec, files[row.file])
