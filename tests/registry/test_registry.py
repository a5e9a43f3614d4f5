"""The way into a real MLflow registry on SQLite: gates, proof of the export, aliases, and loading elsewhere."""

from __future__ import annotations

import base64
import contextlib
import copy
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from danceopd.backbones.base import Condition
from danceopd.config.load import parse_recipe
from danceopd.config.recipe import Recipe
from danceopd.config.sampling import read_sampling
from danceopd.errors import UserError
from danceopd.evaluation.measured import Measured, read_evaluation
from danceopd.export.student import WEIGHT_FILES, check_export, prove_export, write_probe
from danceopd.files import hash_folder, read_json
from danceopd.flow.fields import VelocityField
from danceopd.registry.champion import below_champion, cannot_compare, measured_unlike
from danceopd.registry.champion_teacher import Champion, fetch_champion
from danceopd.registry.logged_model import take_pipeline
from danceopd.registry.measure_anew import MeasuredAnew
from danceopd.registry.register import Registration, register_student
from danceopd.registry.versions import DECISION, RegisteredModel, open_model
from danceopd.tracking import mlflow_store

LINEAGE = {
    "recipe": "r1",
    "code": "c1",
    "git": "g1",
    "dvc": None,
    "data": "d1",
    "base": "b1",
    "teachers": {"base": "b1", "painter": "p1"},
}


def new_recipe(model: str) -> Recipe:
    """Drawing judged by a rate, editing by a rate and by decibels."""
    gates = {
        "t2i": [{"metric": "scene_accuracy", "retain": 0.95, "champion_margin": 0.03}],
        "local_edit": [
            {"metric": "edit_success", "retain": 0.95, "champion_margin": 0.03},
            {"metric": "preserved_psnr", "max_drop": 3.0, "champion_margin": 1.0},
        ],
    }
    tasks = {
        task: {
            "teacher": "base",
            "needs_source": task != "t2i",
            "metrics": [g["metric"] for g in rules],
            "gates": rules,
        }
        for task, rules in gates.items()
    }
    data = {
        "name": "tiny",
        "model": {
            "base": "world",
            "height": 64,
            "width": 64,
            "max_sequence_length": 24,
            "text_encoder_out_layers": [1, 2, 3],
        },
        "data": {"world": {"t2i": {"train": 4, "val": 2, "test": 2}}},
        "tasks": tasks,
        "teachers": {"base": {"kind": "base"}},
        "distill": {"lr": 0.01, "steps": 1, "batch": 3},
        "register_as": {"model": model, "experiment": "tiny"},
    }
    return parse_recipe(data, "test")


def new_metrics(scene: float = 0.97, edit: float = 0.95, psnr: float = 30.0) -> dict:
    """An evaluation in which each value is judged against a teacher of 1.0, 1.0 and 32 dB."""

    def gate(task: str, metric: str, rule: str, limit: float, value: float) -> dict:
        return {"task": task, "metric": metric, "rule": rule, "limit": limit, "value": value, "passed": value >= limit}

    gates = [
        gate("t2i", "scene_accuracy", "retain 0.95", 0.95, scene),
        gate("local_edit", "edit_success", "retain 0.95", 0.9, edit),
        gate("local_edit", "preserved_psnr", "max_drop 3.0", 29.0, psnr),
    ]
    student = {"t2i": {"scene_accuracy": scene}, "local_edit": {"edit_success": edit, "preserved_psnr": psnr}}
    return {
        "recipe": "tiny",
        "split": "test",
        "records": {"t2i": 64, "local_edit": 64},
        "held_out": {"t2i": "h1", "local_edit": "h2"},
        "size": [64, 64],
        "steps": 8,
        "seed": 0,
        "tools": {},
        "scores": {"student": student},
        "units": {"scene_accuracy": "rate", "edit_success": "rate", "preserved_psnr": "dB"},
        "statistics": {"confidence": 0.95, "resamples": 500},
        "gates": gates,
        "passed": all(g["passed"] for g in gates),
    }


def new_values(count: int = 100, **right: float) -> dict:
    """Values per record whose means are `scene`, `edit` and `psnr`; the same records are wrong in all of them."""
    means = {"scene": 0.97, "edit": 0.95, "psnr": 30.0} | right

    def rate(mean: float) -> list[float]:
        return [float(row < round(count * mean)) for row in range(count)]

    ids = [f"r{row}" for row in range(count)]
    decibels = [means["psnr"] + row % 5 - 2 for row in range(count)]
    edits = {"edit_success": rate(means["edit"]), "preserved_psnr": decibels}
    return {
        "student": {"t2i": {"scene_accuracy": rate(means["scene"])}, "local_edit": edits},
        "ids": {"t2i": ids, "local_edit": ids},
    }


def export_student(backbone, folder: Path) -> Path:
    """A student's product folder as distillation leaves it."""
    backbone.save(folder / "pipeline", backbone.transformer)
    (folder / "pipeline" / "README.md").write_text("before")
    condition = Condition(backbone.encode_prompts(["", "tiny"]), None, 64, 64)
    field = VelocityField("student", backbone, backbone.transformer)
    write_probe(field, condition, folder)
    prove_export(folder)
    return folder


