"""Joint training is flow matching on every task's targets."""

from __future__ import annotations

import pytest
import torch

from danceopd.config.recipe import FinetuneRecipe
from danceopd.distill import distill
from danceopd.finetune import finetune
from danceopd.flow.losses import flow_matching_loss
from danceopd.methods.joint import Joint


def test_it_counts_its_forwards_and_leaves_the_teachers_alone(bench):
    assert bench.check_counting_and_teachers(Joint()).forwards_per_sample == 3


@pytest.mark.slow
def test_it_learns(bench):
    bench.check_learning("global_style", 0.97, method="joint", steps=25, lr=1e-2, batch=12)


def test_its_gradient_is_flow_matchings_weighted_by_task(bench):
    setup, method, learner, other = bench.setup(), Joint(), bench.learner(), bench.learner()
    groups = bench.groups(setup, method, learner)
    figures = bench.update(method, groups, setup, learner)
    for group in groups:
        rand = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in group.seeds]
        clean, network = bench.encoded.target(group.rows), other.field.network
        losses = flow_matching_loss(bench.base, network, clean, group.condition, group.noise, torch.stack(rand))
        (losses * group.weights).sum().backward()
    for one, wanted in zip(learner.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one.grad, wanted.grad)
    assert len({round(s, 6) for sigmas in figures.sigmas.values() for s in sigmas}) == 6


def test_on_one_task_with_the_same_draws_it_is_fine_tuning(bench, monkeypatch):
    """One update of each from the same start; fine-tuning is made to draw what joint training drew."""
    drawn = []
    real = Joint.accumulate
    monkeypatch.setattr(Joint, "accumulate", lambda self, s, lr, g, f: (drawn.append(g), real(self, s, lr, g, f))[1])
    rows = bench.encoded.rows_by_task()["local_edit"]
    encoded = bench.encoded.subset(rows)
    common = {"lr": 1e-2, "steps": 1, "batch": 6, "warmup": 1, "seed": 3}
    student, _ = distill(
        bench.base,
        encoded,
        bench.teachers,
        {"local_edit": "editor"},
        {"local_edit": 2.0},
        bench.spec(method="joint", **common),
    )
    [group] = drawn
    sigma = torch.stack([torch.rand((), generator=torch.Generator().manual_seed(s)) for s in group.seeds])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: group.noise)
        patch.setattr(torch, "rand", lambda *_, **__: sigma)
        teacher, _ = finetune(bench.base, "t", encoded, FinetuneRecipe(**common))
    for one, other in zip(student.network.parameters(), teacher.network.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", [1, 2])
def test_its_noise_levels_hang_on_the_seed_alone(bench, seed):
    def figures(parts):
        setup, learner, method = bench.setup(), bench.learner(), Joint()
        return bench.update(method, bench.groups(setup, method, learner, parts=parts, seed=seed), setup, learner)

    assert figures(1).sigmas == figures(2).sigmas
