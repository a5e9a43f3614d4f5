"""K queries on one path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from danceopd.flow.rollout import roll_out, states_on_the_way
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.dense import Dense
from danceopd.methods.table import method_of


@pytest.mark.parametrize("queries", [1, 3])
def test_it_counts_its_forwards_and_leaves_the_teachers_alone(bench, queries):
    bench.check_counting_and_teachers(Dense(queries))


def test_its_cost_is_one_rollout_and_four_forwards_a_query(bench):
    setup, learner, method = bench.setup(6), bench.learner(), Dense(3)
    groups = bench.groups(setup, method, learner)
    figures = bench.update(method, groups, setup, learner)
    assert figures.forwards == sum(int(g.stop.max(dim=1).values.sum()) for g in groups) + 6 * 3 * 4


@pytest.mark.slow
def test_it_learns(bench):
    bench.check_learning("local_edit", method="dense", queries=2)


def test_with_one_query_it_is_danceopd(bench):
    one, other = bench.gradient(Dense(1)), bench.gradient(DanceOPD())
    assert one.norm() > 0
    assert torch.equal(one, other)


def test_its_gradient_is_the_mean_over_its_queries(bench):
    setup, method = bench.setup(), Dense(2)
    both = bench.learner()
    [group] = bench.groups(setup, method, both, tasks=("local_edit",))
    group.stop[:] = torch.tensor([[0, 2], [1, 1]])
    bench.update(method, [group], setup, both)
    total = 0
    for k in range(2):
        one = bench.learner()
        [single] = bench.groups(setup, method, one, tasks=("local_edit",))
        bench.update(Dense(1), [replace(single, stop=group.stop[:, [k]])], setup, one)
        total = total + torch.cat([p.grad.flatten() for p in one.parameters]) / 2
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in both.parameters]), total, atol=1e-6, rtol=1e-4)


def test_each_state_is_where_a_rollout_of_its_own_would_stop(bench):
    field, grid = bench.teachers["editor"], bench.base.sigmas(4, 64, 64)
    condition = bench.encoded.condition(bench.encoded.rows_by_task()["t2i"][:2])
    noise = torch.randn(2, *bench.base.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    stop = torch.tensor([[0, 1, 3], [2, 2, 2]])
    with bench.counted() as passed:
        states = states_on_the_way(field, noise, grid, stop, condition)
    assert sum(passed) == 3 + 2
    for k in range(3):
        torch.testing.assert_close(states[:, k], roll_out(field, noise, grid, stop[:, k], condition).state)


def test_k_is_eight_unless_the_recipe_says(bench):
    assert method_of(bench.spec(method="dense")).queries == 8
    assert method_of(bench.spec(method="dense", queries=3)).queries == 3
