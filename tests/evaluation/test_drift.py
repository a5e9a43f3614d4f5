"""Paths that part, velocities that differ, and fewer steps, on the tiny base."""

from __future__ import annotations

import dataclasses

import pytest

from danceopd.data import world
from danceopd.data.assemble import open_dataset
from danceopd.data.encode import encode_records
from danceopd.evaluation.drift import path_drift, plot_paths
from danceopd.flow.fields import VelocityField

SIZE = (world.SIZE, world.SIZE)


@dataclasses.dataclass(frozen=True)
class PushedField(VelocityField):
    """The network's velocity and a constant push, counting the samples it was asked for."""

    push: float = 0.0
    asked: list = dataclasses.field(default_factory=list)

    def __call__(self, z, sigma, condition):
        self.asked.append(len(z))
        return super().__call__(z, sigma, condition) + self.push


@pytest.fixture(scope="module")
def encoded(backbone, small_data):
    dataset = open_dataset(small_data)
    records = [r for task in ("t2i", "local_edit") for r in dataset.records("test", task, 2)]
    return encode_records(backbone, records, *SIZE, None, "key", targets=False)


SEEDS = [1, 2, 3, 4]


def test_one_field_does_not_leave_itself(backbone, encoded):
    student, teacher = (PushedField(n, backbone, backbone.transformer) for n in ("student", "teacher"))
    found = path_drift(student, teacher, encoded, SEEDS, 3, 4)
    assert found.drift == [0.0] * 4 and found.velocity_error == [0.0] * 3
    assert found.sigmas[0] == 1 and found.sigmas[-1] == 0 and len(found.sigmas) == 4
    assert found.forwards == sum(student.asked) + sum(teacher.asked)


def test_a_push_is_a_velocity_error_and_a_drift(backbone, encoded):
    teacher = PushedField("teacher", backbone, backbone.transformer)
    small, large = (
        path_drift(PushedField("student", backbone, backbone.transformer, push=push), teacher, encoded, SEEDS, 3, 4)
        for push in (0.05, 0.2)
    )
    first = 1 - small.sigmas[1]
    assert small.drift[0] == 0 and small.drift[1] == pytest.approx(0.05 * first, rel=1e-3)
    assert large.drift[1] == pytest.approx(0.2 * first, rel=1e-3)
    assert large.velocity_error[0] == pytest.approx(4 * small.velocity_error[0], rel=1e-3)
    assert large.drift[-1] > small.drift[-1] > small.drift[1]


def test_batches_change_nothing(backbone, encoded):
    student = PushedField("student", backbone, backbone.transformer, push=0.1)
    teacher = VelocityField("teacher", backbone, backbone.transformer)
    one, many = (path_drift(student, teacher, encoded, SEEDS, 2, batch) for batch in (1, 4))
    assert one.drift == pytest.approx(many.drift, abs=1e-5)
    assert one.velocity_error == pytest.approx(many.velocity_error, abs=1e-5)


def test_plots_are_pictures_for_every_task():
    by_steps = {"1": {"student": 10.0, "teacher": None}, "8": {"student": 20.0, "teacher": 21.0, "base": 9.0}}
    facts = {
        "sigmas": [1.0, 0.5, 0.0],
        "drift": [0.0, 0.1, 0.2],
        "velocity_error": [0.1, None],
        "metric": "psnr",
        "unit": "dB",
        "by_steps": by_steps,
    }
    plots = plot_paths({"a_b": facts, "c": facts})
    assert set(plots) == {"drift", "velocity_error", "steps-a_b", "steps-c"}
    assert all(data.startswith(b"\x89PNG") for data in plots.values())
    assert plots == plot_paths({"a_b": facts, "c": facts})
