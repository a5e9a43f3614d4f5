"""The student's own path from noise to its query state, and no step further."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.fields import VelocityField


@dataclass(frozen=True)
class Query:
    """Where the student asks.

    Attributes:
        state: (B, N, C), without gradient.
        sigma: (B,), the noise level of each state.
        forwards: how many samples went through the network on the way: the sum of `stop`.
    """

    state: Tensor
    sigma: Tensor
    forwards: int


@torch.no_grad()
def roll_out(field: VelocityField, noise: Tensor, grid: Tensor, stop: Tensor, condition: Condition) -> Query:
    """Euler steps of dz/dsigma = v along `grid`, each sample until its own `stop`; who has arrived leaves the batch.

    Args:
        field: the student.
        noise: (B, N, C), the state at grid[0].
        grid: (steps + 1,), falling.
        stop: (B,), int64 in [0, steps]: index of each sample's query state. 0 asks at the noise itself.
        condition: of the same B samples.
    """
    state = noise.clone()
    for step in range(int(stop.max())):
        index = (stop > step).nonzero().flatten().to(noise.device)
        sigma = grid[step].expand(len(index)).to(noise)
        velocity = field(state[index], sigma, condition.rows(index)).to(state.dtype)
        state[index] += (grid[step + 1] - grid[step]).to(state) * velocity
    return Query(state, grid[stop].to(noise), int(stop.sum()))
