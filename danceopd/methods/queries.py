"""Query windows: where on its own path the student asks its teacher.

A window is a distribution over the noise level sigma (1 = noise, 0 = clean), not over step numbers: on a shifted grid
the same step has another noise level, and what a teacher has to say depends on the noise. Each sample has a draw of its
own, which is then moved to the nearest state that the grid visits. Others are over the grid's steps instead, as
the paper's release draws (arXiv 2606.27377, `sample_query_indices`): for its published settings, for grids that crowd
their steps at high noise, where an early noise level comes late on the path, and for grids of few steps.

Names. `semantic` here is the early, high-noise part of the path, where layout and meaning are decided. The paper and
its release give the name "semantic" to the low-noise query instead; here that one is `low_noise`, or `late_steps` for
the release's own draw over steps.

The release draws one route per optimizer step; here every sample of a batch has its own route and its own query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.errors import UserError, unknown_name

# Beta(a, b) over sigma. `semantic`: the early, high-noise part, where layout and meaning are decided.
# `low_noise`: the late part.
NAMED = {"semantic": (5.0, 2.0), "mid": (4.0, 4.0), "low_noise": (2.0, 5.0), "uniform": (1.0, 1.0)}
# Beta(a, b) over the share of the steps that are done: the release's `high_t` and `low_t`; and every step alike, for
# students of few steps, each of which is an answer to be learned.
BY_STEP = {"early_steps": (2.0, 5.0), "late_steps": (5.0, 2.0), "every_step": (1.0, 1.0)}


@dataclass(frozen=True)
class QueryWindow:
    """Beta(a, b), stretched over [low, high] in sigma; or over the steps of the path, from its first to its last."""

    a: float
    b: float
    low: float = 0.0
    high: float = 1.0
    by_step: bool = False

    def draw(self, count: int, grid: Tensor, generator: torch.Generator) -> Tensor:
        """Draw query states.

        Args:
            count: how many.
            grid: the sampling grid (steps + 1,), falling to 0; its last entry is never queried, since no sampler
                asks for a velocity there.
            generator: the source of randomness, on the CPU.

        Returns:
            Indices into the grid, (count,), int64, in [0, steps - 1].
        """
        shares = torch.tensor([self.a, self.b], dtype=torch.float64).expand(count, 2)
        gammas = torch._standard_gamma(shares, generator=generator)
        share = gammas[:, 0] / gammas.sum(dim=1)
        if self.by_step:
            states = len(grid) - 1
            return (share * states).long().clamp(max=states - 1)
        sigma = self.low + (self.high - self.low) * share
        return (sigma[:, None] - grid[None, :-1].double()).abs().argmin(dim=1)


def query_window(spec: str | tuple[float, float] | list[float]) -> QueryWindow:
    """A window by name (in `NAMED`, over sigma, or `BY_STEP`, over the steps) or by range `[sigma_lo, sigma_hi]`.

    Raises:
        UserError: for an unknown name or a range that is not 0 <= lo < hi <= 1.
    """
    if isinstance(spec, str):
        if spec in BY_STEP:
            return QueryWindow(*BY_STEP[spec], by_step=True)
        if spec not in NAMED:
            raise unknown_name("query window", spec, (*NAMED, *BY_STEP))
        return QueryWindow(*NAMED[spec])
    if len(spec) != 2 or not 0 <= spec[0] < spec[1] <= 1:
        raise UserError(f"query window {list(spec)}: write [sigma_lo, sigma_hi] with 0 <= sigma_lo < sigma_hi <= 1")
    return QueryWindow(1.0, 1.0, *spec)


@dataclass(frozen=True)
class WindowSchedule:
    """Query windows over training: each holds until its share of the steps is done.

    Attributes:
        phases: (share of the steps, window), shares rising to 1.
    """

    phases: tuple[tuple[float, QueryWindow], ...]

    def at(self, step: int, steps: int) -> QueryWindow:
        """The window of update `step`, in [0, steps - 1]."""
        return next(window for until, window in self.phases if step < until * steps or until == 1)
