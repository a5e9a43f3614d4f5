"""A task is added to a registered champion, at the smallest scale: refused while spoiled, champion, rolled back."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from danceopd import steps
from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition
from danceopd.backbones.bases import shipped_folder
from danceopd.config.load import load_recipe
from danceopd.errors import UserError
from danceopd.export.student import prove_export, write_probe
from danceopd.files import read_json, write_json
from danceopd.flow.field_io import load_field, probe
from danceopd.flow.fields import VelocityField
from danceopd.registry import champion_teacher
from danceopd.registry.champion import compare_versions
from danceopd.registry.register import register_student
from danceopd.registry.versions import RegisteredModel
from danceopd.tracking import mlflow_store

pytestmark = pytest.mark.slow

SMALL = [
    "data.world={t2i: {train: 8, val: 4, test: 6}, outline: {train: 36, val: 4, test: 6}}",
    "tasks={t2i: {teacher: champion, needs_source: false, metrics: [psnr],"
    " gates: [{metric: psnr, max_drop: 0.5, champion_margin: 0.5}]},"
    " outline: {teacher: outline, needs_source: true, metrics: [psnr],"
    " gates: [{metric: psnr, max_drop: 0.5, champion_margin: 1}]}}",
    "teachers.outline.train={trainable: full, optimizer: muon, lr: 0.04, steps: 60, batch: 8, warmup: 4}",
    "distill.steps=1",
    "distill.lr=1.0e-9",
    "distill.warmup=1",
    "distill.batch=4",
    "distill.rollout_steps=2",
    "distill.optimizer=adamw",
    "evaluate={per_task: 6, steps: 2, drift: null, worst: 0, pictures: 1, resamples: 100}",
]
MODEL = "danceopd-world"
LINEAGE = {
    "recipe": "r",
    "code": "c",
    "git": None,
    "dvc": None,
    "data": "other",
    "base": "b",
    "teachers": {},
    "student": "first",
}


def recipe_with(*settings):
    return load_recipe("world_outline", [*SMALL, *settings])


FIRST = [
    "data.world={t2i: {train: 1}}",
    "teachers={base: {kind: base}}",
    "distill.start=base",
    "tasks={t2i: {teacher: base, needs_source: false, metrics: [psnr],"
    " gates: [{metric: psnr, max_drop: 9, champion_margin: 0.5}]}}",
]


def register_first(workspace) -> str:
    """Register the base with other output weights, as an earlier run on other data would have; returns the store."""
    recipe = load_recipe("world", FIRST)
    base = shipped_folder("world")
    backbone = load_backbone(base, recipe.model)
    network = backbone.new_transformer(base)
    with torch.no_grad():
        network.proj_out.weight.mul_(1.05)
    student, evaluation = workspace / "first", workspace / "first-evaluation"
    backbone.save(student / "pipeline", network)
    condition = Condition(backbone.encode_prompts(["", recipe.name]), None, 64, 64)
    write_probe(VelocityField("s", backbone, network), condition, student)
    prove_export(student)
    gate = {"task": "t2i", "metric": "psnr", "rule": "max_drop 9", "limit": 0.0, "value": 1.0, "passed": True}
    metrics = {
        "split": "test",
        "records": {"t2i": 6},
        "steps": 2,
        "seed": 0,
        "gates": [gate],
        "passed": True,
        "scores": {"student": {"t2i": {"psnr": 1.0}}},
    }
    write_json(evaluation / "metrics.json", metrics)
    uri = mlflow_store.default_tracking_uri(workspace)
    assert register_student(recipe, student, evaluation, LINEAGE, uri, workspace).alias == ["champion"]
    return uri


def run_chain(recipe, workspace):
    base = steps.resolve_base(recipe, workspace)
    run = steps.Run(recipe, workspace, base, steps.build_data(recipe, workspace, repo=workspace))
    teachers = {name: steps.finetune_teacher(run, name) for name in recipe.teachers}
    student = steps.distill_student(run, teachers)
    evaluation = steps.evaluate_student(run, teachers, student)
    lineage = steps.lineage(run, teachers, student)
    result = steps.register_student(run, teachers, student, evaluation)
    return teachers, lineage, student, evaluation, result


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A workspace with a registered champion: (workspace, store)."""
    environment = pytest.MonkeyPatch()
    environment.delenv(mlflow_store.ENVIRONMENT, raising=False)
    environment.setenv("OMP_NUM_THREADS", "1")
    workspace = tmp_path_factory.mktemp("shop")
    yield workspace, register_first(workspace)
    environment.undo()


def aliases(uri: str) -> dict[str, str]:
    found = mlflow_store.open_client(uri).get_registered_model(MODEL).aliases
    return {name: str(number) for name, number in found.items()}


@pytest.fixture(scope="module")
def spoiled(shop):
    """A student that learned nothing of the new task: teachers, lineage, student, evaluation, registration."""
    workspace, _ = shop
    return run_chain(recipe_with(), workspace)


