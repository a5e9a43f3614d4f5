"""Studies: what a plan refuses, what a cell may spend, what is kept when one is stopped, what the table says."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import yaml

from danceopd import workspace
from danceopd.config.load import load_recipe
from danceopd.config.recipe import MERGES, METHODS, BaseTeacher, CheckpointTeacher
from danceopd.config.shipped import shipped_names
from danceopd.errors import UserError
from danceopd.files import read_json, write_json
from danceopd.flow.fields import VelocityField
from danceopd.flow.guidance import GuidedField
from danceopd.methods.queries import BY_STEP, NAMED
from danceopd.preflight.forwards import expected_forwards
from danceopd.studies import cells
from danceopd.studies import shared as products
from danceopd.studies.plan import STUDIES, Budget, load_study, steps_within
from danceopd.studies.run import run_study
from danceopd.studies.table import Estimate, counted_metrics, estimate, markdown, retention, terminal_table, verdict
from danceopd.studies.workers import usable_cores, work_off

SMALL = [
    "data.world={t2i: {train: 12, val: 4, test: 4}, local_edit: {train: 12, val: 4, test: 4},"
    " global_style: {train: 12, val: 4, test: 4}}",
    "teachers={base: {kind: base}}",
    "tasks.t2i={teacher: base, needs_source: false, metrics: [scene_accuracy]}",
    "tasks.local_edit={teacher: base, needs_source: true, metrics: [psnr],"
    " gates: [{metric: psnr, retain: 0.5, champion_margin: 1}]}",
    "tasks.global_style={teacher: base, needs_source: true, metrics: [psnr, ssim],"
    " gates: [{metric: psnr, retain: 0.5, champion_margin: 1}]}",
    "distill.start=base",
    "distill.batch=6",
    "distill.rollout_steps=3",
    "distill.checkpoint_every=0",
    "evaluate.steps=2",
]


def plan(base, **changes) -> dict:
    return {
        "name": "tiny",
        "recipe": "world",
        "set": [f"model.base={base}", *SMALL],
        "seeds": [0, 1],
        "budget": {"steps": 2},
        "records": 3,
        "variants": {"early": {"set": ["distill.window=semantic"]}, "late": {"set": ["distill.window=low_noise"]}},
    } | changes


def write(folder, data):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder outside any repository: data is generated into the workspace."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_study_resumes_where_it_stopped(tiny_base, here, monkeypatch):
    study = load_study(write(here, plan(tiny_base)))
    summary = run_study(study, here / "ws", 1)
    folder = here / "ws" / "studies" / "tiny"
    assert {p.name for p in folder.iterdir()} >= {"study.json", "study.md", "study.png", "cells"}
    files = sorted((folder / "cells").iterdir())
    assert [p.name.split("-")[0] for p in files] == ["early", "early", "late", "late"]
    made = {p: p.stat().st_mtime_ns for p in files}
    files[1].unlink()

    monkeypatch.setattr(workspace, "code_revision", lambda: "another commit")
    again = run_study(study, here / "ws", 1)
    changed = [p for p in files if p.stat().st_mtime_ns != made[p]]
    assert changed == [files[1]]
    for row, before in zip(again["variants"], summary["variants"], strict=True):
        assert row["scores"] == before["scores"]
        assert row["retention"] == before["retention"]
    result = read_json(files[1])
    assert result["steps"] == 2
    assert result["forwards"] == pytest.approx(result["forwards_per_sample"] * 12)


@pytest.mark.slow
def test_cells_are_found_under_another_label_and_not_with_other_settings(tiny_base, here):
    study = load_study(write(here, plan(tiny_base, seeds=[0])))
    run_study(study, here / "ws", 1)
    folder = here / "ws" / "studies" / "tiny" / "cells"
    renamed = {"first": {"set": ["distill.window=semantic"]}, "other": {"set": ["distill.window=mid"]}}
    summary = run_study(load_study(write(here, plan(tiny_base, seeds=[0], variants=renamed))), here / "ws", 1)
    assert {row["variant"] for row in summary["variants"]} == {"first", "other"}
    assert len(list(folder.iterdir())) == 3


def test_a_new_knob_keeps_results_and_a_new_default_does_not(tiny_base, here):
    few = {"seeds": [0], "records": 1, "budget": {"steps": 1}}
    study = load_study(write(here, plan(tiny_base, variants={"early": {}}, **few)))
    run_study(study, here / "ws", 1)
    [path] = (here / "ws" / "studies" / "tiny" / "cells").iterdir()
    result = read_json(path) | {"scores": "as they were"}
    del result["settings"]["distill"]["ema"]  # as if the code had gained it since
    write_json(path, result)
    shared = products.open_shared(study.recipe_of("early", 0, 1), {"base"}, here / "ws", path.parents[1])
    cell = cells.Cell("early", study.recipe_of("early", 0, 1), 5.0)
    assert cells.find_result(cell, shared)["scores"] == "as they were"
    result["settings"]["distill"]["warmup"] = 21  # as if the default had been another
    write_json(path, result)
    assert cells.find_result(cell, shared) is None


def test_another_file_behind_a_teachers_path_is_another_study(tmp_path):
    file = tmp_path / "style.safetensors"
    teachers = {"style": CheckpointTeacher(kind="lora", path=str(file)), "base": BaseTeacher(kind="base")}
    with pytest.raises(UserError, match=r"teachers\.style\.path"):
        products.given_weights(teachers, tmp_path)
    found = []
    for content in (b"first", b"other"):
        file.write_bytes(content)
        found.append(products.given_weights(teachers, tmp_path))
    assert found[0] != found[1] and found[0].keys() == {"style"}


@pytest.mark.slow
def test_merges_take_nothing_and_are_scored(tiny_base, here):
    variants = {"merge": {"set": ["distill.method=merge_average"]}, "joint": {"set": ["distill.method=joint"]}}
    budget = {"forwards": 300}
    summary = run_study(load_study(write(here, plan(tiny_base, variants=variants, budget=budget))), here / "ws", 1)
    row = next(row for row in summary["variants"] if row["variant"] == "merge")
    assert (row["forwards"], row["steps"], row["retention"]["half"]) == (0, 0, 0)
    assert row["retention"]["mean"] == 1  # of the base with itself
    assert "the seeds of a merge are equal" in markdown(summary)


def test_seeds_differ_and_the_noise_of_the_evaluation_does_not(tiny_base):
    study = load_study_from(plan(tiny_base, seeds=[3, 4]))
    first, second = (study.recipe_of("early", seed, 7) for seed in study.seeds)
    assert (first.distill.seed, second.distill.seed, first.distill.steps) == (3, 4, 7)
    assert first.evaluate == second.evaluate
    assert (first.evaluate.split, first.evaluate.per_task) == ("val", 3)


def load_study_from(data):
    from danceopd.studies.plan import Study

    return Study.model_validate(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": ["mid"]}, "windows: no such field; here are: at_steps, budget, name, "),
        ({"budget": {}}, "budget: give exactly one of 'steps' and 'forwards'"),
        ({"budget": {"steps": 1, "forwards": 1}}, "budget: give exactly one of 'steps' and 'forwards'"),
        ({"budget": {"updates": 1}}, "budget.updates: no such field; here are: forwards, steps"),
        ({"seeds": [1, 1]}, "seeds [1, 1]: one is there twice"),
        ({"at_steps": [2, 2]}, "at_steps [2, 2]: one is there twice"),
        ({"at_steps": [0]}, "at_steps"),
        ({"teachers": "twice"}, "teachers: "),
        ({"seeds": []}, "seeds: "),
        ({"variants": {"a b": {}}}, "variants.a b"),
        ({"variants": {"a": {"sets": []}}}, "variants.a.sets: no such field; here are: set"),
        ({"variants": {"a": {"set": ["model.height=8"]}}}, "'model.height=8': a variant sets distill.* only"),
        ({"variants": {"a": {"set": ["distill.steps=8"]}}}, "'distill.steps=8': the study itself sets this"),
        ({"set": ["seed=3"]}, "'seed=3': the study itself sets this, by 'budget', 'seeds'"),
        ({"variants": {"a": {"set": ["distill.window=x"]}}}, "variant a: recipe world: distill.window"),
        ({"variants": {"a": {"set": ["distill.select={every: 1}"]}}}, "variant a: distill.select ends or picks"),
        ({"recipe": "wrld"}, "variant early: recipe 'wrld': neither a file nor a shipped recipe"),
        ({"split": "train"}, "split: "),
    ],
)
def test_a_plan_that_does_not_fit_is_one_line(tiny_base, tmp_path, change, message):
    with pytest.raises(UserError) as error:
        load_study(write(tmp_path, plan(tiny_base, **change)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_study_are_one_line(tmp_path):
    with pytest.raises(
        UserError, match=f"neither a file nor a shipped study; shipped: {', '.join(shipped_names(STUDIES))}"
    ):
        load_study("nowhere")
    (tmp_path / "a.yaml").write_text("[1]")
    with pytest.raises(UserError, match="a study is a YAML mapping, this is list"):
        load_study(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_study(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("name", shipped_names(STUDIES))
def test_shipped_studies_are_valid(name):
    study = load_study(name, ["seeds=[5]"])
    assert (study.name, study.seeds) == (name, (5,))


# ---------------------------------------------------------------------------------------------------------------- cost


@pytest.fixture(scope="module")
def cost(backbone, training_set):
    """Expected forwards of the world's recipe with settings and a method, and no teacher guided."""

    @functools.cache
    def forwards(*settings, method="danceopd"):
        recipe = load_recipe("world", ["distill.start=base", f"distill.method={method}", *settings])
        plain = {name: VelocityField(name, backbone, backbone.transformer) for name in recipe.teachers}
        return expected_forwards(recipe, backbone, training_set, plain)

    return forwards


