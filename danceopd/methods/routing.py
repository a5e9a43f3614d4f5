"""Routing: which teacher each sample asks, and what each task weighs in a batch and in the loss."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.config.recipe import Weight
from danceopd.flow.displacement import Asked, SmallSteps, average_velocity, forwards_of
from danceopd.flow.fields import Field


@torch.no_grad()
def routed_velocity(
    fields: Mapping[str, Field], routes: list[str], z: Tensor, sigma: Tensor, condition: Condition
) -> Tensor:
    """Each sample's velocity from its own teacher, one forward pass per teacher. Never a mean of teachers.

    Args:
        fields: teachers by name.
        routes: the teacher's name of each sample, length B.
        z: states (B, N, C).
        sigma: noise levels (B,).
        condition: of the same B samples.
    """
    velocity = torch.empty_like(z)
    for name in sorted(set(routes)):
        index = torch.tensor([i for i, route in enumerate(routes) if route == name], device=z.device)
        velocity[index] = fields[name](z[index], sigma[index], condition.rows(index)).to(z.dtype)
    return velocity


Route = TypeVar("Route", bound=Hashable)


@dataclass(frozen=True)
class Answer:
    """What teachers said.

    Attributes:
        velocity: (B, N, C), to be matched.
        forwards: network passes it took, over all samples.
    """

    velocity: Tensor
    forwards: int


@torch.no_grad()
def routed_displacement(
    fields: Mapping[Route, Asked],
    routes: Sequence[Route],
    z: Tensor,
    levels: Tensor,
    condition: Condition,
    how: SmallSteps,
) -> Answer:
    """Each sample's mean velocity over its interval from its own teacher; with one Euler step its `routed_velocity`.

    Args:
        fields: whom to ask, by route.
        routes: each sample's, length B.
        z: states (B, N, C), each at its interval's start.
        levels: noise levels of the small steps, (B, count + 1), on the CPU.
        condition: of the same B samples.
        how: the small steps.
    """
    velocity, forwards = torch.empty_like(z), 0
    asked, ends = how.asked(levels), (levels[:, -1] == 0).tolist()
    kinds = [(route, how.solver == "heun" and end) for route, end in zip(routes, ends, strict=True)]
    for kind in sorted(set(kinds), key=str):
        rows = torch.tensor([i for i, one in enumerate(kinds) if one == kind])
        index, teacher = rows.to(z.device), fields[kind[0]]
        velocity[index] = average_velocity(teacher, z[index], levels[rows].to(z), condition.rows(index), how)
        forwards += len(rows) * forwards_of(teacher, int(asked[rows[0]]))
    return Answer(velocity, forwards)


def task_counts(weights: dict[str, float], batch: int) -> dict[str, int]:
    """Share a batch among tasks by weight (largest remainder), at least one sample each.

    Raises:
        ValueError: if the batch is smaller than the number of tasks.
    """
    if batch < len(weights):
        raise ValueError(f"batch {batch} is smaller than the number of tasks {len(weights)}")
    spare, total = batch - len(weights), sum(weights.values())
    exact = {task: spare * weight / total for task, weight in weights.items()}
    counts = {task: 1 + int(share) for task, share in exact.items()}
    by_remainder = sorted(weights, key=lambda task: exact[task] - int(exact[task]), reverse=True)
    for task in by_remainder[: batch - sum(counts.values())]:
        counts[task] += 1
    return counts


def sample_weights(tasks: list[str], weights: dict[str, float]) -> Tensor:
    """Each sample's weight in the loss (B,), summing to 1, so that every task weighs as the recipe says."""
    total = sum(weights[task] for task in set(tasks))
    return torch.tensor([weights[task] / (total * tasks.count(task)) for task in tasks])


def weights_at(weights: dict[str, Weight], step: int, steps: int) -> dict[str, float]:
    """Each task's weight at update `step` of `steps`: a constant, or the phase that holds then."""

    def now(weight: Weight) -> float:
        if not isinstance(weight, tuple):
            return weight
        return next(phase.weight for phase in weight if step < phase.until * steps or phase.until == 1)

    return {task: now(weight) for task, weight in weights.items()}
