"""A million records: their columns, splits, sampler, cached encodings and a start of training, in time and memory.

python -m benchmarks.million [--records 1000000] [--ranks 1,2] [--folder PATH] [--json PATH]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import torch

from benchmarks.harness import Bar, Report, arguments, run_script
from danceopd.backbones.base import Backbone
from danceopd.data.assemble import open_dataset
from danceopd.data.cache import EncodingCache
from danceopd.data.columns import hex_names, key_of, with_places, write_columns
from danceopd.data.encode import MOST_ROWS, encode_cached, picture_group, prompt_group, wanted_by
from danceopd.data.encoded import Sizing
from danceopd.data.png import encode_png
from danceopd.data.records import MANIFEST, SHARD_ROWS, SPLITS, UNDECIDED, Record, write_shard
from danceopd.data.sampler import TaskSampler
from danceopd.data.splits import settle_splits
from danceopd.files import write_json

TASKS = ("draw", "edit")
SIDE, ROW, BATCH, BATCHES = 8, (4, 8), 64, 20
ENCODERS = "benchmark"
COLUMNS_MADE = ("id", "task", "split", "prompt", "prompt_key", "source_key", "target_key", "height", "width", "bytes")
MOST_SECONDS, MOST_GB = 60.0, 4.0
HOW = (
    "Generated records, half of them drawn and half edits of a source that two of them share, with distinct prompts "
    f"and pictures of {SIDE} x {SIDE} pixels, and encodings of {ROW[0]} x {ROW[1]} numbers in bfloat16. Each row is a "
    "process of its own (several ranks: at once), its imports counted in the memory (peak of the resident set, mapped "
    "files included) and not in the time. A start of training opens the dataset, tells from its columns what it wants, "
    "finds all of it in the cache, groups the rows by shape, and reads the conditions of some batches that the sampler "
    "draws; it loads no model."
)
COLUMNS = ["what", "ranks", "seconds", "of it CPU", "peak GB a rank"]


class Idle:
    """A back end that is asked for nothing: everything was encoded before."""

    prompt_sees_source = False


BACKBONE = cast(Backbone, Idle())
SIZING = Sizing(SIDE, SIDE)


# ------------------------------------------------------------------------------------------------------- the data


def records(count: int) -> Iterator[Record]:
    """`count` records without a split: pictures differ in what stands behind their end, which no reader looks at."""
    picture = encode_png(np.zeros((SIDE, SIDE, 3), np.uint8))
    for number in range(count):
        edit = number % 2 == 1
        source = picture + b"source %d" % (number // 4) if edit else None
        prompt = f"{TASKS[edit]} picture number {number}"
        yield Record(f"{number:09d}", TASKS[edit], prompt, source, picture + b"target %d" % number, UNDECIDED)


def make_dataset(folder: Path, count: int) -> None:
    """The records as a dataset folder, all of one split."""
    folder.mkdir(parents=True)
    files: dict[str, dict] = {}
    shard: list[Record] = []
    whole = -(-count // SHARD_ROWS)

    def write() -> None:
        name = f"train-{len(files):05d}-of-{whole:05d}.parquet"
        write_shard(shard, folder / name)
        files[name] = {"sha256": "", "rows": len(shard)}
        shard.clear()

    def passed_on() -> Iterator[Record]:
        for record in records(count):
            record = Record(**{**vars(record), "split": "train"})
            shard.append(record)
            yield record
            if len(shard) == SHARD_ROWS:
                write()

    columns = with_places(_columns(passed_on()), list(_cut(count, whole)))
    if shard:
        write()
    content = hashlib.sha256(str(count).encode()).hexdigest()
    counts = Counter(columns["task"].to_pylist())
    table = {task: {split: counts[task] if split == "train" else 0 for split in SPLITS} for task in TASKS}
    write_json(folder / MANIFEST, {"content": content, "counts": table, "files": files, "schema": 1})
    write_columns(columns, folder, content)


def _columns(made: Iterator[Record]) -> dict[str, list]:
    """What `columns_of` finds, without a look into the pictures, whose size is known here."""
    found: dict[str, list] = {name: [] for name in COLUMNS_MADE}
    for record in made:
        pictures = (record.source, record.target)
        keys = (key_of(record.prompt), *(None if p is None else key_of(p) for p in pictures))
        size = sum(len(p) for p in pictures if p is not None)
        values = (record.id, record.task, record.split, record.prompt, *keys, SIDE, SIDE, size)
        for name, value in zip(COLUMNS_MADE, values, strict=True):
            found[name].append(value)
    return found


def _cut(count: int, shards: int) -> Iterator[tuple[str, int]]:
    for number in range(shards):
        yield f"train-{number:05d}-of-{shards:05d}.parquet", min(SHARD_ROWS, count - number * SHARD_ROWS)


def make_cache(folder: Path, dataset: Path) -> None:
    """Encodings of everything the records need, of drawn numbers."""
    cache = EncodingCache(folder, torch.bfloat16)
    wanted = wanted_by(BACKBONE, open_dataset(dataset).table("train", TASKS), True, SIZING)
    generator = torch.Generator().manual_seed(0)
    groups = (prompt_group(BACKBONE, SIZING, cache, ENCODERS), picture_group(cache, ENCODERS, (SIDE, SIDE)))
    for group, keys in zip(groups, (wanted.prompts, wanted.pictures), strict=True):
        for start in range(0, len(keys), MOST_ROWS):
            part = keys.slice(start, MOST_ROWS).to_pylist()
            cache.write(group, part, list(torch.randn(len(part), *ROW, generator=generator)))
    cache.write_index()


# -------------------------------------------------------------------------------------------------- what is measured


def read_columns(folder: Path) -> int:
    """The dataset's columns, and counts by task: how many records there are."""
    columns = open_dataset(folder / "data").columns()
    return sum(Counter(columns["task"].to_pylist()).values())