@pytest.fixture(scope="module")
def student(backbone, tmp_path_factory) -> Path:
    return export_student(backbone, tmp_path_factory.mktemp("student"))


class Shop:
    """One store, many registered models."""

    def __init__(self, workspace: Path, student: Path):
        self.workspace, self.student = workspace, student
        self.uri = mlflow_store.default_tracking_uri(workspace)
        self.client = mlflow_store.open_client(self.uri)

    def register(
        self, model: str, digest: str, metrics: dict, values: dict | None = None, champion=None, **changes
    ) -> Registration:
        """Register the student under another digest, as if it were another one."""
        evaluation = self.workspace / f"evaluation-{model}-{digest}"
        evaluation.mkdir(exist_ok=True)
        (evaluation / "metrics.json").write_text(json.dumps(metrics))
        if values is not None:
            (evaluation / "values.json").write_text(json.dumps(values))
        (evaluation / "report.html").write_text("<p>report</p><!-- beside the champion -->")
        lineage = {**LINEAGE, "student": digest, **changes}
        made = (new_recipe(model), self.student, evaluation, lineage)
        return register_student(*made, self.uri, self.workspace, champion)

    def aliases(self, model: str) -> dict[str, str]:
        return {name: str(number) for name, number in self.client.get_registered_model(model).aliases.items()}


@pytest.fixture(scope="module")
def shop(student, tmp_path_factory) -> Shop:
    environment = pytest.MonkeyPatch()
    environment.delenv(mlflow_store.ENVIRONMENT, raising=False)
    yield Shop(tmp_path_factory.mktemp("shop"), student)
    environment.undo()


# ------------------------------------------------------------------------------------------- figures, without a store


def failed_gates(metrics: dict) -> list[str]:
    return Measured(metrics, None).failed_gates()


def fallen(recipe: Recipe, ours: dict, theirs: dict, table: dict | None = None) -> list[str]:
    champion = Measured(theirs, None)
    return below_champion(recipe, Measured(ours, None), champion, "champion", champion.own_tasks, table)


def test_failed_gates_name_task_metric_and_figures():
    assert failed_gates(new_metrics()) == []
    assert failed_gates(new_metrics(scene=0.5, psnr=20.123)) == [
        "t2i.scene_accuracy is 0.5, its gate is 0.95 (retain 0.95)",
        "local_edit.preserved_psnr is 20.12, its gate is 29 (max_drop 3.0)",
    ]
    unknown = new_metrics()
    unknown["gates"][0] |= {"value": None, "limit": None, "passed": False}
    assert failed_gates(unknown) == ["t2i.scene_accuracy is unknown, its gate is unknown (retain 0.95)"]
    assert failed_gates(new_metrics() | {"passed": False}) == ["the evaluation did not pass"]


def test_a_failed_gate_shows_its_interval():
    metrics = new_metrics(scene=0.5) | {"statistics": {"confidence": 0.9, "resamples": 200}}
    metrics["gates"][0]["interval"] = [0.4123, 0.6]
    assert failed_gates(metrics) == [
        "t2i.scene_accuracy is 0.5, its gate is 0.95 (retain 0.95), 90 % interval 0.4123 to 0.6"
    ]


def test_a_fall_below_the_champion_shows_the_interval_of_the_difference():
    from danceopd.evaluation.statistics import compare_values

    ours, theirs = new_values(edit=0.8), new_values()
    settings = {"seed": 0, "resamples": 500, "confidence": 0.95}
    paired = compare_values(
        Measured({}, ours).by_record,
        Measured({}, theirs).by_record,
        {"local_edit": {"edit_success": 0.03}},
        "version 1",
        settings,
    )
    found = paired["local_edit"]["edit_success"]
    assert (found["verdict"], found["difference"]) == ("worse", pytest.approx(-0.15))
    [line] = fallen(new_recipe("m"), new_metrics(edit=0.8), new_metrics(), paired)
    assert line.startswith("local_edit.edit_success is 0.8, the champion has 0.95 (margin 0.03), difference -0.15, ")
    assert f"95 % interval {found['low']:.4g} to {found['high']:.4g}" in line


def test_metrics_that_do_not_fit_are_refused(tmp_path):
    recipe = new_recipe("m")
    with pytest.raises(UserError, match="no such file"):
        read_evaluation(tmp_path, recipe)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="no scores of a student"):
        read_evaluation(tmp_path, recipe)
    fewer = new_metrics()
    fewer["gates"].pop()
    (tmp_path / "metrics.json").write_text(json.dumps(fewer))
    with pytest.raises(UserError, match=r"gate on local_edit.preserved_psnr was not judged"):
        read_evaluation(tmp_path, recipe)


