"""Running here: which cores, what is forgotten, what stays cached, and how a failed step is reported."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from kfp import dsl
from kfp.local.cache import LocalCache

from components.cards import write_card
from components.running import RUN_ID
from danceopd.config.load import load_recipe
from danceopd.files import write_json
from danceopd.steps.base import resolve_base
from danceopd.workspace import STEP, open_product
from pipelines import local as runner
from pipelines.local import (
    StepFailed,
    drop_stale_entries,
    forget_products,
    inputs_revision,
    run_local,
    share_cores,
)

BASE_ONLY = [
    "teachers={base: {kind: base}}",
    "tasks.local_edit.teacher=base",
    "tasks.global_style.teacher=base",
    "distill.start=base",
    "data.world={t2i: {train: 1, val: 1, test: 1}, local_edit: {train: 1, val: 1, test: 1}, "
    "global_style: {train: 1, val: 1, test: 1}}",
]


@pytest.mark.parametrize(
    ("cores", "overrides", "finetune"),
    [("2", [], 1), ("8", [], 4), ("1", [], 1), ("4", BASE_ONLY, 4)],
)
def test_trained_teachers_share_the_cores(monkeypatch, cores, overrides, finetune):
    monkeypatch.setenv("OMP_NUM_THREADS", cores)
    threads = share_cores(load_recipe("world", [*overrides, "model.base=elsewhere"]))
    assert (threads.finetune, threads.others) == (finetune, int(cores))


@pytest.mark.parametrize("setting", ["", "0", "many"])
def test_without_a_setting_all_usable_cores_count(monkeypatch, setting):
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: range(6), raising=False)
    assert share_cores(load_recipe("world", ["model.base=elsewhere"])).others == 6


@pytest.mark.parametrize("recipe", ["world", "world_open"])
@pytest.mark.parametrize(("cores", "spin", "others"), [("8", "5000", 2), ("1", "5000", 1), ("8", None, 1)])
def test_a_small_world_takes_few_threads(monkeypatch, recipe, cores, spin, others):
    monkeypatch.setenv("OMP_NUM_THREADS", cores)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if spin is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", spin)
    threads = share_cores(load_recipe(recipe))
    assert (threads.finetune, threads.others) == (1, others)


def product_with_card(folder, cards, name):
    place = folder / name
    write_json(place / STEP, {"step": "teachers", "key": name, "digest": name, "facts": {}, "seconds": 1})
    artifact = dsl.Model(name="field", uri=str(cards / name))
    write_card(artifact, open_product(place), name)
    return artifact


@pytest.fixture
def cached(tmp_path):
    """A cache of kfp's own with four entries: two single cards, a list of both, one without artifacts."""
    cache = LocalCache(str(tmp_path / "cache"))
    one, two = (product_with_card(tmp_path / "teachers", tmp_path / "cards", name) for name in ("one", "two"))
    outputs = {"one": {"field": one}, "two": {"field": two}, "list": {"fields": [one, two]}, "text": {"Output": ["a"]}}
    for key, value in outputs.items():
        cache.put(key, value)
    return cache


def held(cache) -> set[str]:
    return {key for key in ("one", "two", "list", "text") if cache.get(key) is not None}


def test_entries_stay_while_their_products_lie_there(tmp_path, cached):
    assert drop_stale_entries(tmp_path / "cache") == []
    assert held(cached) == {"one", "two", "list", "text"}


def test_entries_of_a_deleted_product_are_dropped(tmp_path, cached):
    shutil.rmtree(tmp_path / "teachers" / "one")
    assert all("is gone" in problem for problem in drop_stale_entries(tmp_path / "cache"))
    assert held(cached) == {"two", "text"}


def test_entries_of_a_rebuilt_product_are_dropped(tmp_path, cached):
    marker = tmp_path / "teachers" / "two" / STEP
    write_json(marker, json.loads(marker.read_text()) | {"digest": "other"})
    assert all("another product" in problem for problem in drop_stale_entries(tmp_path / "cache"))
    assert held(cached) == {"one", "text"}


