"""Off-policy distillation asks at noised data."""

from __future__ import annotations

import pytest
import torch

from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.off_policy import OffPolicy
from danceopd.methods.queries import QueryWindow

AT_NOISE = QueryWindow(1.0, 1.0, 1.0, 1.0)


def test_it_counts_its_forwards_and_leaves_the_teachers_alone(bench):
    assert bench.check_counting_and_teachers(OffPolicy()).forwards_per_sample == 4


@pytest.mark.slow
def test_it_learns(bench):
    bench.check_learning("local_edit", method="off_policy")


def test_at_pure_noise_it_is_danceopd_and_elsewhere_not(bench):
    one, other = (bench.gradient(method, window=AT_NOISE) for method in (OffPolicy(), DanceOPD()))
    assert one.norm() > 0
    assert torch.equal(one, other)
    one, other = (
        bench.gradient(method, window=(QueryWindow(1.0, 1.0, 0.0, 0.5))) for method in (OffPolicy(), DanceOPD())
    )
    assert not torch.allclose(one, other, rtol=0.1)


def test_it_asks_at_noised_targets(bench, monkeypatch):
    setup, learner = bench.setup(), bench.learner()
    [group] = bench.groups(setup, OffPolicy(), learner, tasks=("local_edit",))
    asked = []
    real = bench.base.velocity
    monkeypatch.setattr(bench.base, "velocity", lambda n, z, *rest: (asked.append(z), real(n, z, *rest))[1])
    bench.update(OffPolicy(), [group], setup, learner)
    sigma = group.grid[group.stop[:, 0]][:, None, None]
    wanted = (1 - sigma) * bench.encoded.target(group.rows) + sigma * group.noise
    for states in asked:
        torch.testing.assert_close(states, wanted)