@pytest.mark.parametrize(
    ("ours", "count"),
    [
        ({}, 0),
        ({"scene": 0.94}, 0),  # at its margin exactly
        ({"scene": 0.9399}, 1),
        ({"psnr": 29.0}, 0),
        ({"psnr": 28.9}, 1),
        ({"scene": 0.9, "edit": 0.9, "psnr": 20.0}, 3),
        ({"scene": float("nan")}, 1),
        ({"scene": None}, 1),
        ({"scene": 1.0, "edit": 1.0, "psnr": 40.0}, 0),
    ],
)
def test_the_margin_decides(ours, count):
    metrics = new_metrics()
    student = metrics["scores"]["student"]
    for name, value in ours.items():
        task, metric = {
            "scene": ("t2i", "scene_accuracy"),
            "edit": ("local_edit", "edit_success"),
            "psnr": ("local_edit", "preserved_psnr"),
        }[name]
        student[task][metric] = value
    assert len(fallen(new_recipe("m"), metrics, new_metrics())) == count


def test_a_champion_that_can_do_more_is_not_replaced():
    theirs = new_metrics()
    theirs["gates"].append({"task": "global_style", "metric": "psnr"})
    lines = fallen(new_recipe("m"), new_metrics(), theirs)
    assert lines == ["the champion also does task 'global_style', this student does not"]


def test_a_benchmarks_gate_has_its_margin_and_a_dropped_benchmark_blocks_nothing():
    gate = {"metric": "psnr", "max_drop": 9, "champion_margin": 0.5}
    data = new_recipe("m").model_dump(mode="json")
    data["evaluate"]["benchmarks"] = {"b": {"input": "f", "task": "t2i", "metrics": ["psnr"], "gates": [gate]}}
    recipe, ours, theirs = parse_recipe(data, "test"), new_metrics(), new_metrics()
    for metrics, value in ((ours, 29.0), (theirs, 30.0)):
        metrics["scores"]["student"]["b"] = {"psnr": value}
        metrics["benchmarks"] = {"b": {"task": "t2i", "content": "c"}}
        metrics["gates"].append({"task": "b", "metric": "psnr"})
    [line] = fallen(recipe, ours, theirs)
    assert line.startswith("b.psnr is 29, the champion has 30 (margin 0.5)")
    assert fallen(new_recipe("m"), new_metrics(), theirs) == []


def test_a_gate_that_could_not_be_judged_is_refused_with_the_reason():
    metrics = new_metrics(scene=0.5)
    metrics["gates"][0] |= {"value": None, "reason": "clip is not there"}
    [line] = failed_gates(metrics)
    assert line.startswith("t2i.scene_accuracy is unknown") and line.endswith(": clip is not there")


def test_a_new_ability_is_not_held_against_the_student():
    theirs = new_metrics()
    del theirs["scores"]["student"]["local_edit"]
    theirs["gates"] = theirs["gates"][:1]
    assert fallen(new_recipe("m"), new_metrics(), theirs) == []


def test_measurements_are_alike_only_in_every_condition():
    ours = {"held_out": {"a": "1", "b": "2"}, "size": [64, 64], "steps": 8, "seed": 0, "tools": {"clip": "c"}}
    assert measured_unlike(ours, copy.deepcopy(ours)) == []
    assert measured_unlike(ours, ours | {"held_out": {"a": "1", "c": "9"}, "tools": {"judge": "j"}}) == []
    for name, value, told in [
        ("held_out", {"a": "5"}, "records of a"),
        ("size", [64, 128], "picture size"),
        ("steps", 4, "sampling steps"),
        ("seed", 1, "seed"),
        ("tools", {"clip": "d"}, "weights of clip"),
    ]:
        assert measured_unlike(ours, ours | {name: value}) == [told]
    judged = ours | {"tools": {"judge": "j"}}
    assert measured_unlike(judged, ours | {"tools": {"judge": "k"}}) == ["judge"]
    older = ours | {"held_out": None, "tools": None}
    assert all("did not note them" in told for told in measured_unlike(ours, older))
    assert len(measured_unlike(older, ours)) == 2


def judged_metrics(**moved) -> dict:
    canaries = {"pictures": "p", "at": "t", "tolerance": 0.1, "verdicts": {"a": [8, 6, 6, 6], "b": [4, 4, 6, 5]}}
    return new_metrics() | {"tools": {"judge": "j"}, "canaries": canaries | moved}


def test_a_judge_that_moved_on_its_canaries_is_another_condition():
    ours = Measured(judged_metrics(), None)
    assert cannot_compare(ours, Measured(judged_metrics(at="later"), None)) == []
    moved = Measured(judged_metrics(verdicts={"a": [8, 6, 6, 6], "b": [5, 4, 6, 5]}), None)
    [told] = cannot_compare(ours, moved)
    assert told == "the judge has moved by 0.5 of 10 on its canaries (tolerance 0.1)"
    assert "not asked" in cannot_compare(ours, Measured(judged_metrics() | {"canaries": None}, None))[0]
    assert cannot_compare(ours, Measured(new_metrics(), None)) == []  # one that no judge scored
    other = Measured(judged_metrics(pictures="q") | {"tools": {"judge": "k"}}, None)
    assert cannot_compare(ours, other) == ["judge"]


# ------------------------------------------------------------------------------------------------------- the export


def test_an_export_gives_the_students_velocity(student):
    assert prove_export(student) < 1e-5
    assert check_export(student) == hash_folder(student / "pipeline", WEIGHT_FILES)