def split_records(folder: Path) -> int:
    """Settle the splits of records that name none, by groups that share a picture."""
    columns = open_dataset(folder / "data").columns()
    pictures = [hex_names(columns[name].to_pylist()) for name in ("source_key", "target_key")]
    bare = [Record(id_, "", "", None, None, UNDECIDED) for id_ in columns["id"].to_pylist()]
    return len(settle_splits(bare, list(zip(*pictures, strict=True))))


def start_training(folder: Path, share: tuple[int, int]) -> int:
    """Everything a rank does with its data up to its first batches; how many samples it has read."""
    table = open_dataset(folder / "data").table("train", TASKS)
    cache = EncodingCache(folder / "cache", torch.bfloat16)
    encoded = encode_cached(BACKBONE, table, SIZING, cache, ENCODERS, True, share)
    groups = encoded.shape_groups(list(range(len(encoded.tasks))))
    sampler = TaskSampler(encoded.rows_by_task(), seed=0)
    samples = 0
    for _ in range(BATCHES):
        rows, _ = sampler.draw(dict.fromkeys(TASKS, BATCH // 2))
        for positions in encoded.shape_groups(rows):
            picked = [rows[position] for position in positions]
            samples += len(encoded.condition(picked)) if len(encoded.target(picked)) == len(picked) else 0
    return samples if len(groups) == len(TASKS) else 0


def timed(work: Callable[[], int]) -> tuple[list[float], int]:
    """Seconds, CPU seconds and this process's peak in GB; and what came of it."""
    torch.set_num_threads(1)
    started, busy = time.monotonic(), time.process_time()
    result = work()
    spent = [time.monotonic() - started, time.process_time() - busy]
    return [*spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6], result


def at_once(works: list[Callable[[], int]]) -> tuple[list[float], list[int]]:
    """The most time, CPU time and memory of some works, each in a process of its own, at once."""
    with ProcessPoolExecutor(len(works), multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(timed, works))
    return [max(figures) for figures in zip(*(f[0] for f in found), strict=True)], [f[1] for f in found]


def measure_in(folder: Path, count: int, ranks: list[int]) -> Report:
    """The report, over a folder that is empty or holds this benchmark's data of so many records."""
    data, cached = folder / "data", folder / "cache"
    made = []
    for name, place, make in (("dataset", data, lambda: make_dataset(data, count)), ("cache", cached, None)):
        started = time.monotonic()
        if not place.exists():
            make() if make is not None else make_cache(cached, data)
            made.append(f"{name} made in {time.monotonic() - started:.0f} s")
    rows: list[list] = []
    wrong = 0
    for what, work in (
        ("columns", functools.partial(read_columns, folder)),
        ("split", functools.partial(split_records, folder)),
    ):
        figures, result = at_once([work])
        wrong += result != [count]
        rows.append([what, 1, *figures])
    for number in ranks:
        works = [functools.partial(start_training, folder, (rank, number)) for rank in range(number)]
        figures, result = at_once(works)
        wrong += result != [BATCHES * BATCH] * number
        rows.append(["start of training", number, *figures])
    starts = [row for row in rows if row[0] == "start of training"]
    bars = [
        Bar("columns, split and a start of training, seconds", sum(r[2] for r in rows[:3]), MOST_SECONDS, False),
        Bar("peak of any process, GB", max(row[-1] for row in rows), MOST_GB, False),
        Bar("a rank's peak among several to that of one alone", max(r[-1] for r in starts) / starts[0][-1], 1.1, False),
    ]
    shards = len(list(cached.rglob("*.safetensors")))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
    index = pa.ipc.open_file(pa.memory_map(str(cached / "index.arrow"))).read_all().num_rows
    notes = [f"{count:,} records, {index:,} encodings in {shards:,} files; {size:.2f} GB in all; " + "; ".join(made)]
    title = f"{count:,} records up to the first batches"
    return Report("million", title, HOW, COLUMNS, rows, bars, notes, exact=not wrong)


def measure(options: argparse.Namespace) -> list[Report]:
    if options.folder is not None:
        return [measure_in(options.folder, options.records, options.ranks)]
    with tempfile.TemporaryDirectory(prefix="million-") as scratch:
        return [measure_in(Path(scratch), options.records, options.ranks)]


def parser() -> argparse.ArgumentParser:
    parser = arguments("many records: columns, splits, cache and a start of training")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--folder", type=Path, help="keep dataset and cache there, for another run; default: nowhere")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
