"""The student's way to its query state: ways to batch it, each against the whole grid for the whole batch.

python -m benchmarks.rollout [--sizes tiny,mid] [--windows ...] [--json PATH]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness import Report, arguments, in_turns, names, paired_ratio, run_script
from benchmarks.setting import SIZES, STEPS, Setting, make_setting
from danceopd.backbones.base import Condition
from danceopd.flow.rollout import roll_out
from danceopd.methods.queries import NAMED

BATCH = 16
ROUNDS = 3
STRIDE = 4
HOW = (
    f"One rollout of {BATCH} samples with a source image from noise on the 16-step grid by the LoRA student, without "
    "gradient, in milliseconds per sample, and how many times faster than the whole grid for the whole batch (median "
    "over rounds in turns). `to the furthest`: all walk together until the last query. `leaving`: who has arrived "
    "leaves the batch, the engine's way. `4 groups`: sorted by query, each group of 4 walks until its own last query. "
    f"`one by one`: each alone to its query. `strides`: leaving, and {STRIDE} grid steps at a time (`rollout_stride`)."
)
COLUMNS = ["transformer", "window", "way", "forwards per sample", "ms per sample", "times faster than whole grid"]


@dataclass(frozen=True)
class Walk:
    """One batch that sets out."""

    setting: Setting
    noise: Tensor
    stop: Tensor
    condition: Condition

    def part(self, index: Tensor, stop: Tensor, stride: int = 1) -> int:
        """Roll some samples out to `stop`; returns the forwards spent."""
        field, grid = self.setting.learner.field, self.setting.grid
        return roll_out(field, self.noise[index], grid, stop, self.condition.rows(index), stride).forwards

    def whole_grid(self) -> int:
        everyone = torch.arange(len(self.stop))
        return self.part(everyone, torch.full_like(self.stop, STEPS))

    def to_the_furthest(self) -> int:
        everyone = torch.arange(len(self.stop))
        return self.part(everyone, torch.full_like(self.stop, int(self.stop.max())))

    def leaving(self) -> int:
        return self.part(torch.arange(len(self.stop)), self.stop)

    def in_strides(self) -> int:
        return self.part(torch.arange(len(self.stop)), self.stop, STRIDE)

    def in_groups(self) -> int:
        parts = self.stop.argsort().chunk(4)
        return sum(self.part(part, torch.full_like(part, int(self.stop[part].max()))) for part in parts)

    def one_by_one(self) -> int:
        return sum(self.part(torch.tensor([i]), self.stop[i : i + 1]) for i in range(len(self.stop)))


def start(setting: Setting, window: str, seed: int) -> Walk:
    """The samples with a source of one drawn batch, `BATCH` of them."""
    group = next(g for g in setting.groups(window, 2 * BATCH, seed) if g.condition.source is not None)
    first = torch.arange(BATCH)
    return Walk(setting, group.noise[first], group.stop[first, 0], group.condition.rows(first))


WAYS: dict[str, Callable[[Walk], int]] = {
    "whole grid": Walk.whole_grid,
    "to the furthest": Walk.to_the_furthest,
    "leaving": Walk.leaving,
    "4 groups": Walk.in_groups,
    "one by one": Walk.one_by_one,
    "strides": Walk.in_strides,
}


def measure_size(name: str, windows: list[str]) -> list[list]:
    """The table's rows of one size."""
    setting = make_setting(SIZES[name])
    rows = []
    for window in windows:
        walks = [start(setting, window, seed) for seed in range(ROUNDS + 1)]
        walks[0] = replace(walks[0], stop=walks[0].stop.clamp(max=1))  # only warms up
        spent: dict[str, list[int]] = {way: [] for way in WAYS}

        def run(way: str, number: int, walks=walks, spent=spent) -> None:
            spent[way].append(WAYS[way](walks[number]))

        contenders = {way: lambda number, way=way: run(way, number) for way in WAYS}
        seconds = in_turns(contenders, dict.fromkeys(WAYS, ROUNDS))
        for way in WAYS:
            forwards = statistics.mean(spent[way][1:]) / BATCH
            milliseconds = 1000 * statistics.median(seconds[way]) / BATCH
            rows.append([name, window, way, forwards, milliseconds, paired_ratio(seconds["whole grid"], seconds[way])])
    return rows


def measure(options: argparse.Namespace) -> list[Report]:
    rows = [row for name in options.sizes for row in measure_size(name, options.windows)]
    return [Report("rollout", "Rollout: stopping at the query, leaving the batch", HOW, COLUMNS, rows)]


def parser() -> argparse.ArgumentParser:
    parser = arguments("rollout: stopping at the query and leaving the batch against the whole grid")
    parser.add_argument("--sizes", type=names(list(SIZES)), default=["tiny", "mid"])
    parser.add_argument("--windows", type=names(list(NAMED)), default=["semantic", "low_noise"])
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