def test_no_cache_yet(tmp_path):
    assert drop_stale_entries(tmp_path / "none") == []


def test_forgetting_takes_products_and_nothing_else(tmp_path):
    write_json(tmp_path / "teachers" / "a" / STEP, {})
    for kept in ("mine.txt", "teachers/notes.txt", "datasets/world/manifest.json", "mlflow.db", "deep/er/x/step.json"):
        write_json(tmp_path / kept, {})
    write_json(tmp_path / "kfp" / "cache" / "x.json", {})
    forget_products(tmp_path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    expected = {"mine.txt", "teachers/notes.txt", "datasets/world/manifest.json", "mlflow.db", "deep/er/x/step.json"}
    assert left == expected


def weights(folder, content: str):
    """What `resolve_base` and a checkpoint teacher take for a folder of weights."""
    write_json(folder / "model_index.json", {})
    (folder / "weights.bin").write_text(content)
    return folder


def test_two_bases_that_stay_where_they_are_have_two_digests(tmp_path):
    """Encodings, teachers and cards are kept by the base's digest: bases that share one would share all of these."""
    recipes = [load_recipe("world", [f"model.base={weights(tmp_path / name, name)}"]) for name in ("a", "b")]
    first, second = (resolve_base(recipe, tmp_path / "ws") for recipe in recipes)
    assert first.digest != second.digest


@pytest.mark.parametrize("setting", ["model.base={}", "teachers.local_edit={{kind: checkpoint, path: {}}}"])
def test_weights_replaced_behind_a_path_are_another_revision(tmp_path, setting):
    folder = weights(tmp_path / "weights", "old")
    recipe = load_recipe("world", [setting.format(folder)])
    before = inputs_revision(recipe)
    assert inputs_revision(recipe) == before
    weights(folder, "newer")
    assert inputs_revision(recipe) != before


@pytest.mark.slow
def test_a_failed_step_is_named_with_its_reason_and_the_summary_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv(RUN_ID, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: a store that is away
    nowhere = tmp_path / "no-such-base"
    recipe = load_recipe("world", [*BASE_ONLY, f"model.base={nowhere}"])
    with pytest.raises(StepFailed, match=f"resolve-base: model.base '{nowhere}'"):
        run_local(recipe, tmp_path / "ws")
    shown = capsys.readouterr().out
    assert "check-recipe | finished" in shown and "resolve-base | failed: model.base" in shown
    assert "1 journal(s) stay in the workspace" in shown, "the base's; the run fails for its own reason"
    assert "Traceback" not in shown and "finetune" not in shown
    [summary] = (tmp_path / "ws" / "notes").glob("*/summary.md")
    assert summary.read_text().startswith("# DanceOPD run: FAILED")
    assert str(nowhere) in summary.read_text()
    assert RUN_ID not in os.environ


@pytest.mark.parametrize(("registered", "ends"), [(False, True), (None, False), (True, False)])
def test_a_student_that_fails_a_gate_is_an_outcome_and_any_other_failure_is_not(
    tmp_path, monkeypatch, registered, ends
):
    """`register` fails in both cases; the table and what to try next are for a student that was judged."""
    write_json(tmp_path / "evaluation" / "metrics.json", {"passed": False})

    def fail(pipeline, arguments, workspace, run):
        note = {"step": "register", "state": "failed", "error": "x", "shortfalls": ["t2i valid: 5 points short"]}
        note |= {"evaluation": str(tmp_path / "evaluation")}
        note |= {} if registered is None else {"registration": {"registered": registered}}
        write_json(workspace / "notes" / run / "register.json", note)
        raise StepFailed("register: x")

    monkeypatch.setattr(runner, "run_here", fail)
    monkeypatch.setattr(runner, "build_pipeline", lambda options: None)
    if ends:
        done = run_local(load_recipe("world"), tmp_path / "ws")
        assert done.shortfalls == ["t2i valid: 5 points short"] and not done.registration["registered"]
    else:
        with pytest.raises(StepFailed, match="register: x"):
            run_local(load_recipe("world"), tmp_path / "ws")
