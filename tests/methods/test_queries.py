"""Query windows: in sigma, on the grid, by name or range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from danceopd.errors import UserError
from danceopd.methods.queries import BY_STEP, NAMED, WindowSchedule, query_window

GRID = torch.linspace(1, 0, 17)
SHIFTED = 3 * GRID / (1 + 2 * GRID)


def drawn_sigma(spec, grid=GRID, count=4000):
    index = query_window(spec).draw(count, grid, torch.Generator().manual_seed(0))
    return grid[index]


@pytest.mark.parametrize("name", [*NAMED, *BY_STEP])
def test_draws_lie_on_the_grid_before_its_end(name):
    index = query_window(name).draw(2000, GRID, torch.Generator().manual_seed(1))
    assert index.min() >= 0
    assert index.max() <= len(GRID) - 2


def test_windows_are_ordered_from_noise_to_clean():
    means = [drawn_sigma(name).mean() for name in ("semantic", "mid", "low_noise")]
    assert means[0] > means[1] > means[2]
    assert means[0] == pytest.approx(5 / 7, abs=0.03)
    assert means[2] == pytest.approx(2 / 7, abs=0.04)


@pytest.mark.parametrize("name", NAMED)
def test_a_window_means_the_same_noise_level_on_a_shifted_grid(name):
    assert drawn_sigma(name, SHIFTED).mean() == pytest.approx(drawn_sigma(name).mean().item(), abs=0.05)


@pytest.mark.parametrize("grid", [GRID, SHIFTED])
def test_a_window_over_steps_is_the_releases_on_any_grid(grid):
    """`int(u * states)` with u from Beta(5, 2), as `sample_query_indices` of the paper's release draws."""
    generator = np.random.default_rng(0)
    theirs = np.bincount((generator.beta(5, 2, 20_000) * 16).astype(int), minlength=16) / 20_000
    late = query_window("late_steps").draw(20_000, grid, torch.Generator().manual_seed(0))
    ours = np.bincount(late.numpy(), minlength=16) / 20_000
    assert np.abs(ours - theirs).max() < 0.015
    early = query_window("early_steps").draw(20_000, grid, torch.Generator().manual_seed(0))
    assert early.float().mean() + late.float().mean() == pytest.approx(15, abs=0.2)


def test_a_range_is_kept():
    sigma = drawn_sigma([0.4, 0.7])
    assert sigma.min() >= 0.4 - 1 / 32
    assert sigma.max() <= 0.7 + 1 / 32
    assert len(sigma.unique()) > 3


def test_the_same_generator_gives_the_same_queries():
    first, second = (query_window("mid").draw(9, GRID, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("spec", [[0.7, 0.4], [0.2, 1.4], [-0.1, 0.5], [0.5]])
def test_a_range_that_is_none_is_refused(spec):
    with pytest.raises(UserError, match="sigma_lo < sigma_hi"):
        query_window(spec)


def test_an_unknown_name_lists_the_right_ones():
    with pytest.raises(UserError, match="'sematic' is not known; choose one of: early_steps, every_step, late_steps"):
        query_window("sematic")


def test_a_schedule_changes_at_its_shares():
    schedule = WindowSchedule(((0.25, query_window("semantic")), (1.0, query_window("low_noise"))))
    windows = [schedule.at(step, 8) for step in range(8)]
    assert windows == [query_window("semantic")] * 2 + [query_window("low_noise")] * 6
