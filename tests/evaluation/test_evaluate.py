"""Paired noise, the cross-matrix, retention and gates, on the tiny base."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

from danceopd.config.load import parse_recipe
from danceopd.config.recipe import DriftRecipe, EvaluateRecipe, Gate, Recipe
from danceopd.data import world
from danceopd.data.assemble import assemble, open_dataset
from danceopd.data.encode import encode_records
from danceopd.errors import UserError
from danceopd.evaluation import evaluate as ev
from danceopd.flow.fields import VelocityField

SIZE = (world.SIZE, world.SIZE)


def make_recipe(**tasks: dict) -> Recipe:
    """A recipe over the small world; `tasks` overrides parts of its tasks."""
    plain = {
        "t2i": {"teacher": "base", "needs_source": False, "metrics": ["scene_accuracy", "psnr"]},
        "local_edit": {"teacher": "local", "needs_source": True, "metrics": ["edit_success", "preserved_psnr"]},
        "global_style": {"teacher": "style", "needs_source": True, "metrics": ["psnr", "ssim"]},
    }
    return parse_recipe(
        {
            "name": "tiny",
            "model": {"base": "world", "height": world.SIZE, "width": world.SIZE},
            "data": {"world": {t: {"test": 6} for t in world.TASKS}},
            "tasks": {name: part | tasks.get(name, {}) for name, part in plain.items()},
            "teachers": {
                "base": {"kind": "base"},
                "local": {"kind": "checkpoint", "path": "local"},
                "style": {"kind": "lora", "path": "style"},
            },
            "distill": {"lr": 0.001, "steps": 1, "batch": 3},
            "evaluate": {"per_task": 4, "steps": 2, "batch": 3, "pictures": 3},
            "register_as": {"model": "tiny"},
        },
        "test",
    )


@dataclasses.dataclass(frozen=True)
class CountingField(VelocityField):
    """A real field that counts the samples it was asked for."""

    asked: list = dataclasses.field(default_factory=list)

    def __call__(self, z, sigma, condition):
        self.asked.append(len(z))
        return super().__call__(z, sigma, condition)


@dataclasses.dataclass(frozen=True)
class StillField(VelocityField):
    """Moves nothing: what it draws is its noise, decoded. It remembers the states it was asked at."""

    states: list = dataclasses.field(default_factory=list)

    def __call__(self, z, sigma, condition):
        self.states.extend(z.clone())
        return torch.zeros_like(z)


def other_network(backbone, seed: int):
    network = backbone.new_transformer()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def fields(backbone):
    base = CountingField("base", backbone, backbone.transformer)
    local, style, student = (
        CountingField(n, backbone, other_network(backbone, i)) for i, n in enumerate(("local", "style", "student"))
    )
    return {"base": base, "local": local, "style": style, "student": student}


@pytest.fixture(scope="module")
def gated():
    gate = {"metric": "psnr", "max_drop": 60, "champion_margin": 1}
    hard = {"metric": "edit_success", "retain": 1, "champion_margin": 0}
    return make_recipe(t2i={"gates": [gate]}, local_edit={"gates": [hard]})


@pytest.fixture(scope="module")
def evaluation(gated, backbone, fields, small_data, tmp_path_factory):
    return ev.evaluate(gated, backbone, fields, open_dataset(small_data), tmp_path_factory.mktemp("cache"), "key")


@pytest.fixture(scope="module")
def mixed(backbone, small_data):
    """Records of all tasks, those with and without a source interleaved, and their encoding."""
    dataset = open_dataset(small_data)
    parts = [dataset.records("test", task, 3) for task in world.TASKS]
    records = [r for group in zip(*parts, strict=True) for r in group]
    return records, encode_records(backbone, records, *SIZE, None, "key", targets=False)


def test_the_matrix_covers_every_field_on_every_task(evaluation, gated, fields):
    scores = evaluation.metrics["scores"]
    assert set(scores) == set(fields)
    for field in scores:
        assert {task: set(part) for task, part in scores[field].items()} == {
            task: set(spec.metrics) for task, spec in gated.tasks.items()
        }
    assert len({json.dumps(scores[f]) for f in fields}) == len(fields)


def test_metrics_hold_the_contract_and_are_json(evaluation, gated):
    metrics = evaluation.metrics
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert set(metrics) >= {
        "recipe",
        "split",
        "records",
        "steps",
        "seed",
        "units",
        "teacher_of",
        "ceiling",
        "scores",
        "retention",
        "gates",
        "passed",
    }
    assert metrics["records"] == {t: 4 for t in world.TASKS}
    assert metrics["units"] == {
        "scene_accuracy": "rate",
        "psnr": "dB",
        "edit_success": "rate",
        "preserved_psnr": "dB",
        "ssim": "index",
    }
    assert metrics["teacher_of"] == {"t2i": "base", "local_edit": "local", "global_style": "style"}
    assert {t: set(m) for t, m in metrics["ceiling"].items()} == {t: set(s.metrics) for t, s in gated.tasks.items()}
    assert [g["task"] for g in metrics["gates"]] == ["t2i", "local_edit"]
    assert evaluation.passed == all(g["passed"] for g in metrics["gates"])


def test_stored_values_give_the_means_back(evaluation, fields):
    for field in fields:
        for task, part in evaluation.values[field].items():
            assert len(evaluation.values["ids"][task]) == 4
            for name, values in part.items():
                assert np.mean(values) == pytest.approx(evaluation.metrics["scores"][field][task][name], abs=1e-3)


def test_novelties_average_to_the_whole(evaluation):
    ids, novelties = evaluation.values["ids"]["t2i"], evaluation.metrics["by_novelty"]["t2i"]
    assert set(novelties) == set(world.NOVELTIES)
    counts = {n: sum(int(i[-6:]) % 3 == world.NOVELTIES.index(n) for i in ids) for n in world.NOVELTIES}
    whole = sum(counts[n] * novelties[n]["psnr"] for n in counts) / len(ids)
    assert whole == pytest.approx(evaluation.metrics["scores"]["student"]["t2i"]["psnr"])


def test_examples_carry_pictures_of_every_field(evaluation, fields):
    for task, examples in evaluation.examples.items():
        assert len(examples) == 3
        assert len({e.record.id for e in examples}) == 3
        for example in examples:
            assert set(example.drawn) == set(example.scores) == set(fields)
            assert (example.source is None) == (task == "t2i")
            assert example.target.shape == (*SIZE, 3)


def test_the_ceiling_is_the_decoded_encoding_of_the_targets(backbone, small_data, evaluation):
    records = open_dataset(small_data).records("test", "global_style", 4)
    encoded = encode_records(backbone, records, *SIZE, None, "key", targets=True)
    from danceopd.flow.sampling import to_uint8

    drawn = to_uint8(backbone.decode(encoded.targets[encoded.target_row], *SIZE))
    want = ev.score_pictures(drawn, records, ("psnr", "ssim")).means
    assert evaluation.metrics["ceiling"]["global_style"] == pytest.approx(want, abs=1e-3)


def test_the_ceiling_leaves_out_records_without_a_target(backbone, small_data):
    records = open_dataset(small_data).records("test", "t2i", 3)
    bare = [dataclasses.replace(records[0], target=None), *records[1:]]
    encoded = encode_records(backbone, bare, *SIZE, None, "key", targets=True)
    full = encode_records(backbone, records[1:], *SIZE, None, "key", targets=True)
    with_bare = ev.score_ceiling(backbone, encoded, bare, ("psnr",), 2)
    assert with_bare == pytest.approx(ev.score_ceiling(backbone, full, records[1:], ("psnr",), 2), abs=1e-3)
    none = [dataclasses.replace(r, target=None) for r in records]
    assert (
        ev.score_ceiling(
            backbone, encode_records(backbone, none, *SIZE, None, "k", targets=True), none, ("scene_accuracy",), 2
        )
        == {}
    )


def test_two_names_of_one_field_are_drawn_once(backbone, fields, small_data):
    recipe = make_recipe()
    alone = recipe.evaluate.model_copy(update={"drift": None})
    recipe = recipe.model_copy(update={"tasks": {"t2i": recipe.tasks["t2i"]}, "evaluate": alone})
    first, twin = (CountingField(n, backbone, backbone.transformer) for n in ("base", "student"))
    result = ev.evaluate(recipe, backbone, {"base": first, "student": twin}, open_dataset(small_data), None, "key")
    assert sum(first.asked) == 4 * recipe.evaluate.steps == result.metrics["forwards"] and twin.asked == []
    scores = result.metrics["scores"]
    assert scores["student"] == scores["base"]
    assert result.metrics["retention"]["t2i"]["psnr"]["ratio"] == 1


def test_fewer_steps_are_drawn_and_the_evaluations_own_are_not_drawn_again(backbone, small_data):
    recipe = make_recipe()
    few = recipe.evaluate.model_copy(update={"drift": DriftRecipe(records=3, steps=(1, recipe.evaluate.steps))})
    recipe = recipe.model_copy(update={"tasks": {"t2i": recipe.tasks["t2i"]}, "evaluate": few})
    networks = {"base": backbone.transformer, "student": other_network(backbone, 1)}
    fields = {name: CountingField(name, backbone, network) for name, network in networks.items()}
    result = ev.evaluate(recipe, backbone, fields, open_dataset(small_data), None, "key")
    asked = {name: sum(field.asked) for name, field in fields.items()}
    steps, scored = few.steps, 4 * few.steps
    # Scoring; the path (the teacher's own after its first step, and at the student's states); one step.
    assert asked == {"base": scored + 3 * (2 * steps - 1) + 3, "student": scored + 3 * steps + 3}
    assert result.metrics["forwards"] == sum(asked.values())
    drift = result.metrics["drift"]["t2i"]
    values = result.values["student"]["t2i"][drift["metric"]]
    assert drift["by_steps"][str(steps)]["student"] == pytest.approx(sum(values[:3]) / 3)


def test_the_base_is_shown_by_sampling_steps_where_it_is_not_the_teacher(backbone, small_data):
    recipe = make_recipe()
    few = recipe.evaluate.model_copy(update={"drift": DriftRecipe(records=2, steps=(1,))})
    recipe = recipe.model_copy(update={"tasks": {"local_edit": recipe.tasks["local_edit"]}, "evaluate": few})
    names = ("base", "local", "student")
    fields = {n: CountingField(n, backbone, other_network(backbone, k)) for k, n in enumerate(names)}
    result = ev.evaluate(recipe, backbone, fields, open_dataset(small_data), None, "key")
    figures = result.metrics["drift"]["local_edit"]["by_steps"]["1"]
    assert set(figures) == {"base", "teacher", "student"}
    assert result.metrics["forwards"] == sum(sum(field.asked) for field in fields.values())


def test_a_missing_field_is_refused(backbone, fields, small_data):
    with pytest.raises(ValueError, match=r"needs the field\(s\) student, style"):
        part = {name: fields[name] for name in ("base", "local")}
        ev.evaluate(make_recipe(), backbone, part, open_dataset(small_data), None, "key")


def test_a_task_without_held_out_records_is_named(backbone, fields, small_data, tmp_path):
    from danceopd.data.assemble import assemble

    assemble(world.world_records({"t2i": {"test": 2}}), tmp_path / "data")
    with pytest.raises(UserError, match="no 'test' records of task 'local_edit'"):
        ev.evaluate(make_recipe(), backbone, fields, open_dataset(tmp_path / "data"), None, "key")


def test_metrics_are_checked_before_anything_is_drawn(backbone, small_data):
    recipe = make_recipe(global_style={"metrics": ["edit_success"]})
    fields = {n: CountingField(n, backbone, backbone.transformer) for n in ("base", "local", "style", "student")}
    with pytest.raises(UserError, match="'edit_success' needs a position"):
        ev.evaluate(recipe, backbone, fields, open_dataset(small_data), None, "key")
    assert all(field.asked == [] for field in fields.values())


# --- paired noise ---


def starts(backbone, encoded, ids, spec) -> dict[str, bytes]:
    """The noise each record starts from."""
    field = StillField("still", backbone, backbone.transformer)
    ev.draw_field(field, encoded, ids, spec)
    order = [i for group in encoded.shape_groups(list(range(len(ids)))) for i in group]
    return {ids[i]: state.numpy().tobytes() for i, state in zip(order, field.states, strict=True)}


def test_a_record_starts_from_one_noise_whatever_the_batch_and_the_order(backbone, mixed):
    records, encoded = mixed
    ids = [r.id for r in records]
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    shuffled = encode_records(backbone, [records[i] for i in order], *SIZE, None, "key", targets=False)
    alone = encode_records(backbone, [records[5]], *SIZE, None, "key", targets=False)
    want = starts(backbone, encoded, ids, EvaluateRecipe(steps=1, batch=64))
    assert len(set(want.values())) == len(ids)
    assert starts(backbone, encoded, ids, EvaluateRecipe(steps=1, batch=2)) == want
    assert starts(backbone, shuffled, [ids[i] for i in order], EvaluateRecipe(steps=1, batch=3)) == want
    assert starts(backbone, alone, [ids[5]], EvaluateRecipe(steps=1, batch=3)) == {ids[5]: want[ids[5]]}


def test_another_seed_is_another_noise(backbone, mixed):
    records, encoded = mixed
    ids = [r.id for r in records]
    one, two = (starts(backbone, encoded, ids, EvaluateRecipe(steps=1, seed=s)) for s in (0, 1))
    assert all(one[i] != two[i] for i in ids)


def test_pictures_come_back_in_the_records_order(backbone, mixed):
    records, encoded = mixed
    field = VelocityField("student", backbone, backbone.transformer)
    ids = [r.id for r in records]
    whole = ev.draw_field(field, encoded, ids, EvaluateRecipe(steps=2, batch=64))
    for row in (0, 1, 5):
        alone = encode_records(backbone, [records[row]], *SIZE, None, "key", targets=False)
        picture = ev.draw_field(field, alone, [ids[row]], EvaluateRecipe(steps=2, batch=1))[0]
        assert np.abs(picture.astype(int) - whole[row]).max() <= 1  # other batch, other order of sums
    assert np.abs(whole[0].astype(int) - whole[1]).max() > 1


def test_seeds_fit_a_generator_and_do_not_collide():
    seeds = {ev.record_seed(seed, f"r{i}") for seed in (0, 1) for i in range(500)}
    assert len(seeds) == 1000 and all(0 <= s < 2**63 for s in seeds)


def test_score_records_is_drawing_and_scoring(backbone, mixed):
    records, encoded = mixed
    scored = ev.score_records(
        VelocityField("f", backbone, backbone.transformer),
        encoded,
        records,
        ("psnr", "ssim"),
        EvaluateRecipe(steps=1, batch=4),
    )
    assert scored.pictures.shape == (9, *SIZE, 3) and scored.pictures.dtype == np.uint8
    assert scored.values == ev.score_pictures(scored.pictures, records, ("psnr", "ssim")).values
    assert scored.means["psnr"] == pytest.approx(np.mean(scored.values["psnr"]))


# --- retention and gates ---


def table(teacher: float | None, student: float | None) -> tuple[Recipe, dict]:
    """A one-task recipe without gates, and scores for it."""
    recipe = make_recipe()
    recipe = recipe.model_copy(update={"tasks": {"t2i": recipe.tasks["t2i"].model_copy(update={"metrics": ("psnr",)})}})
    return recipe, {"base": {"t2i": {"psnr": teacher}}, "student": {"t2i": {"psnr": student}}}


def with_gate(recipe: Recipe, **rule: float) -> Recipe:
    gate = Gate(metric="psnr", champion_margin=0, **rule)
    return recipe.model_copy(update={"tasks": {"t2i": recipe.tasks["t2i"].model_copy(update={"gates": (gate,)})}})


def test_retention_arithmetic():
    recipe, scores = table(30.0, 27.0)
    entry = ev.retention(recipe, scores)["t2i"]["psnr"]
    assert entry == {"teacher": 30.0, "student": 27.0, "ratio": pytest.approx(0.9), "difference": pytest.approx(-3)}


@pytest.mark.parametrize(
    "teacher, student, ratio, difference",
    [(0.0, 0.5, None, 0.5), (None, 0.5, None, None), (0.5, None, None, None), (math.nan, 0.5, None, None)],
)
def test_retention_that_is_undefined_is_none(teacher, student, ratio, difference):
    entry = ev.retention(*table(teacher, student))["t2i"]["psnr"]
    assert (entry["ratio"], entry["difference"]) == (ratio, difference)


@pytest.mark.parametrize(
    "rule, teacher, student, passed",
    [
        ({"retain": 0.95}, 1.0, 0.96, True),
        ({"retain": 0.95}, 1.0, 0.95, True),
        ({"retain": 0.95}, 1.0, 0.94, False),
        ({"retain": 0.9}, 0.7, 0.63, True),
        ({"retain": 0.95}, 0.0, 0.0, True),
        ({"max_drop": 3.0}, 30.0, 27.0, True),
        ({"max_drop": 3.0}, 30.0, 26.99, False),
        ({"max_drop": 0.0}, 30.0, 31.0, True),
    ],
)
def test_gates(rule, teacher, student, passed):
    recipe, scores = table(teacher, student)
    [verdict] = ev.judge(with_gate(recipe, **rule), scores)
    assert verdict["passed"] is passed
    assert verdict["rule"] == " ".join(f"{k} {v}" for k, v in rule.items())
    assert verdict["value"] == student
    want = teacher * rule["retain"] if "retain" in rule else teacher - rule["max_drop"]
    assert verdict["limit"] == pytest.approx(want)


@pytest.mark.parametrize("rule", [{"retain": 0.0}, {"max_drop": 1000.0}])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_value_that_is_missing_or_not_finite_never_holds_a_gate(rule, bad):
    for teacher, student in ((30.0, bad), (bad, 30.0), (bad, bad)):
        recipe, scores = table(teacher, student)
        [verdict] = ev.judge(with_gate(recipe, **rule), scores)
        assert verdict["passed"] is False
        json.dumps(verdict, allow_nan=False)


def test_scores_that_lack_the_student_altogether_hold_no_gate():
    recipe, scores = table(30.0, 30.0)
    del scores["student"]
    assert ev.judge(with_gate(recipe, retain=0.5), scores)[0]["passed"] is False


def test_one_nan_makes_a_mean_nan_and_an_empty_one_is_nan():
    scored = ev.Scored(np.zeros((2, 4, 4, 3), np.uint8), {"a": [1.0, math.nan], "b": [], "c": [1.0, 0.5]})
    assert math.isnan(scored.means["a"]) and math.isnan(scored.means["b"]) and scored.means["c"] == 0.75


# --- intervals and verdicts ---


def test_every_mean_has_its_interval_and_every_gate_shows_it(evaluation):
    metrics = evaluation.metrics
    for field, tasks in metrics["scores"].items():
        for task, part in tasks.items():
            for name, value in part.items():
                low, high = metrics["intervals"][field][task][name]
                assert low - 1e-9 <= value <= high + 1e-9
    assert [g["interval"] for g in metrics["gates"]] == [
        metrics["intervals"]["student"][g["task"]][g["metric"]] for g in metrics["gates"]
    ]


def test_the_student_is_compared_with_each_tasks_teacher(evaluation, gated):
    table = evaluation.metrics["comparisons"]["teacher"]
    assert {t: set(part) for t, part in table.items()} == {t: set(s.metrics) for t, s in gated.tasks.items()}
    for task, part in table.items():
        for name, found in part.items():
            entry = evaluation.metrics["retention"][task][name]
            assert found["difference"] == pytest.approx(entry["difference"])
            assert found["low"] - 1e-9 <= found["difference"] <= found["high"] + 1e-9
            assert found["reference"] == gated.tasks[task].teacher
    assert table["t2i"]["psnr"]["margin"] == 60 and table["t2i"]["scene_accuracy"]["margin"] is None


def test_a_verdict_is_worse_exactly_where_its_gate_fails(evaluation):
    for gate in evaluation.metrics["gates"]:
        found = evaluation.metrics["comparisons"]["teacher"][gate["task"]][gate["metric"]]
        assert (found["verdict"] == "worse") == (not gate["passed"])


# --- metrics that are skipped, of sets, and benchmarks ---


@pytest.fixture(scope="module")
def benchmark_folder(tmp_path_factory, small_data):
    """Five edits of the small world as an evaluation set of its own."""
    records = open_dataset(small_data).records("test", "local_edit")[:5]
    folder = tmp_path_factory.mktemp("benchmark") / "edits"
    named = [
        dataclasses.replace(r, id=f"b{i}", provenance=json.dumps({"kind": f"k{i % 2}"})) for i, r in enumerate(records)
    ]
    assemble(named, folder)
    return folder


@pytest.fixture(scope="module")
def mixed_metrics(backbone, fields, small_data, benchmark_folder, dino_folder, tmp_path_factory):
    """An evaluation with a skipped metric under a gate, a set's metric, and a benchmark."""
    lost = {"metric": "clip_score", "max_drop": 1, "champion_margin": 0}
    held = {"metric": "fd_dino", "max_drop": 1e6, "champion_margin": 0}
    recipe = make_recipe(t2i={"metrics": ["clip_score", "fd_dino", "psnr"], "gates": [lost, held]})
    data = recipe.model_dump(mode="json")
    data["evaluate"] |= {"networks": {"dino": str(dino_folder)}, "drift": {"records": 2, "steps": [1, 2]}}
    data["evaluate"]["benchmarks"] = {
        "edits": {"input": str(benchmark_folder), "task": "local_edit", "metrics": ["outside_psnr"], "limit": 3}
    }
    recipe = parse_recipe(data, "test")
    cache = tmp_path_factory.mktemp("cache")
    return ev.evaluate(recipe, backbone, fields, open_dataset(small_data), cache, "key")


