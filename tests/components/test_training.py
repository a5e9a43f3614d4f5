"""Where a student is trained: what each way runs, what the step's pod asks for, and which wishes do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from components import training
from components.checking import check, inputs_revision, of_each_teacher, write_checked
from components.running import RUN_ID, Step, notes_folder
from components.training import Way, job_commands, job_name, own_pod_command, pod_of, train_student
from danceopd import steps
from danceopd.config.load import load_recipe
from danceopd.errors import UserError
from danceopd.files import read_json, write_json
from danceopd.workspace import Product

RECIPE = load_recipe("world")
GPUS = {"accelerator": "nvidia.com/gpu", "node_selector": {"pool": "a"}, "cpu": "96", "memory": "800Gi"}
CPUS = {"accelerator": "", "node_selector": {}, "cpu": "2", "memory": "4Gi"}
JOB = {"image": "d@sha256:1", "cpu": 8, "node-selector": ["pool=a", "zone=b"], "toleration": ["nvidia.com/gpu"]}


@pytest.fixture
def step(tmp_path) -> Step:
    return Step(RECIPE, tmp_path, {})


@pytest.fixture
def products(tmp_path) -> tuple[Product, Product, dict[str, Product]]:
    """Base, data and teachers, known by their digests alone."""
    teachers = {name: Product(tmp_path / name, f"digest-{name}", {}) for name in RECIPE.teachers}
    return Product(tmp_path, "b", {}), Product(tmp_path, "d", {"content": "c"}), teachers


@pytest.fixture
def handed(monkeypatch, step, products) -> list[list[str]]:
    """What a step would run, which then makes the student."""
    commands: list[list[str]] = []

    def make(what: str, command: list[str], variables: dict[str, str] | None = None) -> None:
        commands.append([*(f"{name}={value}" for name, value in (variables or {}).items()), *command])
        folder = steps.student_folder(steps.Run(RECIPE, step.workspace, *products[:2]), products[2])
        write_json(folder / steps.STEP, {"digest": "made", "facts": {}})

    monkeypatch.setattr(training, "hand_over", make)
    return commands


def test_a_pod_that_trains_asks_for_all_and_one_that_follows_a_job_for_little():
    assert pod_of(Way(gpus=8), GPUS) == {"gpus": "8", "nodes": {"pool": "a"}, "cpu": "96", "memory": "800Gi"}
    watching = {"gpus": "0", "nodes": {}, "cpu": "500m", "memory": "2Gi"}
    for on in ("Job", "TrainJob"):
        assert pod_of(Way(on, 2, 8), GPUS) == watching
    assert pod_of(Way(), GPUS)["nodes"] == {}, "on CPUs, no GPU node"
    assert pod_of(Way(), CPUS) == {"gpus": "0", "nodes": {}, "cpu": "2", "memory": "4Gi"}


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"on": "pod"}, "distill_on: 'pod' is not known; choose one of: Job, TrainJob, step"),
        ({"nodes": 2}, "nodes 2: a step's own pod is on one; set distill_on to Job or TrainJob"),
        ({"nodes": 0, "on": "Job"}, "at least 1 node"),
        ({"gpus": -1}, "0 or more GPUs"),
        ({"gpus": 2}, "gpus 2: this pipeline was compiled for CPUs; compile it with --placement, or set 0"),
    ],
)
def test_wishes_that_do_not_fit(way, message):
    with pytest.raises(UserError, match=message):
        pod_of(Way(**way), CPUS)


def test_the_check_settles_recipe_revision_and_pod(step, tmp_path):
    names = ("resolved", "revision", "gpus", "cpu", "memory", "nodes")
    found = check(step, "", "", "step", 1, 8, GPUS)
    write_checked(found, *(str(tmp_path / "out" / name) for name in names))
    written = {name: (tmp_path / "out" / name).read_text() for name in names}
    assert written["resolved"] == RECIPE.model_dump_json()
    assert written["revision"] == inputs_revision(RECIPE) == step.results["data_revision"]
    assert (written["gpus"], written["cpu"], written["memory"]) == ("8", "96", "800Gi")
    assert read_json(tmp_path / "out" / "nodes") == {"pool": "a"}
    each = [{"teacher": name, "recipe": found.recipe, "revision": found.revision} for name in RECIPE.teachers]
    assert of_each_teacher(RECIPE, found) == each
    assert check(step, "given", "", "step", 1, 0, CPUS).revision == "given"


def test_several_gpus_of_the_pod_get_a_process_each_and_share_its_cores(step, products, handed, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "10")
    assert train_student(step, *products, Way(gpus=4), {}, "http://mlflow").digest == "made"
    [[threads, store, *command]] = handed
    assert (threads, store) == ("OMP_NUM_THREADS=2", "MLFLOW_TRACKING_URI=http://mlflow")
    recipe = Path(command[command.index("--recipe") + 1])
    assert command == own_pod_command(Way(gpus=4), recipe, step.workspace)
    assert command[:6] == ["danceopd.launch", "--standalone", "--nproc-per-node", "4", "-m", "danceopd"]
    assert load_recipe(str(recipe)) == RECIPE
    train_student(step, *products, Way(gpus=4), {})
    assert len(handed) == 1, "a student that is there is not trained again"


def test_a_job_is_rendered_with_what_the_placement_gives_and_followed(step, products, handed, monkeypatch):
    monkeypatch.setenv(RUN_ID, "8d1f-0002-Aa")
    train_student(step, *products, Way("Job", 2, 8), JOB)
    render, submit = handed
    assert submit == [
        "danceopd",
        "job",
        "submit",
        str(notes_folder(step.workspace) / "danceopd-distill-8d1f0002aa.yaml"),
        "--wait",
    ]
    said = " ".join(render)
    for option in (
        "--kind Job",
        "--nodes 2",
        "--gpus 8",
        "--image d@sha256:1",
        f"--workspace {step.workspace}",
        "--node-selector pool=a --node-selector zone=b",
        "--toleration nvidia.com/gpu",
    ):
        assert option in said


def test_one_gpu_is_trained_in_the_step_itself(step, products, handed, monkeypatch):
    monkeypatch.setattr(steps, "distill_student", lambda *given: given)
    run = steps.Run(RECIPE, step.workspace, *products[:2])
    assert train_student(step, *products, Way(gpus=1), {}) == (run, products[2])
    assert handed == []


def test_a_train_jobs_nodes_are_its_runtimes(tmp_path):
    render, _ = job_commands(Way("TrainJob", 2, 8), JOB, tmp_path / "r", tmp_path, "name", tmp_path / "m")
    assert "--node-selector" not in render and "--toleration" not in render and "--image" in render


def test_a_job_is_named_after_its_run(monkeypatch):
    names = set()
    for run in ("5b6e0f5c-1111-4c1e-9d2f-000000000000", "5b6e0f5c-2222-4c1e-9d2f-000000000000"):
        monkeypatch.setenv(RUN_ID, run)
        assert job_name() == job_name()
        names.add(job_name())
    assert len(names) == 2


def test_a_training_that_left_no_student_is_said(step, products, monkeypatch):
    monkeypatch.setattr(training, "hand_over", lambda *_: None)
    with pytest.raises(UserError, match="no finished step there"):
        train_student(step, *products, Way(gpus=2), {})