def test_a_proof_needs_no_encoder_and_heeds_nothing_of_it(backbone, tmp_path):
    folder = export_student(backbone, tmp_path)
    shutil.rmtree(folder / "pipeline" / "text_encoder")  # another machine's would round otherwise
    assert prove_export(folder) < 1e-5


def test_a_changed_export_is_refused(student, backbone, tmp_path):
    folder = export_student(backbone, tmp_path)
    file = folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"] += 0.01
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="not the weights that were proved"):
        check_export(folder)
    with pytest.raises(UserError, match="not the trained one"):
        prove_export(folder)
    settings = json.loads((folder / "pipeline" / "danceopd.json").read_text())
    (folder / "pipeline" / "danceopd.json").write_text(json.dumps(settings | {"height": 128}))
    with pytest.raises(UserError, match="velocity's shape is"):
        prove_export(folder)


def test_a_nan_in_the_export_is_refused(backbone, tmp_path):
    folder = export_student(backbone, tmp_path)
    kept = load_file(folder / "probe.safetensors")
    save_file(kept | {"velocity": torch.full_like(kept["velocity"], float("nan"))}, folder / "probe.safetensors")
    with pytest.raises(UserError, match="not the trained one"):
        prove_export(folder)


def test_a_missing_probe_or_proof_is_named(backbone, tmp_path):
    folder = export_student(backbone, tmp_path)
    (folder / "proof.json").unlink()
    with pytest.raises(UserError, match=r"proof\.json: no such file; distill the student again"):
        check_export(folder)
    kept = load_file(folder / "probe.safetensors")
    for name in ("velocity", "prompt"):
        save_file({other: tensor for other, tensor in kept.items() if other != name}, folder / "probe.safetensors")
        with pytest.raises(UserError, match=f"holds no '{name}'"):
            prove_export(folder)
    (folder / "probe.safetensors").unlink()
    with pytest.raises(UserError, match=r"probe\.safetensors: no such file; distill the student again"):
        prove_export(folder)


# --------------------------------------------------------------------------------------------------------- the store


@pytest.mark.slow
def test_a_failed_gate_registers_nothing(shop):
    result = shop.register("refused", "s1", new_metrics(scene=0.5))
    assert result == Registration(
        False, None, [], ["t2i.scene_accuracy is 0.5, its gate is 0.95 (retain 0.95)"], None, None
    )
    assert shop.client.search_registered_models("name = 'refused'") == []


@pytest.mark.slow
def test_a_lineage_with_a_gap_registers_nothing(shop):
    with pytest.raises(UserError, match="lineage: 'student' is missing"):
        register_student(new_recipe("gap"), shop.student, shop.workspace, LINEAGE, shop.uri, shop.workspace)


@pytest.mark.slow
def test_a_broken_export_registers_nothing(shop, backbone, tmp_path):
    folder = export_student(backbone, tmp_path)
    file = folder / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"more": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(UserError, match="not the weights that were proved"):
        Shop(shop.workspace, folder).register("broken", "s1", new_metrics())
    assert shop.client.search_registered_models("name = 'broken'") == []


@pytest.mark.slow
def test_champions_come_and_go(shop):
    first = shop.register("race", "s1", new_metrics())
    assert (first.registered, first.version, first.alias, first.reasons) == (True, "1", ["champion"], [])
    assert first.champion_before is None
    assert shop.aliases("race") == {"champion": "1"}

    worse = shop.register("race", "s2", new_metrics(edit=0.91, psnr=30.0))
    assert (worse.version, worse.alias, worse.champion_before) == ("2", ["challenger"], "1")
    assert worse.reasons == [
        "local_edit.edit_success is 0.91, the champion (version 1) has 0.95 (margin 0.03)",
    ]
    assert shop.aliases("race") == {"champion": "1", "challenger": "2"}

    better = shop.register("race", "s3", new_metrics(scene=0.99, edit=0.94))
    assert (better.version, better.alias, better.reasons) == ("3", ["champion"], [])
    assert better.champion_before == "1"
    assert shop.aliases("race") == {"champion": "3", "previous": "1"}

    for digest, metrics, before in (("s1", new_metrics(), None), ("s2", new_metrics(edit=0.91), "1")):
        again = shop.register("race", digest, metrics)
        assert again.registered and again.champion_before == before
    assert shop.aliases("race") == {"champion": "3", "previous": "1"}
    assert len(shop.client.search_model_versions("name = 'race'")) == 3


