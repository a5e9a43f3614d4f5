"""The mean velocity over an interval: where small steps lead, what they cost, and what one of them is."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as attribute

import pytest
import torch
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.flow.displacement import VELOCITY, SmallSteps, average_velocity
from danceopd.flow.fields import VelocityField

STRAIGHT = torch.linspace(1, 0, 5)


def shifted(steps: int, by: float = 3.0) -> Tensor:
    even = torch.linspace(1, 0, steps + 1)
    return by * even / (1 + (by - 1) * even)


@dataclass
class Decay:
    """dz/dsigma = k z, whose path is z exp(k (sigma - s))."""

    k: float = 2.0
    asked: list = attribute(default_factory=list)

    def __call__(self, z, sigma, condition):
        self.asked.append(len(z))
        return self.k * z

    def resident(self):
        return torch.no_grad()


def crossed(how, levels, k=2.0):
    z = torch.ones(len(levels), 2, 3)
    field = Decay(k)
    return average_velocity(field, z, levels, None, how), sum(field.asked)


def exact(levels, k=2.0):
    start, end = levels[:, 0], levels[:, -1]
    return ((torch.exp(k * (end - start)) - 1) / (end - start))[:, None, None].expand(-1, 2, 3)


@pytest.mark.parametrize(("how", "error"), [(SmallSteps(32), 0.02), (SmallSteps(8, "heun"), 2e-3)])
def test_small_steps_lead_where_the_field_leads(how, error):
    levels = how.levels(STRAIGHT, torch.linspace(1, 0, 4 * how.count + 1))[:3]  # none of these ends at 0
    found, asked = crossed(how, levels)
    assert (found - exact(levels)).abs().max() < error
    assert asked == int(how.asked(levels).sum())
    few = SmallSteps(2, how.solver)
    coarse, _ = crossed(few, few.levels(STRAIGHT, torch.linspace(1, 0, 9))[:3])
    assert (coarse - exact(levels)).abs().max() > 2 * (found - exact(levels)).abs().max()


def test_it_is_the_displacement_over_the_interval():
    how = SmallSteps(3)
    levels = torch.tensor([[0.9, 0.8, 0.6, 0.5]])
    z = torch.ones(1, 2, 3)
    for here, there in zip(levels[0], levels[0, 1:], strict=False):
        z = z + (there - here) * 2 * z
    found, _ = crossed(how, levels)
    torch.testing.assert_close(found, (z - 1) / (levels[0, -1] - levels[0, 0]))


def test_a_step_of_heun_that_ends_at_the_picture_is_eulers():
    levels = SmallSteps(2, "heun").levels(STRAIGHT, torch.linspace(1, 0, 9))
    assert SmallSteps(2, "heun").asked(levels).tolist() == [4, 4, 4, 3]
    found, asked = crossed(SmallSteps(2, "heun"), levels[3:])
    assert asked == 3
    assert found.isfinite().all()
    one, _ = crossed(SmallSteps(1, "heun"), torch.tensor([[0.25, 0.0]]))
    assert torch.equal(one, crossed(VELOCITY, torch.tensor([[0.25, 0.0]]))[0])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_intervals_start_and_end_at_the_grids_own_levels_to_the_bit(count):
    grid = shifted(4)
    levels = SmallSteps(count).levels(grid, shifted(4 * count))
    assert levels.shape == (4, count + 1)
    assert torch.equal(levels[:, 0], grid[:-1])
    assert torch.equal(levels[:, -1], grid[1:])
    assert (levels.diff(dim=1) < 0).all()
    # Grids of one shift are nested: then the small steps are those of the finer grid itself.
    torch.testing.assert_close(levels.flatten()[: count + 1], shifted(4 * count)[: count + 1])
    torch.testing.assert_close(levels[-1], shifted(4 * count)[-count - 1 :])


def test_a_finer_grid_with_another_shift_is_stretched_to_fit():
    levels = SmallSteps(4).levels(shifted(4, 3.0), shifted(16, 7.0))
    assert torch.equal(levels[:, 0], shifted(4)[:-1])
    assert (levels.diff(dim=1) < 0).all()


def test_one_euler_step_is_the_velocity_to_the_bit(backbone):
    field = VelocityField("base", backbone, backbone.transformer)
    z = torch.randn(3, *backbone.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    condition = _condition(backbone)
    levels = torch.tensor([[1.0, 0.7], [0.5, 0.45], [0.3, 0.0]])
    with torch.no_grad():
        expected = field(z, levels[:, 0], condition)
    assert torch.equal(average_velocity(field, z, levels, condition, VELOCITY), expected)


def _condition(backbone):
    return Condition(backbone.encode_prompts(["a red ring", "a blue disc", ""]), None, 64, 64)
