"""The student's path: it stops at the query, computes nothing beyond, and carries no gradient."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from danceopd.backbones.base import Condition
from danceopd.flow.fields import VelocityField
from danceopd.flow.rollout import roll_out, states_on_the_way, steps_on_the_way, stride_drift, waypoints
from danceopd.methods.queries import NAMED, query_window


class CountingBackbone:
    """Passes calls on to a real back end and notes how many samples each forward pass held."""

    def __init__(self, backbone):
        self._backbone, self.batches = backbone, []

    def velocity(self, network, z, sigma, condition):
        self.batches.append(len(z))
        return self._backbone.velocity(network, z, sigma, condition)


@pytest.fixture
def setting(backbone):
    """A counting field, noise, grid and condition of six samples."""
    counting = CountingBackbone(backbone)
    field = VelocityField("student", counting, backbone.transformer)
    generator = torch.Generator().manual_seed(0)
    shape = backbone.latent_shape(64, 64)
    noise = torch.randn(6, *shape, generator=generator)
    source = torch.randn(6, *shape, generator=generator)
    prompts = backbone.encode_prompts([f"red ring top left {i}" for i in range(6)])
    return counting, field, noise, backbone.sigmas(5, 64, 64), Condition(prompts, source, 64, 64)


def test_each_sample_equals_its_own_rollout_alone(setting):
    _, field, noise, grid, condition = setting
    stop = torch.tensor([0, 4, 2, 2, 1, 3])
    together = roll_out(field, noise, grid, stop, condition)
    for i in range(6):
        alone = roll_out(field, noise[i : i + 1], grid, stop[i : i + 1], condition.rows(torch.tensor([i])))
        torch.testing.assert_close(together.state[i], alone.state[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.sigma, grid[stop])


def test_a_query_at_the_noise_costs_nothing_and_is_the_noise(setting):
    counting, field, noise, grid, condition = setting
    query = roll_out(field, noise, grid, torch.zeros(6, dtype=torch.int64), condition)
    assert counting.batches == []
    assert query.forwards == 0
    assert torch.equal(query.state, noise)
    assert query.state is not noise


def test_who_has_arrived_leaves_the_batch(setting):
    counting, field, noise, grid, condition = setting
    query = roll_out(field, noise, grid, torch.tensor([0, 4, 2, 2, 1, 3]), condition)
    assert counting.batches == [5, 4, 2, 1]
    assert query.forwards == 12


@pytest.mark.parametrize("window", NAMED)
def test_forwards_equal_the_grid_steps_before_the_query(setting, window):
    counting, field, noise, grid, condition = setting
    stop = query_window(window).draw(6, grid, torch.Generator().manual_seed(7))
    query = roll_out(field, noise, grid, stop, condition)
    assert sum(counting.batches) == query.forwards == int(stop.sum())


def test_no_gradient_reaches_the_rollout(setting, backbone):
    _, field, noise, grid, condition = setting
    trainable = replace(field, network=backbone.new_transformer().requires_grad_(True))
    query = roll_out(trainable, noise, grid, torch.full((6,), 2), condition)
    assert not query.state.requires_grad


def test_one_euler_step_is_the_velocity_times_the_step(setting, backbone):
    _, field, noise, grid, condition = setting
    query = roll_out(field, noise, grid, torch.ones(6, dtype=torch.int64), condition)
    with torch.no_grad():
        velocity = backbone.velocity(backbone.transformer, noise, torch.ones(6), condition)
    torch.testing.assert_close(query.state, noise + (grid[1] - grid[0]) * velocity)


@pytest.mark.parametrize(
    ("stops", "stride", "wanted"),
    [
        ([7], 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([7], 4, [0, 3, 7]),
        ([8], 4, [0, 4, 8]),
        ([3], 4, [0, 3]),
        ([0], 4, [0]),
        ([0, 2, 2, 7], 3, [0, 2, 4, 7]),
    ],
)
def test_waypoints_meet_every_stop_and_are_a_stride_apart_but_after_a_stop(stops, stride, wanted):
    assert waypoints(stops, stride) == wanted
    assert steps_on_the_way(torch.tensor([stops, stops]), stride) == 2 * (len(wanted) - 1)


def test_a_rollout_in_strides_is_one_on_the_coarse_grid(setting, backbone):
    counting, field, noise, _, condition = setting
    grid = backbone.sigmas(6, 64, 64)
    found = roll_out(field, noise, grid, torch.tensor([0, 1, 3, 4, 6, 6]), condition, stride=3)
    assert found.forwards == sum(counting.batches) == 0 + 1 + 1 + 2 + 2 + 2
    torch.testing.assert_close(found.sigma, grid[[0, 1, 3, 4, 6, 6]])
    coarse = roll_out(field, noise, grid[::3], torch.tensor([0, 1, 1, 2, 2, 2]), condition)
    torch.testing.assert_close(found.state[[2, 4, 5]], coarse.state[[2, 4, 5]])  # the others' ways are no multiples


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_several_stops_on_a_path_in_strides_are_those_of_their_waypoints(setting, stride):
    counting, field, noise, grid, condition = setting
    stop = torch.tensor([[0, 4], [1, 4], [2, 2], [3, 5], [0, 0], [1, 2]])
    states = states_on_the_way(field, noise, grid, stop, condition, stride)
    assert sum(counting.batches) == steps_on_the_way(stop, stride)
    for i in range(6):
        state, known = noise[i : i + 1], {0: noise[i]}
        places = waypoints(stop[i].tolist(), stride)
        for here, there in itertools.pairwise(places):
            with torch.no_grad():
                velocity = field(state, grid[here].view(1), condition.rows(torch.tensor([i])))
            state = state + (grid[there] - grid[here]) * velocity
            known[there] = state[0]
        wanted = torch.stack([known[place] for place in stop[i].tolist()])
        torch.testing.assert_close(states[i], wanted, atol=1e-5, rtol=1e-5)


def test_a_strides_drift_is_the_distance_as_a_share_of_the_way(setting):
    _, field, noise, grid, condition = setting
    stop = torch.tensor([0, 4, 2, 2, 1, 3])
    single, coarse = (roll_out(field, noise, grid, stop, condition, stride).state for stride in (1, 3))
    shares = [float((coarse[i] - single[i]).norm() / (single[i] - noise[i]).norm()) for i in range(1, 6)]
    assert stride_drift(field, noise, grid, stop, condition, 3) == pytest.approx(sum(shares) / 5, rel=1e-4)
    assert stride_drift(field, noise, grid, stop, condition, 1) == 0
    assert stride_drift(field, noise, grid, torch.zeros_like(stop), condition, 3) == 0