def test_a_skipped_metric_has_no_figure_and_fails_its_gate_with_the_reason(mixed_metrics):
    metrics = mixed_metrics.metrics
    reason = "evaluate.networks.clip does not name a folder with a CLIP model"
    assert metrics["skipped"] == {"clip_score": reason}
    assert metrics["scores"]["student"]["t2i"]["clip_score"] is None
    lost, held = metrics["gates"]
    assert (lost["passed"], lost["reason"], lost["value"]) == (False, reason, None)
    assert (held["passed"], held["reason"]) == (True, None) and not mixed_metrics.passed
    assert metrics["primary"]["t2i"] == "psnr" == metrics["drift"]["t2i"]["metric"]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_a_set_has_its_figure_for_every_field_and_no_interval(mixed_metrics, fields):
    metrics = mixed_metrics.metrics
    figures = {field: metrics["scores"][field]["t2i"]["fd_dino"] for field in fields}
    assert all(value < 0 for value in figures.values()) and len(set(figures.values())) > 1
    assert metrics["intervals"]["student"]["t2i"]["fd_dino"] is None
    assert metrics["comparisons"]["teacher"]["t2i"]["fd_dino"] is None
    entry = metrics["retention"]["t2i"]["fd_dino"]
    assert entry["ratio"] is None and entry["difference"] == pytest.approx(figures["student"] - figures["base"])
    assert mixed_metrics.values["student"]["t2i"]["fd_dino"] == [None] * 4