SCHEDULE = "[{until: 0.3, window: semantic}, {until: 1, window: uniform}]"


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("window", [*NAMED, *BY_STEP, "[0.3, 0.6]", SCHEDULE])
def test_steps_at_equal_forwards_spend_the_budget(backbone, window, stride, cost):
    """Against the exact mean of the way to the stops, found by integration over each window's density."""
    settings = [f"distill.window={window}", f"distill.rollout_stride={stride}"]
    spec = load_recipe("world", [*settings, "distill.start=base"]).distill
    grid = backbone.sigmas(spec.rollout_steps, 64, 64).double().numpy()
    share, before = 0.0, 0.0
    for phase in spec.phases:
        share += (phase.until - before) * mean_way(phase.window, grid, stride)
        before = phase.until
    budget = 130_000
    found = cost(*settings)
    count = steps_within(Budget(forwards=budget), found, spec.batch)
    assert count * spec.batch * (share + 1 + 3) == pytest.approx(budget, rel=0.03)


def mean_way(window, grid, stride) -> float:
    from scipy import stats

    if window in BY_STEP:
        reached = stats.beta(*BY_STEP[window]).cdf(np.arange(len(grid)) / (len(grid) - 1))
        return float(sum(math.ceil(k / stride) * share for k, share in enumerate(np.diff(reached))))
    a, b = NAMED[window] if isinstance(window, str) else (1, 1)
    low, high = (0, 1) if isinstance(window, str) else window
    states = grid[:-1]
    edges = [math.inf, *((states[1:] + states[:-1]) / 2), -math.inf]
    above = stats.beta(a, b, low, high - low).cdf(edges)
    return sum(math.ceil(k / stride) * (above[k] - above[k + 1]) for k in range(len(states)))


