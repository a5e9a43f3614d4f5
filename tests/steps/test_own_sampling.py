"""The chain with a few-step student that keeps guidance: every step, the registry and MLflow draw it in its own way."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from PIL import Image
from test_steps import SMALL, run_to_student

from danceopd import steps
from danceopd.config.load import load_recipe
from danceopd.config.sampling import Sampling, read_sampling
from danceopd.files import read_json
from danceopd.inference.generate import Sample, open_student
from danceopd.inference.side_by_side import find_origins, open_side_by_side
from danceopd.tracking import mlflow_store

FEW = [
    "distill.start=base",
    "distill.trainable=lora",
    "distill.target=displacement",
    "distill.target_steps=2",
    "distill.rollout_steps=2",
    "distill.window=every_step",
    "distill.guidance={keep: 3}",
    "evaluate.steps=4",
    "evaluate.drift={records: 2, steps: [2]}",
    "tasks.t2i.metrics=[psnr]",
    "tasks.t2i.gates=[{metric: psnr, max_drop: 60, champion_margin: 60}]",
]


@pytest.mark.slow
def test_a_few_step_student_that_keeps_guidance_is_drawn_so_everywhere(tiny_base, tmp_path):

    recipe = load_recipe("world", [f"model.base={tiny_base}", *SMALL, *FEW])
    base, data, teachers, student = run_to_student(recipe, tmp_path)
    own = Sampling(steps=2, guidance=3.0, fixed=True)
    assert read_sampling(student.pipeline) == own
    history = read_json(student.folder / "history.json")
    assert history[-1]["forwards_per_sample"] > 3 + 3  # a step of rollout in the mean, guided; small steps; the update
    run = steps.Run(recipe, tmp_path, base, data)
    evaluation = steps.evaluate_student(run, teachers, student)
    metrics = read_json(evaluation.folder / "metrics.json")
    assert Sampling.model_validate(metrics["sampling"]["student"]) == own
    assert metrics["sampling"]["global_style"] == {"steps": 4, "guidance": 3.0, "fixed": False}
    assert "student in 2, guided at 3" in (evaluation.folder / "report.md").read_text()
    drawer = open_student(student.pipeline)
    assert drawer.sampling == own
    [picture] = drawer.draw_samples([Sample("a red ring")])
    [asked] = drawer.draw_samples([Sample("a red ring", steps=2, guidance=3.0)])
    assert picture.tobytes() == asked.tobytes()
    beside, _ = open_side_by_side(student.pipeline, find_origins(student.pipeline))
    assert (beside.sampling, beside.samplings["global_style"]) == (own, Sampling(steps=4, guidance=3.0))
    done = steps.register_student(run, teachers, student, evaluation)
    assert done.registered
    with mlflow_store.current_store(run.store) as mlflow:
        loaded = mlflow.pyfunc.load_model(f"models:/{recipe.register_as.model}/{done.version}")
    [drawn] = loaded.predict(pd.DataFrame({"prompt": ["a red ring"]}))["image"]
    assert Image.open(io.BytesIO(drawn)).tobytes() == picture.tobytes()
    again = steps.measure_champion(run, student, evaluation)
    assert again is None  # the champion is this student