def test_the_champion_itself_is_the_teacher(shop, spoiled):
    workspace, _ = shop
    recipe, product = recipe_with(), spoiled[0]["champion"]
    assert product.facts["registered"] == {"model": MODEL, "version": "1"}
    assert read_json(product.folder / "champion.json")["student"] == "first"
    backbone = load_backbone(shipped_folder("world"), recipe.model)
    condition = Condition(backbone.encode_prompts(["", "world"]), None, 64, 64)
    wanted = load_file(workspace / "first" / "probe.safetensors")["velocity"]
    torch.testing.assert_close(probe(load_field(backbone, "champion", product.folder), condition), wanted)


def test_a_student_spoiled_on_one_task_is_refused_with_its_figures_and_interval(shop, spoiled):
    _, uri = shop
    *_, evaluation, result = spoiled
    gates = {gate["task"]: gate for gate in read_json(evaluation.folder / "metrics.json")["gates"]}
    assert gates["t2i"]["passed"] and not gates["outline"]["passed"]
    assert not result.registered and aliases(uri) == {"champion": "1"}
    [reason] = result.reasons
    low, high = gates["outline"]["interval"]
    assert reason == (
        f"outline.psnr is {gates['outline']['value']:.4g}, its gate is {gates['outline']['limit']:.4g} "
        f"(max_drop 0.5), 95 % interval {low:.4g} to {high:.4g}"
    )


def with_a_lower_gate(evaluation, folder):
    """The same evaluation, as if the new task's gate had asked for less."""
    shutil.copytree(evaluation, folder)
    metrics = read_json(folder / "metrics.json")
    metrics["gates"] = [gate | {"limit": 0.0, "passed": True} for gate in metrics["gates"]]
    write_json(folder / "metrics.json", metrics | {"passed": True})
    return folder


def test_a_better_one_replaces_the_champion_and_a_rollback_restores_it(shop, spoiled):
    workspace, uri = shop
    lineage, student, evaluation, _ = spoiled[1:]
    recipe, allowed = recipe_with(), with_a_lower_gate(evaluation.folder, workspace / "allowed")
    result = register_student(recipe, student.folder, allowed, lineage, uri, workspace)
    assert (result.version, result.alias, result.reasons) == ("2", ["champion"], [])
    assert aliases(uri) == {"champion": "2", "previous": "1"}
    client = mlflow_store.open_client(uri)
    assert client.get_model_version(MODEL, "2").tags["added_to"] == f"{MODEL} version 1"

    # The two were measured on different data by their own runs; the second run measured both.
    for first, second, sign in (("2", "1", 1), ("1", "2", -1)):
        found = compare_versions(RegisteredModel(client, MODEL), recipe, first, second)
        assert found.unlike == [] and set(found.table) >= {"t2i"}
        scores = read_json(evaluation.folder / "metrics.json")["scores"]
        wanted = scores["student"]["t2i"]["psnr"] - scores["champion"]["t2i"]["psnr"]
        assert found.table["t2i"]["psnr"]["difference"] == pytest.approx(sign * wanted, abs=1e-3)

    found = champion_teacher.find_champion(recipe, uri)
    assert (found.version, found.student) == ("2", student.digest)

    file = workspace / "recipe.json"
    file.write_text(recipe.model_dump_json())
    # In a process of its own: kfp looks through all modules at each step it composes, and here there are thousands.
    words = ["pipeline", "champion", "rollback", "--recipe", str(file), "--workspace", str(workspace)]
    run = [sys.executable, "-c", "from danceopd.cli.main import main; main()", *words]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{MODEL}: champion is version 1, previous is 2" in done.stdout
    assert aliases(uri) == {"champion": "1", "previous": "2"}
    [outcome] = (workspace / "kfp").rglob("outcome")
    assert "| 1 | champion | champion |" in outcome.read_text()


def test_a_champion_that_is_not_there_is_one_line(shop, tmp_path):
    uri = mlflow_store.default_tracking_uri(tmp_path)
    line = "recipe 'world_outline' starts from the champion of '{}', and .* has none; .* make run"
    with pytest.raises(UserError, match=line.format(MODEL)):
        champion_teacher.find_champion(recipe_with(), uri)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=line.format("nobody")):
        champion_teacher.find_champion(recipe_with("register_as.model=nobody"), shop[1])


def test_weights_that_are_not_the_registered_ones_are_refused(shop, tmp_path):
    _, uri = shop
    found = champion_teacher.find_champion(recipe_with(), uri)
    assert (champion_teacher.fetch_champion(found, uri, tmp_path / "a") / "transformer").is_dir()
    with pytest.raises(UserError, match=r"version \d: its weights are not the ones that were registered"):
        champion_teacher.fetch_champion(replace(found, weights="0" * 64), uri, tmp_path / "b")
    with pytest.raises(UserError, match="version 99: its files cannot be fetched"):
        champion_teacher.fetch_champion(replace(found, version="99"), uri, tmp_path / "c")