def test_checkpointed_activations_cost_one_more(cost):
    plain = cost()
    assert cost("distill.activation_checkpointing=true") == pytest.approx(plain + 1)


def test_a_guided_teacher_costs_two(backbone, training_set):
    recipe = load_recipe("world", ["distill.start=base", "distill.method=off_policy"])
    guided = GuidedField(VelocityField("x", backbone, backbone.transformer), 3.0, backbone.encode_prompts([""]))
    assert expected_forwards(recipe, backbone, training_set, dict.fromkeys(recipe.teachers, guided)) == 5


@pytest.mark.slow
def test_guidance_kept_or_absorbed_is_counted(backbone, training_set, cost):
    grid = ["distill.rollout_steps=3", "distill.rollout_stride=1", "distill.window=every_step"]
    plain = cost(*grid)
    kept = cost(*grid, "distill.guidance={keep: 3}")
    assert kept == pytest.approx(plain + 1, rel=0.01)  # a mean of one step of rollout, guided
    small = ["distill.target=displacement", "distill.target_steps=4"]
    assert cost(*grid, *small, "distill.guidance={keep: 3}") == pytest.approx(kept + 6, rel=0.01)
    guided = GuidedField(VelocityField("x", backbone, backbone.transformer), 3.0, backbone.encode_prompts([""]))
    recipe = load_recipe("world", ["distill.start=base", "distill.method=off_policy", "distill.prompt_dropout=0.5"])
    found = expected_forwards(recipe, backbone, training_set, dict.fromkeys(recipe.teachers, guided))
    assert found == pytest.approx(4.5, rel=0.01)  # the empty side of a guided teacher is one pass


