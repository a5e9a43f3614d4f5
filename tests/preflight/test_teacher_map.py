"""The map before training: what it says of fields whose differences are known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from danceopd.backbones import load_backbone
from danceopd.config.recipe import DistillRecipe
from danceopd.data.encoded import EncodedRecords
from danceopd.flow.fields import VelocityField
from danceopd.methods.base import Distillation
from danceopd.preflight.teacher_map import map_teachers, plot_map
from danceopd.pretraining.world_base import SHAPE
from danceopd.training.learner import new_learner
from danceopd.training.processes import Processes

TASKS = {"keep": "base", "add": "more", "take": "less"}


@pytest.fixture
def base(tiny_base):
    return load_backbone(tiny_base, SHAPE)


def shifted(base, name, by):
    """A field whose velocity is the base's plus `by` times one direction."""
    network = base.new_transformer().requires_grad_(False)
    direction = torch.randn(network.proj_out.weight.shape, generator=torch.Generator().manual_seed(0))
    network.proj_out.weight.add_(by * direction)
    return VelocityField(name, base, network)


def records(base, tasks=tuple(TASKS), each=3) -> EncodedRecords:
    """The same three prompts for every task, so that tasks differ by nothing but their teachers."""
    prompt = torch.randn(each, *base.prompt_shape(False), generator=torch.Generator().manual_seed(1))
    tags = [task for task in tasks for _ in range(each)]
    none, rows = torch.empty(0), torch.full((len(tags),), -1)
    return EncodedRecords(tags, prompt, torch.arange(each).repeat(len(tasks)), none, rows, none, rows, 64, 64)


@pytest.fixture
def setup(base):
    fields = {"base": VelocityField("base", base, base.transformer), "more": shifted(base, "more", 0.1)}
    fields["less"] = shifted(base, "less", -0.1)
    return Distillation(base, records(base), fields, TASKS, rollout_steps=4)


def learner_of(base, **changes):
    return new_learner(base, "student", DistillRecipe(lr=1e-3, steps=2, batch=3, rollout_steps=4, **changes))


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_opposite_teachers_are_as_far_and_pull_apart_and_the_students_own_start_pulls_nowhere(base, setup, trainable):
    learner = learner_of(base, trainable=trainable)
    before = [p.detach().clone() for p in learner.parameters]
    found = map_teachers(setup, learner, levels=3, records=2)
    assert found.sigmas == pytest.approx(base.sigmas(4, 64, 64)[[0, 2, 3]].tolist())
    assert found.records == 2
    for task in TASKS:
        assert found.disagreement[task]["base"] == pytest.approx([0, 0, 0], abs=1e-6)
        assert found.disagreement[task]["more"] == pytest.approx(found.disagreement[task]["less"], rel=1e-3)
        assert min(found.disagreement[task]["more"]) > 0.01
    assert found.conflict["add / take"] == pytest.approx([-1, -1, -1], abs=1e-3)
    assert found.conflict["keep / add"] == pytest.approx([0, 0, 0], abs=1e-3)
    assert found.pull["keep"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert min(found.pull["add"]) > 0
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(learner.parameters, before, strict=True))


def test_no_more_samples_are_asked_at_once_than_an_update_asks(base, setup, monkeypatch):
    whole = map_teachers(setup, learner_of(base), levels=3, records=3)
    plain, asked = type(base).velocity, []

    def counted(backbone, network, z, *others):
        asked.append(len(z))
        return plain(backbone, network, z, *others)

    monkeypatch.setattr(type(base), "velocity", counted)
    found = map_teachers(setup, learner_of(base, accumulate=2), levels=3, records=3)
    assert max(asked) == 2 and min(asked) == 1
    for task in TASKS:
        assert found.pull[task] == pytest.approx(whole.pull[task], rel=1e-4, abs=1e-6)
        assert found.disagreement[task]["more"] == pytest.approx(whole.disagreement[task]["more"], rel=1e-4)
    assert found.conflict["add / take"] == pytest.approx(whole.conflict["add / take"], rel=1e-4)


def test_tasks_of_one_teacher_pull_alike(base, setup):
    alike = dataclasses.replace(setup, teacher_of={"add": "more", "take": "more"})
    found = map_teachers(alike, learner_of(base), levels=2, records=3)
    assert found.conflict == {"add / take": pytest.approx([1, 1], abs=1e-4)}


def test_the_picture_is_drawn(base, setup):
    assert plot_map(map_teachers(setup, learner_of(base), levels=2, records=1)).startswith(b"\x89PNG")


def test_what_cannot_be_mapped_is_refused(base, setup):
    with pytest.raises(ValueError, match="5 noise levels of a grid of 4 steps"):
        map_teachers(setup, learner_of(base), levels=5)
    learner = learner_of(base)
    learner.processes = Processes(0, 2, learner.device)
    with pytest.raises(ValueError, match="one process"):
        map_teachers(setup, learner, levels=2)
