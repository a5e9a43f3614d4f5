"""The student's own path from noise to its query state, and no step further."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.flow.fields import Field


@dataclass(frozen=True)
class Query:
    """Where the student asks.

    Attributes:
        state: (B, N, C), without gradient.
        sigma: (B,), the noise level of each state.
        forwards: how many samples went through the network on the way: the sum of `stop`, for a guided field twice.
    """

    state: Tensor
    sigma: Tensor
    forwards: int


def roll_out(field: Field, noise: Tensor, grid: Tensor, stop: Tensor, condition: Condition) -> Query:
    """Euler steps of dz/dsigma = v along `grid`, each sample until its own `stop`; what has arrived leaves the batch.

    Args:
        field: the student.
        noise: (B, N, C), the state at grid[0].
        grid: (steps + 1,), falling.
        stop: (B,), int64 in [0, steps]: index of each sample's query state. 0 asks at the noise itself.
        condition: of the same B samples.
    """
    states = states_on_the_way(field, noise, grid, stop[:, None], condition)
    return Query(states[:, 0], grid[stop].to(noise), field.forwards * int(stop.sum()))


@torch.no_grad()
def states_on_the_way(field: Field, noise: Tensor, grid: Tensor, stop: Tensor, condition: Condition) -> Tensor:
    """As `roll_out`, the states at K stops of each sample's path: (B, K, N, C), for one path's forwards.

    Args:
        field: the student.
        noise: (B, N, C), the state at grid[0].
        grid: (steps + 1,), falling.
        stop: (B, K), int64 in [0, steps], rising along K; a sample leaves the rollout at its last.
        condition: of the same B samples.
    """
    state = noise.clone()
    kept = noise.new_empty(*stop.shape, *noise.shape[1:])
    final = stop[:, -1]
    for step in range(int(final.max()) + 1):
        sample, query = (places.to(noise.device) for places in (stop == step).nonzero(as_tuple=True))
        kept[sample, query] = state[sample]
        index = (final > step).nonzero().flatten().to(noise.device)
        if len(index):
            sigma = grid[step].expand(len(index)).to(noise)
            velocity = field(state[index], sigma, condition.rows(index)).to(state.dtype)
            state[index] += (grid[step + 1] - grid[step]).to(state) * velocity
    return kept


@torch.no_grad()
def rollout_drift(own: Field, other: Field, noise: Tensor, grid: Tensor, stop: Tensor, condition: Condition) -> float:
    """How far a field's query states are from where another one leads, as a share of the way from the noise.

    Args:
        own: the field.
        other: what would take its place.
        noise: (B, N, C), the state at grid[0].
        grid: (steps + 1,), falling.
        stop: (B,), int64: index of each sample's query state; those that ask at the noise do not count.
        condition: of the same B samples.

    Returns:
        The mean over samples; 0 where all ask at the noise.
    """
    moved = stop.to(noise.device) > 0
    if not bool(moved.any()):
        return 0.0
    there, instead = (roll_out(field, noise, grid, stop, condition).state[moved] for field in (own, other))
    way, apart = (there - noise[moved]).flatten(1).norm(dim=1), (instead - there).flatten(1).norm(dim=1)
    return float((apart / way).mean())