@pytest.mark.slow
def test_a_version_tells_how_it_compares_with_the_champion(shop, student, tmp_path):
    shop.register("told", "s1", new_metrics(), new_values())
    second = shop.register("told", "s2", new_metrics(edit=0.93, psnr=31.0), new_values(edit=0.93, psnr=31.0))
    assert second.alias == ["champion"]
    files = Path(shop.client.download_artifacts(second.run_id, "evaluation", str(tmp_path)))
    metrics = json.loads((files / "metrics.json").read_text())
    table = metrics["comparisons"]["champion"]
    assert (metrics["champion"], table["t2i"]["scene_accuracy"]["verdict"]) == ("1", "equal")
    assert table["local_edit"]["preserved_psnr"]["verdict"] == "better"
    assert (table["local_edit"]["edit_success"]["verdict"], table["local_edit"]["edit_success"]["sure"]) == (
        "equal",
        False,
    )
    page = (files / "report.html").read_text()
    assert "Beside the champion (version 1): better on 1, equal on 2 of 3 figures" in page and "+1.0 dB" in page
    card = Path(shop.client.download_artifacts(second.run_id, "README.md", str(tmp_path))).read_text()
    assert "| local_edit | preserved_psnr | dB | 31 |" in card and "| student | `s2` |" in card
    assert (student / "pipeline" / "README.md").read_text() == "before"  # a finished product stays as it is


# --------------------------------------------------------------------------------------------------- the command line


class Desk:
    """`danceopd registry ...` on a shop's store, for one registered model."""

    def __init__(self, shop: Shop, model: str, monkeypatch, capsys, folder: Path):
        import yaml

        self.shop, self.model, self._patch, self._capsys = shop, model, monkeypatch, capsys
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(new_recipe(model).model_dump(mode="json")))

    def __call__(self, *words: str, uri: str | None = None) -> tuple[int, str, str]:
        from danceopd.cli import main as cli

        more = ["--recipe", str(self.recipe), "--tracking-uri", uri or self.shop.uri]
        self._patch.setattr(sys, "argv", ["danceopd", "registry", *words, *more])
        self._capsys.readouterr()  # what registering said
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = self._capsys.readouterr()
        return stop.value.code or 0, said.out, said.err


