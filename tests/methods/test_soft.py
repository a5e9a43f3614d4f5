"""Soft routing learns from the mean of the teachers."""

from __future__ import annotations

import pytest
import torch

from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.soft import SoftRouting, mean_velocity


def test_it_counts_its_forwards_and_leaves_the_teachers_alone(bench):
    bench.check_counting_and_teachers(SoftRouting())


@pytest.mark.slow
def test_it_learns(bench):
    bench.check_learning("local_edit", method="soft")


def test_with_one_teacher_it_is_danceopd(bench):
    setup = bench.setup(teacher_of=dict.fromkeys(("t2i", "local_edit", "global_style"), "editor"))
    one, other = (bench.gradient(method, setup) for method in (SoftRouting(), DanceOPD()))
    assert one.norm() > 0
    torch.testing.assert_close(one, other)


def test_the_target_is_the_mean_of_all_teachers(bench):
    condition = bench.encoded.condition(bench.encoded.rows_by_task()["t2i"][:2])
    z = torch.randn(2, *bench.base.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.2])
    fields = list(bench.teachers.values())
    mean = mean_velocity(fields, z, sigma, condition)
    assert not mean.requires_grad
    torch.testing.assert_close(mean, (fields[0](z, sigma, condition) + fields[1](z, sigma, condition)) / 2)
