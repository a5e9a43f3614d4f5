"""Transformer forwards per sample with `target: displacement` on a grid of few steps, counted by hooks on the network.

    python -m benchmarks.displacement [--windows ...] [--batch 12] [--json PATH]

Ends with code 1 if a count differs from the formula.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from benchmarks.forwards import engine_passes, parser
from benchmarks.harness import Report, run_script
from benchmarks.setting import SIZES, STEPS, Setting, make_setting
from danceopd.flow.displacement import SmallSteps

HOW = (
    "Samples that pass through the transformer's last block, per sample of the batch, as in `forwards.py`. The formula "
    "is (grid steps before the query) + (the teacher's small steps over the student's next interval) + 3. Beside it "
    f"what a student of velocities takes on a grid of {STEPS} steps."
)
COLUMNS = [
    "window",
    "rollout steps",
    "small steps",
    "drawn: formula",
    "counted",
    "of it rollout and teacher",
    "velocity, 16 steps",
    "velocity / displacement",
]
TARGETS = {"4 euler": SmallSteps(4), "2 heun": SmallSteps(2, "heun")}
GRIDS = ((4, "4 euler"), (4, "2 heun"), (8, "2 heun"))


def count(setting: Setting, window: str, steps: int, target: str, batch: int) -> tuple[list, bool]:
    """The table's row of one window, grid and target, and whether the count is the planned one."""
    how, usual = TARGETS[target], setting.groups(window, batch, seed=1)
    few = replace(setting, distillation=replace(setting.distillation, rollout_steps=steps, target=how))
    groups = few.groups(window, batch, seed=1)
    found = engine_passes(few, groups)
    plan = sum(int(g.stop.sum()) + int(how.asked(g.levels[g.stop[:, 0]]).sum()) for g in groups) + 3 * batch
    velocity = sum(int(group.stop.sum()) for group in usual) + 4 * batch
    counts = [plan / batch, found.forwards / batch, found.samples["no gradient"] / batch, velocity / batch]
    return [window, steps, target, *counts, velocity / found.forwards], found.forwards == plan


def measure(options: argparse.Namespace) -> list[Report]:
    setting = make_setting(SIZES["nano"])
    found = [count(setting, window, *grid, options.batch) for window in options.windows for grid in GRIDS]
    exact = all(right for _, right in found)
    notes = ["All counts are exact." if exact else "MISSED: a count differs from the formula."]
    title = "Forwards a sample of a student of few steps"
    return [Report("displacement", title, HOW, COLUMNS, [row for row, _ in found], notes=notes, exact=exact)]


def main(argv: list[str] | None = None) -> int:
    return run_script(parser("forwards per sample of a displacement"), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
