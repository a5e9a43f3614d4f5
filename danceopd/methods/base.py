"""What every method of distillation is made of: a group of samples, what stays the same, what is measured, one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from danceopd.backbones.base import Backbone, Condition
from danceopd.data.encoded import EncodedRecords
from danceopd.flow.displacement import VELOCITY, Asked, SmallSteps
from danceopd.flow.fields import Field
from danceopd.flow.guidance import Branch, GuidedField, plain_field
from danceopd.flow.losses import velocity_matching_loss
from danceopd.methods.queries import QueryWindow
from danceopd.methods.routing import Answer, routed_displacement
from danceopd.training.learner import Learner


@dataclass
class UpdateFigures:
    """What updates measured: loss and query noise levels by task, and the transformer forwards they took.

    A backward pass counts as two forwards, and as three where activations are computed again.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    sigmas: dict[str, list[float]] = field(default_factory=dict)
    forwards: int = 0
    samples: int = 0

    def add(self, tags: list[str], losses: Tensor, sigmas: Tensor, forwards: int) -> None:
        """Add one group: a loss and a noise level for each sample (or several for each, sample by sample)."""
        per_sample = len(losses) // len(tags)
        for position, (loss, sigma) in enumerate(zip(losses.tolist(), sigmas.tolist(), strict=True)):
            tag = tags[position // per_sample]
            self.losses.setdefault(tag, []).append(loss)
            self.sigmas.setdefault(tag, []).append(sigma)
        self.forwards += forwards
        self.samples += len(tags)

    def merge(self, other: UpdateFigures) -> None:
        """Add another's figures to these."""
        for task, losses in other.losses.items():
            self.losses.setdefault(task, []).extend(losses)
            self.sigmas.setdefault(task, []).extend(other.sigmas[task])
        self.forwards += other.forwards
        self.samples += other.samples

    def spent(self) -> UpdateFigures:
        """What it cost alone, without what was measured."""
        return UpdateFigures(forwards=self.forwards, samples=self.samples)

    @property
    def forwards_per_sample(self) -> float:
        """Transformer forwards per sample: for this method the rollout, 1 teacher, 3 for the student."""
        return self.forwards / self.samples


@dataclass(frozen=True)
class Group:
    """Samples of one size and sequence length: this process's share of a part of a mixed batch, with its random draws.

    Attributes:
        rows: row numbers in the encoded records.
        tags: their tasks.
        weights: each sample's weight in the loss, (n,) float32; over all groups and processes they sum to 1.
        condition: of the same n samples, with their prompts: what their paths follow.
        dropped: which samples are trained with the empty prompt, (n,), bool, on the CPU.
        trained: the condition with the empty prompt in those samples: what the student is trained under.
        noise: where each sample's path starts, (n, N, C).
        grid: the sampling grid at the samples' picture size, (steps + 1,).
        levels: noise levels of the teacher's small steps in each interval of the grid, (steps, count + 1).
        stop: indices of the query states on the grid, (n, K), int64 on the CPU, rising along K.
        seeds: one per sample, for methods that draw more along the path; empty for those that do not.
        last: whether no group of this process follows in the update: its last backward pass synchronises.
    """

    rows: list[int]
    tags: list[str]
    weights: Tensor
    condition: Condition
    dropped: Tensor
    trained: Condition
    noise: Tensor
    grid: Tensor
    levels: Tensor
    stop: Tensor
    seeds: list[int]
    last: bool


@dataclass(frozen=True)
class Distillation:
    """All that stays the same from update to update.

    Attributes:
        backbone: the model family and base.
        encoded: training prompts and sources; targets are read only by methods that train on data.
        teachers: frozen fields by name.
        teacher_of: task -> teacher's name, the routing.
        rollout_steps: steps of the sampling grid the student rolls out on.
        target: the teacher's small steps over the student's next grid interval; one Euler step: its velocity.
        guidance: scale at which the student's own paths are guided, which keeps guidance; None: they are not.
        batched: whether both sides of its guided field go through the network together.
        prompt_dropout: share of samples trained with the empty prompt.
        empty: embedding of the empty prompt, (L, D); needed for the two before.
        rollout_stride: grid steps in one step of the student's rollout.
    """

    backbone: Backbone
    encoded: EncodedRecords
    teachers: Mapping[str, Field]
    teacher_of: dict[str, str]
    rollout_steps: int
    target: SmallSteps = VELOCITY
    guidance: float | None = None
    batched: bool = True
    prompt_dropout: float = 0.0
    empty: Tensor | None = None
    rollout_stride: int = 1

    def grid(self, height: int, width: int) -> Tensor:
        """The sampling grid for a picture size, (rollout_steps + 1,)."""
        return self.backbone.sigmas(self.rollout_steps, height, width)

    def levels(self, height: int, width: int) -> Tensor:
        """Noise levels of the teacher's small steps at a picture size, (rollout_steps, target.count + 1)."""
        fine = self.backbone.sigmas(self.rollout_steps * self.target.count, height, width)
        return self.target.levels(self.grid(height, width), fine)

    def ask(self, group: Group, state: Tensor, stop: Tensor) -> Answer:
        """What each sample's own teacher, and no other, says at a group's states.

        A sample that is trained with the empty prompt asks for the teacher's side of it. Where guidance is kept and the
        target is a displacement, both sides are averaged along the guided teacher's path.

        Args:
            group: the samples.
            state: (n, N, C).
            stop: index of each state on the group's grid, (n,).
        """
        routes = list(zip(self.routes(group.tags), group.dropped.tolist(), strict=True))
        asked = {route: self._asked(*route) for route in set(routes)}
        condition = group.trained if self.guidance is None else group.condition
        return routed_displacement(asked, routes, state, group.levels[stop], condition, self.target)

    def _asked(self, teacher: str, dropped: bool) -> Asked:
        field = self.teachers[teacher]
        if self.guidance is not None:
            return Branch(self._guided(field), dropped)
        return plain_field(field) if dropped else field

    def _guided(self, field: Field) -> GuidedField:
        assert self.guidance is not None and self.empty is not None, "guidance needs the empty prompt's embedding"
        return GuidedField(field, self.guidance, self.empty, self.batched)

    def path(self, student: Field) -> Field:
        """The field that the student's own paths follow: the guided one where guidance is kept, at two forwards."""
        return student if self.guidance is None else self._guided(student)

    def routes(self, tags: list[str]) -> list[str]:
        """The teacher's name of each sample."""
        return [self.teacher_of[tag] for tag in tags]

    def teacher_forwards(self, tags: list[str]) -> int:
        """Forwards it takes to ask each sample's teacher once; a guided one takes two."""
        return sum(self.teachers[route].forwards for route in self.routes(tags))


class Method(ABC):
    """What one update does with a group of samples; a subclass is a way to distill.

    Attributes:
        seeded: whether the group carries a seed per sample, for draws along the path.
        needs_targets: whether it trains on target images.
    """

    seeded: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False

    def draw_queries(self, window: QueryWindow, count: int, grid: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of `count` samples' query states on a sampling grid (steps + 1,): (count, K), int64, rising along K.

        K = 1 unless a method says otherwise.
        """
        return window.draw(count, grid, generator)[:, None]

    @abstractmethod
    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """Add the group's gradient to the learner's through `learner.backward`, and what was measured to `figures`."""


def match_velocity(
    setup: Distillation,
    learner: Learner,
    group: Group,
    state: Tensor,
    sigma: Tensor,
    target: Tensor,
    sync: bool,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One forward and backward pass of the student on a group; costs `learner.update_forwards` a sample.

    Args:
        setup: whose backbone is called.
        learner: the student.
        group: the samples, with their weights in the loss.
        state: where it is asked, (n, N, C), without gradient.
        sigma: noise levels (n,).
        target: the velocity to match, (n, N, C); it gets no gradient.
        sync: whether this is the process's last backward pass in the update.
        scale: factor of the loss, a number or (n,).

    Returns:
        Each sample's loss times `scale`, (n,) float32, and the student's velocity (n, N, C), both without gradient.
    """
    with learner.field.active():
        velocity = setup.backbone.velocity(learner.field.network, state, sigma, group.trained)
        losses = velocity_matching_loss(velocity, target) * scale
        learner.backward((losses * group.weights.to(losses)).sum(), sync=sync)
    return losses.detach(), velocity.detach()
