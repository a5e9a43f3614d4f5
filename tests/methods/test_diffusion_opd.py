"""DiffusionOPD matches the means of the steps of the ODE."""

from __future__ import annotations

import pytest
import torch

from danceopd.methods.base import Distillation
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.diffusion_opd import DiffusionOPD


def test_it_counts_its_forwards_and_leaves_the_teachers_alone(bench):
    assert bench.check_counting_and_teachers(DiffusionOPD()).forwards_per_sample == 3 * 4


@pytest.mark.slow
def test_it_learns(bench):
    bench.check_learning("local_edit", method="diffusion_opd")


class Uneven(Distillation):
    def grid(self, height, width):
        return torch.tensor([1.0, 0.9, 0.6, 0.0])


def test_its_gradient_is_the_velocity_losss_times_half_the_squared_width_summed_over_the_path(bench):
    """The widths are those of the shifted grid, which are not equal."""
    setup = Uneven(**vars(bench.setup()))
    grid = setup.grid(64, 64)
    widths = grid[:-1] - grid[1:]
    total = 0
    for step, width in enumerate(widths):
        learner, method = bench.learner(), DanceOPD()
        groups = bench.groups(setup, method, learner)
        for group in groups:
            group.stop[:] = step
        bench.update(method, groups, setup, learner)
        total = total + width**2 / 2 * torch.cat([p.grad.flatten() for p in learner.parameters])
    found = bench.gradient(DiffusionOPD(), setup)
    assert found.norm() > 0
    torch.testing.assert_close(found, total, atol=1e-7, rtol=1e-3)


def test_the_window_has_no_say(bench):
    learner, setup = bench.learner(), bench.setup()
    groups = bench.groups(setup, DiffusionOPD(), learner)
    for group in groups:
        group.stop[:] = 2
    bench.update(DiffusionOPD(), groups, setup, learner)
    assert torch.equal(torch.cat([p.grad.flatten() for p in learner.parameters]), bench.gradient(DiffusionOPD()))
