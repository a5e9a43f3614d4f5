"""A bench all baselines are tried on: the tiny base, an editor that differs from it, records with targets."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from danceopd.backbones.base import Backbone
from danceopd.config.recipe import DistillRecipe
from danceopd.data.encoded import EncodedRecords
from danceopd.distill import distill
from danceopd.flow.fields import VelocityField
from danceopd.methods.base import Distillation, UpdateFigures
from danceopd.methods.groups import draw_groups
from danceopd.methods.queries import query_window
from danceopd.training.learner import new_learner

TEACHER_OF = {"t2i": "base", "local_edit": "editor", "global_style": "editor"}
WEIGHTS = {"t2i": 1.0, "local_edit": 1.0, "global_style": 2.0}


@dataclass
class Bench:
    """What the tests of every baseline share."""

    base: Backbone
    encoded: EncodedRecords
    teachers: dict[str, VelocityField]

    def spec(self, **changes) -> DistillRecipe:
        known = {"lr": 1e-3, "steps": 3, "batch": 6, "rollout_steps": 3, "log_every": 1, "warmup": 2}
        return DistillRecipe(**(known | changes))

    def setup(self, steps=3, **changes) -> Distillation:
        known = {"teachers": self.teachers, "teacher_of": TEACHER_OF, "rollout_steps": steps}
        return Distillation(backbone=self.base, encoded=self.encoded, **(known | changes))

    def learner(self, **changes):
        return new_learner(self.base, "student", self.spec(**changes))

    def groups(self, setup, method, learner, window="uniform", parts=1, tasks=tuple(TEACHER_OF), seed=0):
        """The groups of a mixed batch of two samples per task."""
        by_task = self.encoded.rows_by_task()
        rows, tags = [by_task[t][i] for t in tasks for i in range(2)], [t for t in tasks for _ in range(2)]
        generator = torch.Generator().manual_seed(seed)
        window = query_window(window) if isinstance(window, str) else window
        return draw_groups(setup, method, learner, rows, tags, WEIGHTS, window, generator, parts)

    def update(self, method, groups, setup, learner) -> UpdateFigures:
        """Add the gradient of one batch to the learner's."""
        figures = UpdateFigures()
        for group in groups:
            method.accumulate(setup, learner, group, figures)
        return figures

    def gradient(self, method, setup=None, **drawing) -> Tensor:
        """The gradient of one batch on a fresh student, flat."""
        setup, learner = setup or self.setup(), self.learner()
        self.update(method, self.groups(setup, method, learner, **drawing), setup, learner)
        return flat(learner)

    @contextmanager
    def counted(self):
        """How many samples each forward pass held, through any network, in the block."""
        seen: list[int] = []
        real = self.base.velocity
        self.base.velocity = lambda network, z, *rest: (seen.append(len(z)), real(network, z, *rest))[1]
        try:
            yield seen
        finally:
            del self.base.velocity

    def check_counting_and_teachers(self, method) -> UpdateFigures:
        """Forwards are counted as they are; gradients reach the whole student and nobody else; one sync, at the end."""
        setup, learner = self.setup(), self.learner()
        groups = self.groups(setup, method, learner, parts=2)
        syncs, backward = [], learner.backward
        learner.backward = lambda loss, sync: (syncs.append(sync), backward(loss, sync))[1]
        with self.counted() as passed:
            figures = self.update(method, groups, setup, learner)
        per_sample = len(figures.losses["t2i"]) // 2  # passes that learn
        assert figures.forwards == sum(passed) + 2 * 6 * per_sample
        assert figures.samples == 6
        assert {t: len(v) for t, v in figures.losses.items()} == {t: len(v) for t, v in figures.sigmas.items()}
        assert syncs == [False] * (len(syncs) - 1) + [True]
        assert all(p.grad is not None for p in learner.parameters)
        for field in self.teachers.values():
            assert all(p.grad is None for p in field.network.parameters())
        return figures

    def distill(self, checkpoints=None, preview=None, validate=None, **changes):
        spec = self.spec(**changes)
        return distill(
            self.base, self.encoded, self.teachers, TEACHER_OF, WEIGHTS, spec, preview, checkpoints, validate
        )

    def check_learning(self, task, factor=0.6, **changes) -> None:
        """The loss of the method's own kind falls on a task in 25 steps."""
        _, history = self.distill(**({"steps": 25, "lr": 5e-3} | changes))
        assert history[-1]["loss"][task] < factor * history[0]["loss"][task]


def flat(learner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in learner.parameters])


def editor(base, factor=20.0) -> VelocityField:
    """A teacher that differs from the base."""
    network = base.new_transformer()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "to_out" in name or "linear_out" in name:
                weight.mul_(factor)
    return VelocityField("editor", base, network.requires_grad_(False))


@pytest.fixture
def bench(own_backbone, training_set) -> Bench:
    teachers = {"base": VelocityField("base", own_backbone, own_backbone.transformer), "editor": editor(own_backbone)}
    return Bench(own_backbone, training_set, teachers)
