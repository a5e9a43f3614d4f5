"""The whole pipeline through the command line, on the shipped base, at the smallest scale that still learns."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from danceopd.tracking import delivery, mlflow_store

pytestmark = pytest.mark.slow

SMALL = [
    "data.world={t2i: {train: 60, val: 8, test: 12}, local_edit: {train: 200, val: 8, test: 12},"
    " global_style: {train: 200, val: 8, test: 12}}",
    "tasks.local_edit.metrics=[psnr, edit_success, preserved_psnr]",
    "tasks.local_edit.gates=[{metric: psnr, max_drop: 20, champion_margin: 20}]",
    "tasks.global_style.gates=[{metric: psnr, max_drop: 20, champion_margin: 20}]",
    "tasks.t2i.gates=[{metric: scene_accuracy, retain: 0.5, champion_margin: 0.5}]",
    "teachers.local_edit={kind: base}",
    "teachers.global_style.train.steps=160",
    "teachers.global_style.train.batch=16",
    "distill.steps=12",
    "distill.log_every=4",
    "distill.preview_every=0",
    "distill.lr=0.002",
    "evaluate.per_task=12",
]


def danceopd(*arguments, cwd):
    command = [sys.executable, "-c", "from danceopd.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


def run_pipeline(workspace, *more):
    settings = [part for setting in [*SMALL, *more] for part in ("--set", setting)]
    return danceopd("pipeline", "run", "--workspace", workspace, *settings, cwd=workspace.parent)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A finished run: its workspace and its process."""
    workspace = tmp_path_factory.mktemp("chain") / "runs"
    return workspace, run_pipeline(workspace)


def student_folder(workspace) -> Path:
    return next((workspace / "students").iterdir()) / "pipeline"


def test_the_chain_ends_well_and_prints_its_table(chain):
    workspace, done = chain
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for word in ("scene_accuracy", "edit_success", "student", "report.html", "champion"):
        assert word in done.stdout
    assert (workspace / "pipeline.yaml").is_file()
    assert len(list((workspace / "teachers").iterdir())) == 3
    metrics = json.loads(next((workspace / "evaluations").glob("*/metrics.json")).read_text())
    assert metrics["passed"]
    assert metrics["scores"]["student"]["t2i"]["scene_accuracy"] > 0.5


def test_mlflow_has_one_run_with_a_child_a_step(chain):
    workspace, _ = chain
    client = mlflow_store.open_client(f"sqlite:///{workspace / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("danceopd-world").experiment_id])
    [parent] = [run for run in runs if delivery.PARENT_TAG not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run is not parent}
    steps = {"base", "data", "distill", "evaluate", "register"}
    assert set(children) == {f"{step} world" for step in steps} | {
        f"teacher {name}" for name in ("base", "local_edit", "global_style")
    }
    assert {run.data.tags[delivery.PARENT_TAG] for run in children.values()} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    wanted = children["evaluate world"].data.metrics["t2i/scene_accuracy"]
    assert parent.data.metrics["t2i/scene_accuracy"] == wanted
    [version] = client.search_model_versions("name = 'danceopd-world'")
    registered = client.get_logged_model(client.get_run(version.run_id).outputs.model_outputs[0].model_id)
    assert {m.key: m.value for m in registered.metrics}["t2i/scene_accuracy"] == wanted
    [trained] = client.get_run(version.run_id).inputs.model_inputs
    assert trained.model_id == children["distill world"].outputs.model_outputs[0].model_id
    assert delivery.pending(workspace) == []


def test_a_second_run_reuses_everything(chain):
    workspace, _ = chain
    before = {p: p.stat().st_mtime_ns for p in workspace.glob("*/*/step.json")}
    again = run_pipeline(workspace)
    assert again.returncode == 0, again.stderr[-3000:]
    assert before == {p: p.stat().st_mtime_ns for p in workspace.glob("*/*/step.json")}
    assert "distill step" not in again.stdout


def test_the_registered_student_draws_and_edits_from_another_process(chain, tmp_path):
    workspace, _ = chain
    script = (
        "import sys, mlflow, pandas\n"
        f"mlflow.set_tracking_uri('sqlite:///{workspace / 'mlflow.db'}')\n"
        "model = mlflow.pyfunc.load_model('models:/danceopd-world@champion')\n"
        "first = model.predict(pandas.DataFrame({'prompt': ['red ring top left on white'], 'seed': [3]}))\n"
        "edit = pandas.DataFrame({'prompt': ['make it sepia'], 'image': [first['image'][0]], 'seed': [3]})\n"
        "open(sys.argv[1], 'wb').write(model.predict(edit)['image'][0])\n"
    )
    out = tmp_path / "edit.png"
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Image.open(io.BytesIO(out.read_bytes())).size == (64, 64)


def test_generate_draws_and_edits_from_the_students_folder(chain, tmp_path):
    workspace, _ = chain
    model = student_folder(workspace)
    drawn = danceopd("generate", model, "blue cross bottom right on sand", "--out", "a.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    edited = danceopd("generate", model, "make it night", "--image", "a.png", "--out", "b.png", cwd=tmp_path)
    assert edited.returncode == 0, edited.stderr
    assert Image.open(tmp_path / "b.png").size == (64, 64)
    missing = danceopd("generate", model, "make it night", "--image", "gone.png", "--out", "c.png", cwd=tmp_path)
    assert missing.returncode == 2
    assert "gone.png" in missing.stderr
    assert not (tmp_path / "c.png").exists()


def test_a_step_that_fails_is_named_and_the_summary_is_written_though_mlflow_is_away(tmp_path, monkeypatch):
    monkeypatch.setenv(mlflow_store.ENVIRONMENT, "http://127.0.0.1:9")  # the discard port, where nothing listens
    workspace = tmp_path / "runs"
    done = run_pipeline(workspace, "teachers.global_style.train.lr=1e-12", "teachers.global_style.train.steps=2")
    assert done.returncode == 1
    assert "teachers.global_style changes the base's velocity by 0 of its size" in done.stderr
    summary = next((workspace / "notes").glob("*/summary.md")).read_text()
    assert "changes the base's velocity" in summary
    assert not (workspace / "students").exists()
    assert "finetune base | MLflow store http://127.0.0.1:9: no server answers there" in done.stdout
    assert len(delivery.pending(workspace)) == 5, "base, data and three teachers"
