"""Importing OmniEdit's layout: memory that does not grow with the rows, and a kill -9 that costs nothing but time.

python -m benchmarks.importing [--rows 10000] [--workers 1] [--json PATH]
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.harness import Bar, Report, arguments, run_script
from danceopd.data.importers.run import JOURNAL
from danceopd.errors import UserError
from danceopd.files import read_json

KINDS = ("swap", "removal", "addition", "attribute_modification", "style", "env")
FILE_ROWS, GROUP_ROWS = 1000, 100
HOW = (
    "Synthetic rows in OmniEdit's layout (Parquet files of {file_rows} rows, row groups of {group_rows}; source and "
    "target JPEGs of {side} px, every twentieth row damaged), imported by `danceopd data import` in a process of its "
    "own with {workers} thread(s): decode, check, hash perceptually, resize to buckets, write PNG. Peak resident "
    "memory is polled every 20 ms. A tenth of the rows shows what the process needs anyway. The killed run is ended by "
    "SIGKILL once a third of its shards is done and started again; all shards must have the bytes of the run that was "
    "left alone."
)
COLUMNS = ["run", "rows", "read (MB)", "seconds", "rows/s", "peak memory (MiB)"]
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("omni_edit_id", pa.string()),
        ("task", pa.string()),
        ("src_img", _IMAGE),
        ("edited_img", _IMAGE),
        ("edited_prompt_list", pa.list_(pa.string())),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("sc_score_1", pa.int64()),
        ("sc_score_2", pa.int64()),
        ("pq_score", pa.int64()),
        ("o_score", pa.float64()),
        ("sc_reasoning", pa.string()),
        ("pq_reasoning", pa.string()),
    ]
)


def picture_pair(rng: np.random.Generator, side: int) -> tuple[bytes, bytes]:
    """A smooth random picture and the same with one rectangle changed, as JPEG bytes."""
    height, width = (side, side * 4 // 3) if rng.random() < 0.5 else (side, side)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    source = coarse.resize((width, height), Image.Resampling.BICUBIC)
    target = source.copy()
    left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    target.paste(colour, (left, top, left + width // 3, top + height // 3))
    return _jpeg(source), _jpeg(target)


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def omniedit_row(number: int, side: int = 256, seed: int = 0) -> dict:
    """One sound row in OmniEdit's layout; the same for the same number."""
    rng = np.random.default_rng((seed, number))
    source, target = picture_pair(rng, side)
    kind = KINDS[number % len(KINDS)]
    width, height = Image.open(io.BytesIO(source)).size
    return {
        "omni_edit_id": f"task_{kind}_{number}",
        "task": kind,
        "src_img": {"bytes": source, "path": None},
        "edited_img": {"bytes": target, "path": None},
        "edited_prompt_list": [f"change {number}", f"edit {number}"],
        "width": width,
        "height": height,
        "sc_score_1": 9,
        "sc_score_2": 8,
        "pq_score": 7,
        "o_score": float(np.sqrt(8 * 7)),
        "sc_reasoning": "",
        "pq_reasoning": "",
    }


def write_omniedit(folder: Path, rows: int, side: int = 256, file_rows: int = FILE_ROWS, damage: int = 20) -> int:
    """Write files of rows, every `damage`-th with a target cut short; returns the bytes written."""
    folder.mkdir(parents=True)
    files = -(-rows // file_rows)
    for file in range(files):
        path = folder / f"train-{file:05d}-of-{files:05d}.parquet"
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for first in range(file * file_rows, min(rows, (file + 1) * file_rows), GROUP_ROWS):
                last = min(first + GROUP_ROWS, rows, (file + 1) * file_rows)
                batch = [omniedit_row(number, side) for number in range(first, last)]
                for row in batch[damage - 1 :: damage]:
                    row["edited_img"]["bytes"] = row["edited_img"]["bytes"][: len(row["edited_img"]["bytes"]) // 2]
                writer.write_table(pa.Table.from_pylist(batch, schema=SCHEMA))
    return sum(path.stat().st_size for path in folder.iterdir())


def start_import(source: Path, out: Path, workers: int, side: int) -> subprocess.Popen:
    """`danceopd data import` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "danceopd",
        "data",
        "import",
        "omniedit",
        str(source),
        "--out",
        str(out),
        "--workers",
        str(workers),
        "--set",
        f"resize.area={side * side}",
        "--set",
        "resize.step=16",
        "--set",
        "shard_rows=250",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def watched(process: subprocess.Popen, kill_when=None) -> tuple[float, float, bool]:
    """Wait for a process: seconds, peak memory in MiB, whether it was killed on the way."""
    started, peak, killed = time.perf_counter(), 0, False
    handle = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, handle.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        if kill_when is not None and kill_when():
            os.kill(process.pid, signal.SIGKILL)
            killed = True
            break
        time.sleep(0.02)
    process.wait()
    if process.returncode and not killed:
        raise UserError(f"the import failed: {process.stderr.read()[-500:]}")
    return time.perf_counter() - started, peak / 2**20, killed


def measure(options: argparse.Namespace) -> list[Report]:
    rows, workers, side = options.rows, options.workers, options.side
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        size = {
            name: write_omniedit(home / name, count, side) for name, count in (("tenth", rows // 10), ("all", rows))
        }
        table, peaks = [], {}
        for name, count in (("tenth", rows // 10), ("all", rows)):
            seconds, peaks[name], _ = watched(start_import(home / name, home / f"{name}-out", workers, side))
            table.append([name, count, size[name] / 1e6, seconds, count / seconds, peaks[name]])
        journal = home / "killed-out.partial" / JOURNAL
        shards = len(read_json(home / "all-out" / "import.json")["files"])
        enough = lambda: journal.is_file() and journal.read_bytes().count(b"\n") > shards // 3  # noqa: E731
        first, peak, killed = watched(start_import(home / "all", home / "killed-out", workers, side), enough)
        table.append(["until the kill", "", size["all"] / 1e6, first, "", peak])
        second, peak, _ = watched(start_import(home / "all", home / "killed-out", workers, side))
        table.append(["gone on with", "", size["all"] / 1e6, second, "", peak])
        reports = [read_json(home / f"{name}-out" / "import.json") for name in ("all", "killed")]
        same = killed and reports[0] == reports[1]
    refused = sum(entry["count"] for entry in reports[0]["dropped"].get("refused", {}).values())
    return [
        Report(
            name="importing",
            title="Importing a data set",
            how=HOW.format(file_rows=FILE_ROWS, group_rows=GROUP_ROWS, side=side, workers=workers),
            columns=COLUMNS,
            rows=table,
            bars=[Bar("peak memory, all rows / a tenth of them", peaks["all"] / peaks["tenth"], 1.25, at_least=False)],
            notes=[
                f"{reports[0]['kept']} rows kept, {refused} refused by name; after the kill: "
                + ("the same shards, byte for byte" if same else "OTHER SHARDS")
            ],
            exact=same,
        )
    ]


def parser() -> argparse.ArgumentParser:
    parser = arguments("importing a data set in OmniEdit's layout")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=256, help="pixels of a picture's shorter side")
    parser.add_argument("--workers", type=int, default=1)
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