@pytest.mark.parametrize(("solver", "mean"), [("euler", 3), ("heun", 6 - 1 / 2)])
def test_small_steps_of_a_displacement_are_counted(solver, mean, cost):
    """On two steps half of the queries are in the last interval, where Heun's last step is Euler's."""
    few = ["distill.target=displacement", "distill.target_steps=3", f"distill.target_solver={solver}"]
    few += ["distill.rollout_steps=2", "distill.window=every_step"]
    assert cost(*few, method="off_policy") == pytest.approx(mean + 3, rel=0.02)
    assert cost(*few) == pytest.approx(1 / 2 + mean + 3, rel=0.02)


# Where a method's count does not depend on drawn stops it is known: 8 grid steps, 3 teachers of the world.
EXACT = {"off_policy": 4, "joint": 3, "diffusion_opd": 8 * 4, "flow_opd": 7 * 4} | dict.fromkeys(MERGES, 0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_cost(method, cost):
    found = cost("distill.window=semantic", method=method)
    plain = cost("distill.window=semantic")
    if method in EXACT:
        assert found == pytest.approx(EXACT[method])
    elif method == "soft":
        assert found == pytest.approx(plain + 2)
    elif method == "dense":
        assert found > 8 * 4
    else:
        assert found == pytest.approx(plain)


def test_a_budget_below_one_update_is_refused():
    with pytest.raises(UserError, match=r"budget.forwards 100: one update of batch 32 takes 256 forwards"):
        steps_within(Budget(forwards=100), 8.0, 32)
    assert steps_within(Budget(steps=5), 8.0, 32) == 5


@pytest.mark.slow
def test_what_a_cell_spent_is_what_was_planned(tiny_base, here, caplog):
    study = load_study(write(here, plan(tiny_base, seeds=[0], budget={"forwards": 900})))
    summary = run_study(study, here / "ws", 1)
    for row in summary["variants"]:
        assert row["forwards"] == pytest.approx(900, rel=0.08)
    costs = {row["variant"]: row["forwards_per_sample"] for row in summary["variants"]}
    counts = {row["variant"]: row["steps"] for row in summary["variants"]}
    assert costs["early"] < costs["late"]
    assert counts["early"] > counts["late"]


# --------------------------------------------------------------------------------------------------------------- table


def test_intervals_on_known_numbers():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == (2.0, pytest.approx(4.302653 / math.sqrt(3)))
    assert estimate([5.0]) == Estimate(5.0, None, (5.0,))
    assert estimate([1.0, None]).mean is None
    assert estimate([]).mean is None
    assert estimate([1.0, 1.0]).half == 0


def test_retention_is_the_mean_of_ratios_over_gated_metrics():
    recipe = load_recipe("world")
    gated = [
        ("t2i", "scene_accuracy"),
        ("local_edit", "edit_success"),
        ("local_edit", "preserved_psnr"),
        ("global_style", "psnr"),
    ]
    assert counted_metrics(recipe) == gated
    teachers = {"a": {"x": 2.0, "y": 4.0}, "b": {"x": 1.0}}
    student = {"a": {"x": 1.0, "y": 4.0}, "b": {"x": 3.0}}
    assert retention(student, teachers, [("a", "x"), ("a", "y")]) == 0.75
    assert retention(teachers, teachers, [("a", "x"), ("b", "x")]) == 1
    assert retention(student, teachers | {"b": {"x": 0.0}}, [("b", "x")]) is None
    assert retention(student | {"b": {"x": None}}, teachers, [("b", "x")]) is None
    bare = load_recipe("world", [f"tasks.{task}.gates=[]" for task in recipe.tasks])
    assert counted_metrics(bare) == [(task, spec.metrics[0]) for task, spec in recipe.tasks.items()]


def ranked(**variants):
    """Rows of variants with the given retention by seed, as the table has them."""
    from danceopd.studies.table import _difference, asdict

    rows = [
        {"variant": name, "seeds": list(range(len(values))), "retention": asdict(estimate(values))}
        for name, values in variants.items()
    ]
    return [row | {"behind": asdict(_difference(rows[0], row))} for row in rows]


def test_the_verdict_goes_by_pairs():
    """Seeds may scatter widely and still tell two apart, when both scatter alike."""
    close = verdict(ranked(a=[0.9, 0.8, 0.7], b=[0.89, 0.79, 0.6901]))
    assert "1.00 points more than b" in close
    assert "it leads beyond the seeds' scatter" in close
    tied = verdict(ranked(a=[0.9, 0.8, 0.7], b=[0.7, 0.8, 0.89], c=[0.7, 0.7, 0.9], d=[0.1, 0.1, 0.1]))
    assert "do not tell the two apart. Nor do they tell it from c." in tied
    assert "one seed in common" in verdict(ranked(a=[0.9], b=[0.8]))
    assert verdict(ranked(a=[0.9])) == "a retains most: 90.00 %."
    assert verdict([]) == verdict(ranked(a=[None])) == "no variant has a result yet"


@pytest.mark.slow
def test_the_page_states_what_it_shows(tiny_base, here):
    study = load_study(write(here, plan(tiny_base, seeds=[0], variants={"early": {}})))
    summary = run_study(study, here / "ws", 1)
    page = markdown(summary)
    assert "| variant | retention | t2i scene_accuracy | local_edit psnr dB | global_style psnr dB |" in page
    assert "| (each task's teacher) | 100.00 % |" in page
    assert "gate: local_edit psnr, global_style psnr" in page
    assert "t2i 3, local_edit 3, global_style 3" in page
    assert "Not finished" not in page
    assert "Not finished: 0 of 1 cells" in markdown(summary | {"cells": 0})
    assert terminal_table(summary).row_count == 3


@pytest.mark.slow
def test_teachers_of_each_seed_and_scores_by_sampling_steps(tiny_base, here, monkeypatch):
    """Every seed has teachers of its own, made by several processes, and is held against them alone."""
    style = (
        "teachers.style={kind: finetune, task: global_style,"
        " train: {trainable: full, lr: 0.001, steps: 2, batch: 4, warmup: 1}}"
    )
    settings = [*plan(tiny_base)["set"], style, "tasks.global_style.teacher=style", "evaluate.steps=4"]
    settings += ["tasks.global_style.gates=[]"]  # two updates need not make a teacher better than the base
    few = {"target": "distill.target=displacement", "steps": "distill.rollout_steps=2"}
    variants = {"velocity": {}, "few": {"set": [*few.values(), "distill.window=every_step"]}}
    changes = {"set": settings, "teachers": "each_seed", "at_steps": [1, 2, 4], "variants": variants}
    study = load_study(write(here, plan(tiny_base, **changes)))
    summary = run_study(study, here / "ws", 2)

    folder = here / "ws" / "studies" / "tiny"
    notes = [read_json(path) for path in folder.glob("products-*.json")]
    assert len({note["teachers"]["style"] for note in notes}) == 2
    assert len({note["teachers"]["base"] for note in notes}) == 1
    references = [read_json(path) for path in folder.glob("reference-*.json")]
    assert references[0]["teachers"]["global_style"] != references[1]["teachers"]["global_style"]
    assert references[0]["base"] == references[1]["base"]

    taught = [one["teachers"]["global_style"]["psnr"] for one in references]
    assert summary["teachers"]["scores"]["global_style"]["psnr"] == pytest.approx(np.mean(taught))
    assert summary["teachers"]["halves"]["global_style/psnr"] > 0
    assert summary["teachers"]["by_steps"]["4"]["global_style/psnr"]["less_teacher"]["values"] == (0, 0)
    rows = {row["variant"]: row for row in summary["variants"]}
    own = {"velocity": "4", "few": "2"}  # the steps that each is drawn in where nothing else is said
    for cell in map(read_json, (folder / "cells").iterdir()):
        assert cell["by_steps"][own[cell["variant"]]] == cell["scores"]
        assert cell["by_steps"]["1"] != cell["scores"]
    by_seed = {read_json(p)["seed"]: read_json(p)["by_steps"]["2"] for p in (folder / "cells").glob("few-*")}
    apart = rows["few"]["by_steps"]["2"]["global_style/psnr"]["less_teacher"]["values"]
    scores = [by_seed[seed]["global_style"]["psnr"] for seed in (0, 1)]
    assert sorted(np.subtract(scores, apart)) == pytest.approx(sorted(taught))

    page = (folder / "study.md").read_text()
    assert "Every seed has teachers of its own" in page
    assert "less the task's own teacher in 4 steps, paired by seed" in page
    assert "| global_style psnr | 1 | 2 | 4 |" in page
    assert "| (style, the teacher) |" in page
    assert (folder / "study-steps.png").is_file()

    with monkeypatch.context() as patch:  # the pipeline would make its products anew, the study keeps those it has
        patch.setattr("danceopd.workspace.code_revision", lambda: "another")
        before = sorted((here / "ws").glob("*/*-*"))
        assert run_study(study, here / "ws", 2) == summary
        assert sorted((here / "ws").glob("*/*-*")) == before


@pytest.mark.slow
def test_teachers_that_cannot_be_made_are_named_by_seed(tiny_base, here, monkeypatch):
    def breaks(seed, **others):
        raise UserError("no luck")

    monkeypatch.setattr("danceopd.studies.run._hold", breaks)
    with pytest.raises(UserError, match=r"teachers of 2 seeds failed: seed 0 \(no luck\); seed 1 \(no luck\)"):
        run_study(load_study(write(here, plan(tiny_base, teachers="each_seed"))), here / "ws", 1)


@pytest.mark.slow
def test_a_failed_cell_is_named_and_the_others_are_kept(tiny_base, here, monkeypatch):
    study = load_study(write(here, plan(tiny_base, seeds=[0])))
    whole = cells.run_cell

    def breaks(cell, shared):
        if cell.variant == "early":
            raise RuntimeError("no luck")
        return whole(cell, shared)

    monkeypatch.setattr("danceopd.studies.run.run_cell", breaks)
    with pytest.raises(UserError, match=r"1 of 2 cells failed: early seed 0 \(no luck\)"):
        run_study(study, here / "ws", 1)
    summary = read_json(here / "ws" / "studies" / "tiny" / "study.json")
    assert [row["variant"] for row in summary["variants"]] == ["late"]


# ------------------------------------------------------------------------------------------------------------- workers


def busy(item, seconds=0.0):
    time.sleep(seconds)
    if item == "bad":
        raise UserError("bad item")
    if item == "dies":
        os._exit(3)
    return f"{item} by {os.getpid()} with {usable_cores()}"


@pytest.mark.slow
def test_items_are_shared_among_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    found = dict(work_off(partial(busy, seconds=0.1), ["a", "b", "bad", "dies", "c"], 2))
    assert isinstance(found["bad"], UserError)
    assert "ended with code 3" in str(found["dies"])
    assert found["c"].endswith("with 2")
    assert len({found[name].split()[2] for name in "abc"}) in (1, 2)
    assert str(os.getpid()) not in found["a"]
    assert os.environ["OMP_NUM_THREADS"] == "4"


@pytest.mark.slow
def test_nothing_is_lost_when_every_process_dies():
    lost = list(work_off(busy, ["dies", "dies", "x", "y"], 2))
    assert [item for item, _ in lost] == ["dies", "dies", "x", "y"]
    assert "ended with code 3" in str(lost[0][1])
    assert "no process was left" in str(lost[-1][1])


@pytest.mark.slow
def test_a_study_that_is_killed_keeps_its_cells(tiny_base, here):
    path = write(here, plan(tiny_base, seeds=[0, 1, 2], budget={"steps": 10}))
    code = "from danceopd.cli.main import main; main()"
    command = [sys.executable, "-c", code, "study", path, "--workspace", "ws", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    folder = here / "ws" / "studies" / "tiny"
    until = time.monotonic() + 120
    while not list((folder / "cells").glob("*.json")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    kept = {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}
    assert process.returncode == 75, said
    assert "goes on from there" in said
    assert 1 <= len(kept) < 6
    assert {cell["seed"] for cell in map(read_json, kept)} <= {0, 1}  # seed by seed
    assert run_study(load_study(path), here / "ws", 1)["cells"] == 6
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