def test_a_benchmark_has_a_row_of_its_own_beside_its_tasks_teacher(mixed_metrics, benchmark_folder):
    metrics = mixed_metrics.metrics
    content = open_dataset(benchmark_folder).content
    assert metrics["benchmarks"] == {"edits": {"task": "local_edit", "content": content}}
    assert metrics["records"]["edits"] == 3
    assert mixed_metrics.values["ids"]["edits"] == ["b0", "b2", "b4"]
    assert metrics["teacher_of"]["edits"] == "local" and "edits" not in metrics["drift"]
    assert metrics["retention"]["edits"]["outside_psnr"]["teacher"] is not None
    assert set(metrics["by_novelty"]["edits"]) == {"k0"} and len(mixed_metrics.examples["edits"]) == 3


@pytest.mark.slow
def test_the_report_tells_what_was_not_measured(mixed_metrics, tmp_path):
    from danceopd.evaluation.report import write_report

    write_report(mixed_metrics, tmp_path, {})
    page, notes = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert "<b>clip_score</b> was not measured: evaluate.networks.clip does not name" in page
    assert "t2i: clip_score could not be judged: evaluate.networks.clip does not name" in page
    assert "; not measured: clip_score." in page[: page.index("Retention")]
    assert "clip_score (not measured)" in notes and "- clip_score was not measured: evaluate.networks" in notes
    assert not re.search(r">\s*-?nan\b", page.lower()) and ">edits<" in page


