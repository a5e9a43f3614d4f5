"""Rollouts in strides: the queries stay where they were, and the way there is shorter."""

from __future__ import annotations

import pytest
import torch

from danceopd.flow.rollout import steps_on_the_way
from danceopd.methods.base import Distillation
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.dense import Dense
from danceopd.methods.soft import SoftRouting
from danceopd.methods.table import setup_of

METHODS = {"danceopd": DanceOPD(), "dense": Dense(3), "soft": SoftRouting()}


def test_a_recipes_stride_reaches_the_methods(bench):
    made = [
        setup_of(bench.spec(**changes), bench.base, bench.encoded, bench.teachers, {})
        for changes in ({}, {"rollout_stride": 2})
    ]
    assert [setup.rollout_stride for setup in made] == [1, 2]


@pytest.mark.parametrize("name", METHODS)
def test_the_same_queries_cost_less_and_are_counted(bench, name):
    method, found = METHODS[name], {}
    for stride in (1, 2, 4):
        setup, learner = bench.setup(4, rollout_stride=stride), bench.learner()
        groups = bench.groups(setup, method, learner)
        with bench.counted() as passed:
            figures = bench.update(method, groups, setup, learner)
        learned = len(figures.losses["t2i"]) // 2
        assert figures.forwards == sum(passed) + 2 * 6 * learned  # a backward pass is two
        found[stride] = figures, sum(steps_on_the_way(group.stop, stride) for group in groups)
    (plain, walked), (half, fewer), (quarter, fewest) = found.values()
    assert torch.equal(torch.tensor(plain.sigmas["t2i"]), torch.tensor(half.sigmas["t2i"]))
    assert plain.forwards - half.forwards == walked - fewer > 0
    assert half.forwards - quarter.forwards == fewer - fewest > 0


def test_in_one_stride_the_query_lies_on_the_students_first_velocity(bench, monkeypatch):
    """The state asked at is the noise, moved straight to the query's level."""
    real, asked = Distillation.ask, []

    def ask(self, group, state, stop):
        asked.append(state)
        return real(self, group, state, stop)

    monkeypatch.setattr(Distillation, "ask", ask)
    setup, learner = bench.setup(4, rollout_stride=4), bench.learner()
    [group] = bench.groups(setup, DanceOPD(), learner, tasks=("local_edit",))
    bench.update(DanceOPD(), [group], setup, learner)
    with torch.no_grad():
        first = learner.field(group.noise, torch.ones(2), group.condition)
    sigma = group.grid[group.stop[:, 0]].to(group.noise)[:, None, None]
    torch.testing.assert_close(asked[0], group.noise + (sigma - 1) * first, atol=1e-5, rtol=1e-5)
