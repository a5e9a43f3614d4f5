"""A student made under one set of CPU kernels is proved, registered and drawn from under another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from danceopd import steps
from danceopd.config.load import load_recipe
from danceopd.export.student import TOLERANCE, check_export, prove_export
from danceopd.inference.generate import open_student

pytestmark = pytest.mark.slow

SMALL = [
    "data.world={t2i: {train: 8, val: 4, test: 4}}",
    "teachers={base: {kind: base}}",
    "tasks={t2i: {teacher: base, needs_source: false, metrics: [psnr],"
    " gates: [{metric: psnr, max_drop: 60, champion_margin: 60}]}}",
    "distill={start: base, trainable: full, lr: 0.01, steps: 2, batch: 4, warmup: 1, rollout_steps: 2}",
    "evaluate={per_task: 4, steps: 2, drift: null, worst: 0, pictures: 1, resamples: 100}",
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_student_made_by_other_kernels_is_proved_registered_and_drawn_from(tiny_base, tmp_path, dtype):
    settings = [f"model.base={tiny_base}", f"model.dtype={dtype}", *SMALL]
    command = [sys.executable, "-m", "danceopd", "distill", "--recipe", "world", "--workspace", str(tmp_path)]
    command += [part for setting in settings for part in ("--set", setting)]
    oldest = os.environ | {"ATEN_CPU_CAPABILITY": "default"}  # this process computes with the newest the CPU has
    subprocess.run(command, env=oldest, check=True, capture_output=True, timeout=300)
    [made] = tmp_path.glob("students/*")

    run = steps.open_run(load_recipe("world", settings), tmp_path)
    teachers = {"base": steps.finetune_teacher(run, "base")}
    student = steps.distill_student(run, teachers)
    assert student.folder == made and len(list(tmp_path.glob("students/*"))) == 1, "it was made again"
    assert prove_export(made) <= TOLERANCE and check_export(made)
    evaluation = steps.evaluate_student(run, teachers, student)
    assert steps.register_student(run, teachers, student, evaluation).registered
    [drawn] = open_student(student.pipeline).draw(["red ring top left on white"], [None], [1], steps=2)
    assert drawn.size == (64, 64)
