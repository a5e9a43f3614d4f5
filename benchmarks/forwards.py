"""Transformer forwards per sample, counted by hooks on the network, against the formula of the method.

    python -m benchmarks.forwards [--windows ...] [--batch 12] [--json PATH]

Ends with code 1 if a count differs from the formula.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps
from torch import Tensor, nn

from benchmarks.harness import Report, arguments, names, run_script
from benchmarks.plain import PlainLoop
from benchmarks.setting import SIZES, STEPS, Setting, make_setting
from danceopd.methods.base import Group, UpdateFigures
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.queries import NAMED, query_window

HOW = (
    "Samples that pass through the transformer's last block, per sample of the batch, counted by hooks on the network: "
    "rollout, teacher and student's forward pass; a backward pass, seen by a hook on the output, counts as two. The "
    "formula is (grid steps before the query) + 1 + 3, and + 4 with activation checkpointing. `expected` is its mean "
    "over the window on the 16-step grid: the small world's, which is even, and FLUX.2-klein's own at 1024 px, whose "
    "shift crowds the steps at high noise, so that even an early query comes late. The rest is one drawn batch on the "
    "small world's grid."
)
COLUMNS = [
    "window",
    "expected",
    "expected, 1024 px grid",
    "drawn: formula",
    "counted",
    "of it rollout",
    "checkpointing: formula",
    "checkpointing: counted",
    "plain loop: counted",
    "plain / engine",
]


@dataclass
class Passes:
    """Samples by kind of pass: `no gradient` (rollout and teacher), `update`, `recomputed`, `backward`."""

    samples: Counter = field(default_factory=Counter)

    @property
    def forwards(self) -> int:
        """All of them, a backward pass as two."""
        return sum(self.samples.values()) + self.samples["backward"]


@contextmanager
def counted(*networks: nn.Module) -> Iterator[Passes]:
    """Count what passes through the networks in the block."""
    passes = Passes()

    def before_block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if not torch.is_grad_enabled():
            kind = "no gradient"
        else:
            kind = "update" if torch._C._current_graph_task_id() == -1 else "recomputed"
        passes.samples[kind] += len(states)

    def after_network(module: nn.Module, args: tuple, output: tuple[Tensor]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: passes.samples.update(backward=len(gradient)))

    hooks = []
    for network in networks:
        block = network.single_transformer_blocks[-1]
        hooks += [
            block.register_forward_pre_hook(before_block, with_kwargs=True),
            network.register_forward_hook(after_network),
        ]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def engine_passes(setting: Setting, groups: list[Group]) -> Passes:
    """What one batch costs the engine."""
    with counted(setting.backbone.transformer) as passes:
        for group in groups:
            DanceOPD().accumulate(setting.distillation, setting.learner, group, UpdateFigures())
    setting.learner.optimizer.zero_grad()
    return passes


def count_window(setting: Setting, plain: PlainLoop, window: str, batch: int) -> tuple[list, bool]:
    """The table's row of one window, and whether every count is the planned one."""
    groups = setting.groups(window, batch, seed=1)
    network = setting.backbone.transformer
    before = sum(int(group.stop.sum()) for group in groups)
    ours = engine_passes(setting, groups)
    network.enable_gradient_checkpointing()
    recomputing = engine_passes(setting, groups)
    network.disable_gradient_checkpointing()
    with counted(*plain.networks) as theirs:
        plain.accumulate(groups)
    plain.optimizer.zero_grad()
    plan = [before + 4 * batch, before + 5 * batch, (STEPS + 4) * batch]
    exact = [ours.forwards, recomputing.forwards, theirs.forwards] == plan
    expected = [mean_steps(window, grid) + 4 for grid in (setting.grid, klein_grid(1024))]
    row = [
        window,
        *expected,
        plan[0] / batch,
        ours.forwards / batch,
        ours.samples["no gradient"] / batch - 1,
        plan[1] / batch,
        recomputing.forwards / batch,
        theirs.forwards / batch,
        theirs.forwards / ours.forwards,
    ]
    return row, exact


def mean_steps(window: str, grid: Tensor) -> float:
    """Grid steps before a query, in the mean over the window."""
    draws = query_window(window).draw(100_000, grid, torch.Generator().manual_seed(0))
    return float(draws.double().mean())


def klein_grid(pixels: int) -> Tensor:
    """FLUX.2-klein's own sampling grid for a square picture: 16 of its pixels make a token's side."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    shift = compute_empirical_mu((pixels // 16) ** 2, STEPS)
    retrieve_timesteps(scheduler, STEPS, "cpu", sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=shift)
    return scheduler.sigmas


def measure(options: argparse.Namespace) -> list[Report]:
    setting = make_setting(SIZES["nano"])
    plain = PlainLoop(setting)
    found = [count_window(setting, plain, window, options.batch) for window in options.windows]
    rows, wrong = [row for row, _ in found], [row[0] for row, exact in found if not exact]
    notes = [f"MISSED: counts differ from the formula for {', '.join(wrong)}." if wrong else "All counts are exact."]
    return [
        Report("forwards", "Forwards a sample against the formula", HOW, COLUMNS, rows, notes=notes, exact=not wrong)
    ]


def parser(counted: str = "forwards per sample") -> argparse.ArgumentParser:
    parser = arguments(f"{counted}, counted on the network, against the formula")
    parser.add_argument("--windows", type=names(list(NAMED)), default=list(NAMED))
    parser.add_argument("--batch", type=int, default=12, help="samples; the count does not depend on it")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