def test_a_benchmark_that_does_not_suit_its_task_is_one_line(backbone, fields, small_data, benchmark_folder):
    data = make_recipe().model_dump(mode="json")
    data["evaluate"]["benchmarks"] = {"b": {"input": str(benchmark_folder), "task": "t2i", "metrics": ["psnr"]}}
    with pytest.raises(UserError, match=r"evaluate\.benchmarks\.b: record 'b0' has a source, and task 't2i' draws"):
        ev.evaluate(parse_recipe(data, "test"), backbone, fields, open_dataset(small_data), None, "key")


def test_an_edit_without_a_region_is_told_before_anything_is_drawn(backbone, fields, small_data):
    recipe = make_recipe(global_style={"metrics": ["outside_psnr"]})
    before = len(fields["student"].asked)
    with pytest.raises(UserError, match="its edit covers every pixel"):
        ev.evaluate(recipe, backbone, fields, open_dataset(small_data), None, "key")
    assert len(fields["student"].asked) == before


def test_a_gate_the_judge_did_not_answer_for_says_so():
    recipe, scores = table(None, None)
    task = recipe.tasks["t2i"].model_copy(
        update={"metrics": ("judge_overall",), "gates": (Gate(metric="judge_overall", max_drop=1, champion_margin=0),)}
    )
    [verdict] = ev.judge(recipe.model_copy(update={"tasks": {"t2i": task}}), scores)
    assert not verdict["passed"] and verdict["reason"] == "the judge gave no readable answer on some pictures"


def test_selecting_by_a_metric_that_is_not_there_is_one_line():
    from danceopd.evaluation.validate import GateValidator

    gate = {"metric": "clip_score", "max_drop": 1, "champion_margin": 0}
    recipe = make_recipe(t2i={"metrics": ["clip_score"], "gates": [gate]})
    with pytest.raises(
        UserError, match=r"distill\.select: t2i has a gate on clip_score, which cannot be measured here"
    ):
        GateValidator(recipe, {}, {})
