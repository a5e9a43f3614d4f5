"""A field's mean velocity over one interval of a sampling grid, taken by small steps of its own from a given state.

With z the state at noise level s and t the interval's end, the field's own ODE dz/dsigma = v leads from z to z_end,
and the mean velocity is u = (z_end - z) / (t - s). A student that answers u at z goes in one Euler step where the field
goes in many. As the interval shrinks, u is the velocity itself, and with one Euler step it is v(z, s) to the bit.

What it resembles: progressive distillation (Salimans & Ho, arXiv 2202.00512) and PeRFlow (arXiv 2405.07510), whose
targets are also what a teacher's small steps reach within an interval, but from noised data; MeanFlow (arXiv
2505.13447), which calls u the average velocity and trains it without a teacher; pi-Flow (arXiv 2510.14974), which
imitates a teacher's small steps along the student's own path, but by a network that answers with a policy. Here the
state is where the student's own path has come, as imitation learning asks (DAgger, arXiv 1011.0686).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.flow.fields import Field
from danceopd.flow.guidance import Branch

Solver = Literal["euler", "heun"]


@dataclass(frozen=True)
class SmallSteps:
    """How an interval is crossed. One Euler step asks for the velocity at the interval's start and nothing else.

    Attributes:
        count: small steps per interval, at least 1.
        solver: `euler`, or `heun`: the mean of the velocities at a step's both ends, at twice the price. A step that
            ends at sigma 0 is Euler's, as in EDM's sampler (arXiv 2206.00364, algorithm 1): no sampler asks there.
    """

    count: int = 1
    solver: Solver = "euler"

    def levels(self, grid: Tensor, fine: Tensor) -> Tensor:
        """The noise levels of each interval's small steps, (S, count + 1), falling along the row.

        They are spaced as the family spaces its steps: the levels of its grid of S * count steps, moved and stretched
        so that each interval starts and ends exactly where the coarse grid's does.

        Args:
            grid: the coarse sampling grid (S + 1,), falling to 0.
            fine: the family's grid of S * count steps, (S * count + 1,).
        """
        start, end = grid[:-1, None], grid[1:, None]
        rows = fine.unfold(0, self.count + 1, self.count)
        share = (rows - rows[:, -1:]) / (rows[:, :1] - rows[:, -1:])
        levels = end + share * (start - end)
        return torch.cat([start, levels[:, 1:-1], end], dim=1)

    def asked(self, levels: Tensor) -> Tensor:
        """How often a field is asked to cross intervals with these levels (B, count + 1): (B,), int64."""
        if self.solver == "euler":
            return torch.full((len(levels),), self.count)
        return 2 * self.count - (levels[:, -1] == 0).long()


VELOCITY = SmallSteps()


Asked = Field | Branch


def forwards_of(asked: Asked, times: int) -> int:
    """Network passes of one sample whose interval takes `times` questions.

    Of a branch the guided field is needed too, to follow it, but for the last question, which leads nowhere.
    """
    if isinstance(asked, Branch):
        return (times - 1) * asked.guided.forwards + asked.forwards
    return times * asked.forwards


@torch.no_grad()
def average_velocity(asked: Asked, z: Tensor, levels: Tensor, condition: Condition, how: SmallSteps) -> Tensor:
    """The mean velocity u (B, N, C) of a field from `z` over each sample's interval, in the dtype of `z`.

    The velocities are averaged as they come, in float32; no small difference of states is divided. Of a branch its own
    side is averaged, along the path of the guided field.

    Args:
        asked: the field, which is asked `how.asked(levels)` times a sample; or a branch of a guided one.
        z: states (B, N, C), each at its interval's start.
        levels: noise levels of the small steps, (B, count + 1), on the device of `z`; all end at sigma 0, or none does.
        condition: of the same B samples.
        how: number of steps and solver.
    """
    total = torch.zeros(z.shape, dtype=torch.float32, device=z.device)
    whole = levels[:, 0] - levels[:, -1]
    ends = bool((levels[:, -1] == 0).any())
    with asked.resident():
        for step in range(how.count):
            here, there, last = levels[:, step], levels[:, step + 1], step == how.count - 1
            width = (here - there)[:, None, None]
            looks_ahead = how.solver == "heun" and not (last and ends)
            velocity, way = _ask(asked, z, here, condition, looks_ahead or not last)
            if looks_ahead:
                beyond = _ask(asked, (z - width * way).to(z.dtype), there, condition, not last)
                velocity, way = (velocity + beyond[0]) / 2, (way + beyond[1]) / 2
            total += width / whole[:, None, None] * velocity
            z = z if last else (z - width * way).to(z.dtype)
    return total.to(z.dtype)


def _ask(asked: Asked, z: Tensor, sigma: Tensor, condition: Condition, goes_on: bool) -> tuple[Tensor, Tensor]:
    """The velocity to average and the one to follow, float32."""
    if isinstance(asked, Branch):
        if goes_on:
            return asked.both(z, sigma, condition)
        velocity = asked.alone(z, sigma, condition).float()
    else:
        velocity = asked(z, sigma, condition).float()
    return velocity, velocity