@pytest.fixture
def desk(shop, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda model: Desk(shop, model, monkeypatch, capsys, tmp_path)


@pytest.mark.slow
def test_promote_and_roll_back_by_command(shop, desk):
    shop.register("desk", "s1", new_metrics(), new_values())
    shop.register("desk", "s2", new_metrics(edit=0.91), new_values(edit=0.91))
    command = desk("desk")
    code, out, err = command("promote")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "version 2 is not promoted: local_edit.edit_success is 0.91, the champion (version 1) has 0.95" in err
    assert "difference -0.04, 95 % interval" in err and "--force" in err
    assert shop.aliases("desk") == {"champion": "1", "challenger": "2"}

    assert command("rollback")[0] == 2  # nothing was champion before
    assert command("promote", "2", "--force")[1] == "desk: champion is version 2, previous is 1\n"
    assert shop.aliases("desk") == {"champion": "2", "previous": "1"}
    assert command("promote", "champion")[1] == "desk: champion is version 2\n"
    assert command("rollback")[1] == "desk: champion is version 1, previous is 2\n"
    assert shop.aliases("desk") == {"champion": "1", "previous": "2"}

    better = shop.register("desk", "s3", new_metrics(scene=0.99), new_values(scene=0.99))
    assert better.alias == ["champion"] and shop.aliases("desk") == {"champion": "3", "previous": "1"}
    assert command("rollback")[1] == "desk: champion is version 1, previous is 3\n"

    code, out, _ = command("compare", "2", "champion")
    row = next(line for line in out.splitlines() if "edit_success" in line)
    assert code == 0 and "0.91" in row and "0.95" in row and "-0.04" in row and "worse" in row
    code, out, _ = command("list")
    assert code == 0 and "champion" in out and "local_edit.edit_success is 0.91" in " ".join(out.split())
    assert len([line for line in out.splitlines() if " s1 " in line or " s2 " in line or " s3 " in line]) == 3


@pytest.mark.slow
def test_a_version_whose_gate_fails_is_never_promoted(shop, desk):
    shop.register("spoiled", "s1", new_metrics())
    second = shop.register("spoiled", "s2", new_metrics(edit=0.91))
    run = shop.client.get_run(second.run_id)
    file = Path(run.info.artifact_uri.removeprefix("file://"), "evaluation", "metrics.json")
    spoiled = new_metrics(scene=0.2)
    spoiled["gates"][0]["interval"] = [0.15, 0.25]
    file.write_text(json.dumps(spoiled))
    for more in ([], ["--force"]):
        code, _, err = desk("spoiled")("promote", "2", *more)
        assert code == 2 and err.count("\n") == 1
        assert "fails its gates and is not promoted: t2i.scene_accuracy is 0.2" in err
        assert "95 % interval 0.15 to 0.25" in err
    assert shop.aliases("spoiled") == {"champion": "1", "challenger": "2"}


@pytest.mark.slow
def test_wrong_names_are_one_line_with_the_right_ones(shop, desk, tmp_path):
    shop.register("named", "s1", new_metrics())
    command = desk("named")
    for words, said in [
        (["promote", "9"], "version of named: '9' is not known; choose one of: 1, champion"),
        (["promote", "best"], "version of named: 'best' is not known; choose one of: 1, champion"),
        (["compare"], "version of named: 'challenger' is not known"),
        (["rollback"], "no version is called 'previous'"),
    ]:
        code, out, err = command(*words)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    code, _, err = desk("unheard")("list")
    assert code == 2 and "registered model (register_as.model): 'unheard' is not known" in err and "named" in err
    nowhere = tmp_path / "none" / "mlflow.db"
    code, _, err = command("list", uri=f"sqlite:///{nowhere}")
    assert code == 2 and "no such file; register a student first" in err and not nowhere.parent.exists()


@pytest.mark.slow
def test_versions_measured_apart_are_shown_but_not_compared(shop, desk):
    shop.register("apart", "s1", new_metrics(), new_values())
    other = new_metrics(scene=1.0) | {"size": [128, 128]}
    shop.register("apart", "s2", other, new_values(scene=1.0))
    code, out, _ = desk("apart")("compare")
    assert code == 0 and "measured otherwise (picture size): the figures cannot be compared" in out
    assert "better" not in out and "0.97" in out


@pytest.mark.slow
def test_a_student_of_more_data_is_compared_and_promoted_by_itself(shop):
    shop.register("grown", "s1", new_metrics(), new_values())
    second = shop.register("grown", "s2", new_metrics(scene=0.99), new_values(scene=0.99), data="d2", dvc="m2")
    assert (second.alias, second.reasons) == (["champion"], [])
    worse = shop.register("grown", "s3", new_metrics(edit=0.91), new_values(edit=0.91), data="d3")
    assert worse.alias == ["challenger"] and "local_edit.edit_success is 0.91" in worse.reasons[0]


@pytest.mark.slow
def test_a_champion_of_other_records_is_held_by_what_this_run_measured_of_it(shop, tmp_path):
    shop.register("anew", "s1", new_metrics(), new_values())
    moved = {"held_out": {"t2i": "h9", "local_edit": "h2"}}

    def again(**figures) -> MeasuredAnew:
        return MeasuredAnew("anew", "1", Measured(new_metrics(**figures) | moved, new_values(**figures)))

    lower = new_metrics(scene=0.95) | moved
    ours = new_values(scene=0.95)
    worse = shop.register("anew", "s2", lower, ours, champion=again(scene=0.99))
    assert worse.alias == ["challenger"] and len(worse.reasons) == 1
    assert worse.reasons[0].startswith("t2i.scene_accuracy is 0.95, the champion (version 1) has 0.99 (margin 0.03)")
    better = shop.register("anew", "s3", lower, ours, champion=again(scene=0.96))
    assert (better.alias, better.reasons) == (["champion"], [])
    files = Path(shop.client.download_artifacts(better.run_id, "evaluation", str(tmp_path)))
    kept = Measured(read_json(files / "metrics.json"), read_json(files / "values.json")).version("anew", "1")
    assert kept.scores["t2i"]["scene_accuracy"] == 0.96 and sum(kept.by_record[1]["t2i"]["scene_accuracy"]) == 96


@pytest.mark.slow
def test_margins_do_not_add_up_over_generations(shop):
    """Each falls by a quarter of its margin; the fifth in a row would lie more than a whole one below the first."""
    best = 33.0
    for generation in range(5):
        value = best - 0.25 * generation
        done = shop.register("sinking", f"s{generation}", new_metrics(psnr=value))
        assert (done.alias, done.reasons) == (["champion"], []), generation
    fifth = shop.register("sinking", "s5", new_metrics(psnr=best - 1.25))
    assert fifth.alias == ["challenger"]
    assert fifth.reasons == [
        "local_edit.preserved_psnr is 31.75, the champion (version 5) has 32, which lies below the best one so far, at "
        "33 (margin 1)"
    ]
    risen = shop.register("sinking", "s6", new_metrics(psnr=best + 0.5))
    assert risen.alias == ["champion"]
    assert json.loads(RegisteredModel(shop.client, "sinking").champion().tags["below_best"]) == {}
    RegisteredModel(shop.client, "sinking").rollback()  # and the mark goes back with the champion
    again = shop.register("sinking", "s7", new_metrics(psnr=best - 1.5))
    assert "at 33 (margin 1)" in again.reasons[0]


class Torn(Exception):
    """What ends a process between two calls of the store."""


class TornClient:
    """A client of the store that fails at its n-th change of an alias."""

    def __init__(self, client, calls: int):
        self._client, self._left = client, calls

    def __getattr__(self, name: str):
        if name in ("set_registered_model_alias", "delete_registered_model_alias"):
            if not self._left:
                raise Torn
            self._left -= 1
        return getattr(self._client, name)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_crash_between_two_alias_moves_is_mended(shop, action):
    name = f"crash-{action}"
    shop.client.create_registered_model(name)
    whole = RegisteredModel(shop.client, name)
    for number in "1234":
        shop.client.create_model_version(name, str(shop.workspace))
        if number != "4":
            whole.promote(number)
    before = shop.aliases(name)
    assert before == {"champion": "3", "previous": "2"}
    after = {"promote": {"champion": "4", "previous": "3"}, "rollback": {"champion": "2", "previous": "3"}}[action]
    for calls in range(4):
        torn = RegisteredModel(TornClient(shop.client, calls), name)
        with contextlib.suppress(Torn):
            torn.promote("4") if action == "promote" else torn.rollback()
        found = shop.aliases(name)
        assert found.get("previous") != found["champion"], (calls, found)
        whole.settle()
        assert shop.aliases(name) in (before, after), calls
        for alias, number in before.items():
            shop.client.set_registered_model_alias(name, alias, number)
        shop.client.set_model_version_tag(name, "3", "replaced", "2")


@pytest.mark.slow
def test_a_store_of_many_models_lists_them_all(shop):
    from danceopd.registry.versions import open_model

    for number in range(102):
        shop.client.create_registered_model(f"many-{number:03d}")
    assert open_model(shop.uri, "many-101").name == "many-101"
    with pytest.raises(UserError, match=r"many-000.*many-101"):
        open_model(shop.uri, "many-102")


@pytest.mark.slow
def test_a_champion_measured_otherwise_stays(shop):
    shop.register("moved", "s1", new_metrics())
    why = MeasuredAnew("moved", "1", None, "its files cannot be fetched (gone)")
    other = shop.register("moved", "s2", new_metrics(scene=1.0) | {"steps": 4}, champion=why)
    assert (other.version, other.alias) == ("2", ["challenger"])
    assert "was measured otherwise (sampling steps)" in other.reasons[0]
    assert "could not be measured anew: its files cannot be fetched (gone)" in other.reasons[0]
    assert "set the alias 'champion' on it" in other.reasons[0]
    RegisteredModel(shop.client, "moved").promote("2")
    assert shop.aliases("moved") == {"champion": "2", "previous": "1"}


@pytest.mark.slow
def test_a_champion_without_figures_stays(shop):
    first = shop.register("blind", "s1", new_metrics())
    run = shop.client.get_run(first.run_id)
    Path(run.info.artifact_uri.removeprefix("file://"), "evaluation", "metrics.json").unlink()
    second = shop.register("blind", "s2", new_metrics(scene=1.0))
    assert second.alias == ["challenger"] and "cannot be compared" in second.reasons[0]


@pytest.mark.slow
def test_a_registration_that_broke_off_is_finished(shop):
    shop.register("torn", "s1", new_metrics())
    shop.client.delete_model_version_tag("torn", "1", DECISION)
    shop.client.delete_registered_model_alias("torn", "champion")
    assert shop.register("torn", "s1", new_metrics()).alias == ["champion"]
    assert shop.aliases("torn") == {"champion": "1"}
    assert len(shop.client.search_model_versions("name = 'torn'")) == 1


@pytest.mark.slow
def test_nobody_is_champion_of_an_unknown_model(shop):
    assert RegisteredModel(shop.client, "unknown").champion() is None


LOADER = """
import base64, io, json, sys
import mlflow, numpy as np, pandas as pd
from PIL import Image

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/served@champion")
png = base64.b64decode(sys.argv[2])
table = pd.DataFrame({"prompt": ["red square", "make it blue"], "image": [None, png], "seed": [3, None]})
drawn = model.predict(table, params={"steps": 2})["image"]
pictures = [np.asarray(Image.open(io.BytesIO(data))) for data in drawn]
alone = model.predict(table[1:].assign(image=sys.argv[2]), params={"steps": 2})["image"]
import danceopd
print(json.dumps({
    "shapes": [p.shape for p in pictures],
    "sums": [int(p.sum()) for p in pictures],
    "apart": int(np.abs(np.asarray(Image.open(io.BytesIO(list(alone)[0])), int) - pictures[1]).max()),
    "code": danceopd.__file__,
}))
"""


@pytest.mark.slow
def test_another_process_draws_and_edits_by_alias(shop, student, tmp_path):
    from PIL import Image

    from danceopd.inference.generate import encode_picture, open_student

    result = shop.register("served", "s1", new_metrics())
    version = shop.client.get_model_version("served", result.version)
    wanted = {
        "code": "c1",
        "git": "g1",
        "dvc": "none",
        "data": "d1",
        "base": "b1",
        "recipe": "r1",
        "student": "s1",
        "teacher.painter": "p1",
        "gate.t2i.scene_accuracy": "0.97 (retain 0.95)",
    }
    assert wanted.items() <= version.tags.items()
    run = shop.client.get_run(result.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["local_edit/preserved_psnr"] == 30.0
    source = Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50).convert("RGB")
    png = encode_picture(source)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", mlflow_store.ENVIRONMENT)}
    ran = subprocess.run(
        [sys.executable, "-c", LOADER, shop.uri, base64.b64encode(png).decode()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    drawer = open_student(student / "pipeline")
    here = drawer.draw(["red square", "make it blue"], [None, source], [3, 0], 2)
    assert said["shapes"] == [[64, 64, 3]] * 2 and said["apart"] <= 1
    for total, picture in zip(said["sums"], here, strict=True):
        assert abs(total - int(np.asarray(picture, np.int64).sum())) <= 64 * 64 * 3
    logged = Path(said["code"]).parents[2]
    assert (logged / "MLmodel").is_file(), "danceopd must come from the logged model"
    files = {path.relative_to(logged).as_posix() for path in logged.rglob("*") if path.is_file()}
    assert not [name for name in files if Path(name).suffix in (".pkl", ".pickle", ".pt", ".bin")]
    assert {"code/danceopd/inference/generate.py", "pyfunc_model.py", "artifacts/pipeline/danceopd.json"} <= files
    assert all(name.endswith((".py", ".pyc")) for name in files if name.startswith("code/"))


def weights_of(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob(WEIGHT_FILES))}


def stored_pipeline(shop: Shop, model: str) -> Path:
    """Where the store keeps the pipeline folder of a model's first version."""
    with mlflow_store.current_store(shop.uri) as mlflow:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{model}/1/artifacts/pipeline"))


@pytest.mark.slow
def test_weights_in_a_store_beside_the_student_are_its_own_files(shop, backbone, tmp_path_factory):
    own = export_student(backbone, tmp_path_factory.mktemp("own"))
    wanted = hash_folder(own / "pipeline", WEIGHT_FILES)
    assert Shop(shop.workspace, own).register("linked", "s1", new_metrics()).registered
    stored = stored_pipeline(shop, "linked")
    ours, theirs = weights_of(own / "pipeline"), weights_of(stored)
    assert ours.keys() == theirs.keys() and len(ours) >= 3
    assert all(theirs[name].samefile(path) and path.stat().st_nlink == 2 for name, path in ours.items())
    fetched = fetch_champion(Champion("linked", "1", "s1", wanted), shop.uri, tmp_path_factory.mktemp("fetched"))
    assert all(path.samefile(ours[name]) for name, path in weights_of(fetched).items())
    assert (fetched / "README.md").stat().st_nlink == 1 and read_sampling(fetched) == read_sampling(stored)
    shutil.rmtree(fetched)
    writable = next(iter(theirs.values()))
    writable.chmod(0o644)  # as a store has it that was copied, or is another's
    copied = take_pipeline(stored, tmp_path_factory.mktemp("copied"))
    alone = [name for name, path in weights_of(copied).items() if not path.samefile(theirs[name])]
    assert alone == [writable.relative_to(stored).as_posix()] and writable.stat().st_mode & 0o200
    writable.chmod(0o444)
    shutil.rmtree(copied)
    # Nobody writes into them by one name, and the other outlives a removal.
    assert not any(path.stat().st_mode & 0o222 for path in ours.values())
    shutil.rmtree(own)
    assert hash_folder(stored, WEIGHT_FILES) == wanted
    assert {path.stat().st_nlink for path in weights_of(stored).values()} == {1}
    described = yaml.safe_load((stored.parents[1] / "MLmodel").read_text())
    weights = sum(path.stat().st_size for path in weights_of(stored).values())
    assert weights < described["model_size_bytes"] < weights + 2**20
    assert described["signature"] and described["flavors"]["python_function"]["artifacts"]["pipeline"]


@pytest.mark.slow
def test_a_store_elsewhere_gets_each_weight_once_and_from_where_it_lies(shop, backbone, monkeypatch, tmp_path_factory):
    """Another file system knows no second names, as a bucket does not."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    sent, send, send_all = [], LocalArtifactRepository.log_artifact, LocalArtifactRepository.log_artifacts

    def one(self, local_file, artifact_path=None):
        sent.append(Path(local_file))
        send(self, local_file, artifact_path)

    def many(self, local_dir, artifact_path=None):
        sent.extend(path for path in Path(local_dir).rglob("*") if path.is_file())
        send_all(self, local_dir, artifact_path)

    def refuse(*args, **options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    own = export_student(backbone, tmp_path_factory.mktemp("own"))
    monkeypatch.setattr(LocalArtifactRepository, "log_artifact", one)
    monkeypatch.setattr(LocalArtifactRepository, "log_artifacts", many)
    monkeypatch.setattr(os, "link", refuse)
    assert Shop(shop.workspace, own).register("sent", "s1", new_metrics()).registered
    ours = weights_of(own / "pipeline")
    assert sorted(path for path in sent if path.suffix == ".safetensors") == sorted(ours.values())
    stored = stored_pipeline(shop, "sent")
    assert hash_folder(stored, WEIGHT_FILES) == hash_folder(own / "pipeline", WEIGHT_FILES)
    assert not any(path.samefile(ours[name]) for name, path in weights_of(stored).items())


@pytest.mark.slow
def test_a_model_whose_weights_cannot_be_stored_has_failed(shop, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "link", refuse)
        full.setattr(shop.client.__class__, "log_model_artifact", refuse)
        with pytest.raises(OSError, match="No space left"):
            shop.register("full", "s1", new_metrics())
    assert shop.client.search_registered_models("name = 'full'") == []
    experiment = shop.client.get_experiment_by_name("tiny").experiment_id
    [newest, *_] = shop.client.search_logged_models([experiment])
    assert newest.status.name == "FAILED"
    assert shop.register("full", "s1", new_metrics()).version == "1"


@pytest.mark.slow
def test_a_store_under_another_writers_lock_is_one_line(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow_store.open_client(uri).create_registered_model("m")
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="database is locked"):
            open_model(uri, "m")
    assert open_model(uri, "m").lines() == []
