"""The student's own path from noise to its query state, and no step further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from danceopd.backbones.base import Condition
from danceopd.flow.fields import Field

_ARRIVED = -1  # in a table of waypoints: nothing is left of a sample's way


@dataclass(frozen=True)
class Query:
    """Where the student asks.

    Attributes:
        state: (B, N, C), without gradient.
        sigma: (B,), the noise level of each state.
        forwards: how many samples went through the network on the way, for a guided field twice.
    """

    state: Tensor
    sigma: Tensor
    forwards: int


def waypoints(stops: Sequence[int], stride: int = 1) -> list[int]:
    """Where a sample is asked for a velocity or a state on its way along a grid: 0, its stops, and what lies between.

    Args:
        stops: indices on the grid, rising.
        stride: grid steps in one step of the rollout. What is left over when the way to a stop is divided by it is gone
            first.

    Returns:
        Indices, rising, from 0 to the last stop.
    """
    visited = [0]
    for stop in stops:
        way = stop - visited[-1]
        if way:
            visited += range(visited[-1] + (way % stride or stride), stop + 1, stride)
    return visited


def steps_on_the_way(stop: Tensor, stride: int = 1) -> int:
    """Rollout steps to the last of each sample's stops (B, K), over all samples: their forwards with a plain field."""
    return sum(len(waypoints(row, stride)) - 1 for row in stop.tolist())


def roll_out(field: Field, noise: Tensor, grid: Tensor, stop: Tensor, condition: Condition, stride: int = 1) -> Query:
    """Euler steps of dz/dsigma = v along `grid`, each sample until its own `stop`; what has arrived leaves the batch.

    Args:
        field: the student.
        noise: (B, N, C), the state at grid[0].
        grid: (steps + 1,), falling.
        stop: (B,), int64 in [0, steps]: index of each sample's query state. 0 asks at the noise itself.
        condition: of the same B samples.
        stride: grid steps in one step of the rollout, which still ends at `stop`.
    """
    states = states_on_the_way(field, noise, grid, stop[:, None], condition, stride)
    return Query(states[:, 0], grid[stop].to(noise), field.forwards * steps_on_the_way(stop[:, None], stride))


@torch.no_grad()
def states_on_the_way(
    field: Field, noise: Tensor, grid: Tensor, stop: Tensor, condition: Condition, stride: int = 1
) -> Tensor:
    """As `roll_out`, the states at K stops of each sample's path: (B, K, N, C), for one path's forwards.

    Args:
        field: the student.
        noise: (B, N, C), the state at grid[0].
        grid: (steps + 1,), falling.
        stop: (B, K), int64 in [0, steps], rising along K; a sample leaves the rollout at its last.
        condition: of the same B samples.
        stride: grid steps in one step of the rollout, which still meets every stop.
    """
    state = noise.clone()
    kept = noise.new_empty(*stop.shape, *noise.shape[1:])
    paths = [torch.tensor(waypoints(row, stride)) for row in stop.tolist()]
    places = pad_sequence(paths, batch_first=True, padding_value=_ARRIVED)
    for here, there in zip(places.T, [*places.T[1:], None], strict=True):
        sample, query = (found.to(noise.device) for found in (stop == here[:, None]).nonzero(as_tuple=True))
        kept[sample, query] = state[sample]
        if there is None:
            break
        going = (there != _ARRIVED).nonzero().flatten()
        index = going.to(noise.device)
        sigma, after = grid[here[going]], grid[there[going]]
        velocity = field(state[index], sigma.to(noise), condition.rows(index)).to(state.dtype)
        state[index] += (after - sigma).to(state)[:, None, None] * velocity
    return kept


@torch.no_grad()
def rollout_drift(
    own: Field, other: Field, noise: Tensor, grid: Tensor, stop: Tensor, condition: Condition, stride: int = 1
) -> float:
    """How far a field's query states are from where another one leads, as a share of the way from the noise.

    Args:
        own: the field.
        other: what would take its place.
        noise: (B, N, C), the state at grid[0].
        grid: (steps + 1,), falling.
        stop: (B,), int64: index of each sample's query state; those that ask at the noise do not count.
        condition: of the same B samples.
        stride: grid steps in one step of the rollout.

    Returns:
        The mean over samples; 0 where all ask at the noise.
    """
    there, instead = (roll_out(field, noise, grid, stop, condition, stride).state for field in (own, other))
    return _apart(there, instead, noise, stop)


@torch.no_grad()
def stride_drift(field: Field, noise: Tensor, grid: Tensor, stop: Tensor, condition: Condition, stride: int) -> float:
    """How far a rollout in strides ends from one step by step, as a share of the way from the noise.

    Args:
        field: the student.
        noise: (B, N, C), the state at grid[0].
        grid: (steps + 1,), falling.
        stop: (B,), int64: index of each sample's query state; those that ask at the noise do not count.
        condition: of the same B samples.
        stride: grid steps in one step of the rollout.

    Returns:
        The mean over samples; 0 where all ask at the noise.
    """
    there, instead = (roll_out(field, noise, grid, stop, condition, steps).state for steps in (1, stride))
    return _apart(there, instead, noise, stop)


def _apart(there: Tensor, instead: Tensor, noise: Tensor, stop: Tensor) -> float:
    moved = stop.to(noise.device) > 0
    if not bool(moved.any()):
        return 0.0
    way, apart = ((a - b)[moved].flatten(1).norm(dim=1) for a, b in ((there, noise), (instead, there)))
    return float((apart / way).mean())
