"""All CPU benchmarks in one run, as one Markdown block for RESULTS.md: python -m benchmarks [--json PATH]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import checkpoints, displacement, engine, forwards, rollout
from benchmarks.harness import Report, arguments, names, run_script
from benchmarks.setting import SIZES


def measure(options: argparse.Namespace) -> list[Report]:
    reports: list[Report] = []
    small = [size for size in options.sizes if size != "large"] or options.sizes
    for script in (engine, forwards, displacement, rollout, checkpoints):
        print(f"benchmarks: {script.__name__.rpartition('.')[2]} ...", file=sys.stderr)
        chosen = script.parser().parse_args([])
        if hasattr(chosen, "sizes"):
            chosen.sizes = options.sizes if script is engine else small
        if script is engine:
            chosen.reference = options.reference
        reports += script.measure(chosen)
    return reports


def parser() -> argparse.ArgumentParser:
    parser = arguments("all CPU benchmarks")
    parser.add_argument("--sizes", type=names(list(SIZES)), default=["tiny", "mid", "large"])
    parser.add_argument(
        "--reference", type=Path, metavar="PATH", help="a checkout of the authors' release to measure too"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
