"""The chain's steps at the smallest scale: what is made, what is reused, what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from judge_server import GOOD

from danceopd import steps
from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition
from danceopd.config.load import load_recipe
from danceopd.config.sampling import Sampling, read_sampling
from danceopd.errors import UserError
from danceopd.files import read_json
from danceopd.flow.field_io import load_field, probe
from danceopd.flow.fields import VelocityField
from danceopd.pretraining.world_base import OUT_LAYERS, PROMPT_TOKENS
from danceopd.steps.cost import spent_on
from danceopd.steps.encodings import open_backbone
from danceopd.steps.evaluation import looks_with
from danceopd.tracking import mlflow_store
from danceopd.tracking.journal import read_lines, run_folder
from danceopd.training.processes import Processes

SMALL = [
    "data.world={t2i: {train: 12, val: 4, test: 4}, local_edit: {train: 12, val: 4, test: 4},"
    " global_style: {train: 12, val: 4, test: 4}}",
    "tasks.local_edit.metrics=[psnr, preserved_psnr]",
    "tasks.local_edit.gates=[{metric: psnr, max_drop: 60, champion_margin: 60}]",
    "tasks.global_style.gates=[{metric: psnr, max_drop: 60, champion_margin: 60}]",
    "teachers.local_edit={kind: base}",
    "teachers.global_style.train={trainable: lora, lr: 0.01, steps: 40, batch: 8, warmup: 2}",
    "distill.steps=3",
    "distill.batch=6",
    "distill.rollout_steps=3",
    "distill.preview_every=2",
    "evaluate.per_task=4",
    "evaluate.steps=2",
]


@pytest.fixture(scope="module")
def base_folder(tiny_base) -> Path:
    return tiny_base


@pytest.fixture(scope="module")
def recipe(base_folder):
    return load_recipe("world", [f"model.base={base_folder}", *SMALL])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("workspace")


def run_to_student(recipe, workspace):
    base = steps.resolve_base(recipe, workspace)
    data = steps.build_data(recipe, workspace, repo=workspace)
    teachers = {
        name: steps.finetune_teacher(steps.Run(recipe, workspace, base, data), name) for name in recipe.teachers
    }
    return base, data, teachers, steps.distill_student(steps.Run(recipe, workspace, base, data), teachers)


@pytest.fixture(scope="module")
def made(recipe, workspace):
    """Base, data, teachers and student of the small recipe."""
    return run_to_student(recipe, workspace)


@pytest.mark.parametrize(
    ("base", "setting", "spin", "threads"),
    [("world", "", None, 1), ("world", "", "5000", 2), ("world", "3", None, 3), ("tiny", "", None, 3)],
)
def test_a_small_world_takes_few_threads_by_hand_too(base_folder, tmp_path, monkeypatch, base, setting, spin, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    monkeypatch.setattr("danceopd.devices.os.sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if spin is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", spin)
    torch.set_num_threads(3)
    recipe = load_recipe("world", [f"model.base={base if base == 'world' else base_folder}"])
    try:
        open_backbone(steps.Run(recipe, tmp_path, steps.resolve_base(recipe, tmp_path), data=None))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)  # a module's fixtures are made before the next test sets it


def test_products_say_what_they_are(made):
    base, data, teachers, student = made
    assert read_json(student.folder / steps.STEP)["step"] == "students"
    assert data.facts["counts"]["t2i"] == {"train": 12, "val": 4, "test": 4}
    assert teachers["base"].facts["kind"] == "base"
    scores = teachers["global_style"].facts["scores"]["global_style"]
    assert scores["teacher"]["psnr"] > scores["base"]["psnr"]
    assert {p.name for p in (student.folder / "previews").iterdir()} == {
        "step-000002.png",
        "step-000003.png",
        "training.png",
    }
    assert base.pipeline.is_dir()


def test_a_student_in_its_workspace_finds_what_it_was_made_of(made):
    from danceopd.inference.side_by_side import find_origins

    base, _, teachers, student = made
    origins = find_origins(student.pipeline)
    assert origins.base == base.pipeline
    assert origins.teachers == {name: product.folder.resolve() for name, product in teachers.items()}


def test_each_step_told_mlflow_what_it_did(workspace, made):
    """All of it still lies in the workspace: no step waits for a store."""
    told = {path.name.rpartition("-")[0]: read_lines(path)[0] for path in run_folder(workspace).iterdir()}
    assert set(told) == {
        "base-tiny",
        "data-world",
        "teachers-base",
        "teachers-local_edit",
        "teachers-global_style",
        "students-world",
    }
    assert {(lines[0]["kind"], lines[-1].get("status")) for lines in told.values()} == {("start", "FINISHED")}
    by_kind = {
        kind: [line for line in told["students-world"] if line["kind"] == kind]
        for kind in ("start", "dataset", "uses", "image", "points", "model", "file")
    }
    assert by_kind["start"][0]["params"]["distill.steps"] == "3"
    assert (by_kind["dataset"][0]["digest"], by_kind["dataset"][0]["context"]) == (made[1].facts["content"], "training")
    assert {line["digest"] for line in by_kind["uses"]} == {teacher.digest for teacher in made[2].values()}
    assert [(line["name"], line["step"]) for line in by_kind["image"]] == [("samples", 2), ("samples", 3)]
    history = [(line["step"], line["values"]["grad_norm"]) for line in by_kind["points"] if line["model"] is None]
    assert history == [(entry["step"], entry["grad_norm"]) for entry in read_json(made[3].folder / "history.json")]
    assert [line["digest"] for line in by_kind["model"]] == [made[3].digest]
    curve = [line["step"] for line in told["teachers-global_style"] if "loss" in line.get("values", {})]
    assert curve == [entry["step"] for entry in read_json(made[2]["global_style"].folder / "history.json")]


def test_what_is_there_is_reused(recipe, workspace, made, caplog):
    with caplog.at_level(logging.INFO, "danceopd"):
        again = run_to_student(recipe, workspace)
    assert [p.folder for p in (again[0], again[1], again[3])] == [p.folder for p in (made[0], made[1], made[3])]
    assert sum("reused" in line for line in caplog.messages) == 6


@pytest.mark.slow
def test_a_changed_section_makes_its_own_product_and_those_behind_it(base_folder, workspace, made):
    changed = load_recipe("world", [f"model.base={base_folder}", *SMALL, "distill.window=semantic"])
    base, _, teachers, student = run_to_student(changed, workspace)
    assert base.folder == made[0].folder
    assert teachers == made[2]
    assert student.folder != made[3].folder


def forbid_training(monkeypatch):
    monkeypatch.setattr("danceopd.finetune.finetune", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "same_teacher"),
    [
        ("teachers.global_style.guidance=1.01", False),
        ("evaluate.steps=3", True),
        ("evaluate.per_task=2", True),
        ("tasks.global_style.metrics=[psnr]", True),
    ],
)
def test_what_only_guides_or_proves_a_teacher_does_not_train_it_again(
    base_folder, workspace, made, monkeypatch, changed, same_teacher
):
    forbid_training(monkeypatch)
    own = load_recipe("world", [f"model.base={base_folder}", *SMALL, changed])
    before = made[2]["global_style"]
    after = steps.finetune_teacher(steps.Run(own, workspace, *made[:2]), "global_style")
    assert after.folder != before.folder
    assert (after.digest == before.digest) == same_teacher  # then the student that it taught is kept as well
    scores, earlier = (product.facts["scores"]["global_style"]["teacher"] for product in (after, before))
    assert scores != earlier
    weights = [next(product.folder.rglob("*.safetensors")) for product in (before, after)]
    assert weights[0].samefile(weights[1])
    told, _ = read_lines(run_folder(workspace) / f"teachers-{after.folder.name}")
    curve = [line["step"] for line in told if "loss" in line.get("values", {})]
    assert curve == [entry["step"] for entry in read_json(after.folder / "history.json")]


def test_an_earlier_training_is_counted_as_a_cost_of_its_own(base_folder, workspace, made, monkeypatch):
    forbid_training(monkeypatch)
    own = load_recipe("world", [f"model.base={base_folder}", *SMALL, "evaluate.seed=5", "evaluate.steps=1"])
    teacher = steps.finetune_teacher(steps.Run(own, workspace, *made[:2]), "global_style")
    rows = {row.what: row for row in spent_on({"global_style": teacher}, made[3])}
    earlier = rows["teacher global_style, fine-tuned in an earlier run"]
    assert earlier.forwards == 3 * 40 * 8
    assert earlier.seconds > 0
    assert rows["teacher global_style"].forwards is None
    [first] = [row for row in spent_on({"global_style": made[2]["global_style"]}, made[3]) if "teacher" in row.what]
    assert first.forwards == earlier.forwards


@pytest.mark.slow
def test_a_proof_that_fails_leaves_the_weights_for_another(base_folder, workspace, made, monkeypatch):
    from danceopd.evaluation import scoring

    settings = [f"model.base={base_folder}", *SMALL, "teachers.global_style.train.seed=77"]
    run = steps.Run(load_recipe("world", settings), workspace, *made[:2])

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_records", killed)
        with pytest.raises(KeyboardInterrupt):
            steps.finetune_teacher(run, "global_style")
    forbid_training(monkeypatch)
    product = steps.finetune_teacher(run, "global_style")
    assert product.facts["scores"]["global_style"]["teacher"]["psnr"] > 0


def test_the_stock_pipeline_opens_the_student_and_draws(made):
    pipeline = Flux2KleinPipeline.from_pretrained(str(made[3].pipeline))
    picture = pipeline(
        prompt="red ring top left on white",
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=PROMPT_TOKENS,
        text_encoder_out_layers=OUT_LAYERS,
    ).images[0]
    assert picture.size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_the_export_is_the_student(base_folder, workspace, made, trainable):
    from safetensors.torch import load_file

    recipe = load_recipe(
        "world", [f"model.base={base_folder}", *SMALL, "distill.start=base", f"distill.trainable={trainable}"]
    )
    base, _, _, student = run_to_student(recipe, workspace)
    written = load_file(student.folder / "probe.safetensors")["velocity"]
    exported = load_backbone(student.pipeline, recipe.model)
    condition = Condition(exported.encode_prompts(["", recipe.name]), None, 64, 64)
    found = probe(VelocityField("student", exported, exported.transformer), condition)
    torch.testing.assert_close(found, written, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(
        found, probe(load_field(load_backbone(base.pipeline, recipe.model), "base", made[2]["base"].folder), condition)
    )
    assert (student.folder / "lora").is_dir() == (trainable == "lora")
    for file in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"):
        assert (student.folder / "lora" / file).is_file() == (trainable == "lora")
    assert read_sampling(student.pipeline) == recipe.sampling("student") == Sampling(steps=recipe.evaluate.steps)
    card = (student.pipeline / "README.md").read_text()
    assert "Not evaluated yet" in card and ("load_lora_weights" in card) == (trainable == "lora")
    if trainable == "lora":
        fresh = load_backbone(base.pipeline, recipe.model)
        lora = probe(load_field(fresh, "student", student.folder), condition)
        torch.testing.assert_close(lora, written, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "trained"), [("joint", 3), ("merge_average", 0)])
def test_methods_that_train_on_data_or_not_at_all_make_students_too(base_folder, workspace, made, method, trained):
    settings = ["distill.start=base", "distill.trainable=full", f"distill.method={method}"]
    recipe = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
    student = steps.distill_student(steps.Run(recipe, workspace, *made[:2]), made[2])
    assert student.facts["steps"] == trained
    assert set(student.facts["loss"]) == (set(recipe.tasks) if trained else set())
    assert student.facts["forwards_per_sample"] == trained
    assert sorted(p.name for p in (student.folder / "previews").iterdir())[-1] == "training.png"
    assert load_backbone(student.pipeline, recipe.model).transformer is not None
    assert student.digest != made[3].digest


@pytest.mark.slow
def test_a_map_of_teachers_is_a_product_with_a_picture(recipe, workspace, made):
    base, data, teachers, _ = made
    run = steps.Run(recipe, workspace, base, data)
    mapped = steps.map_teachers(run, teachers, levels=2, records=3)
    assert (mapped.folder / "map.png").read_bytes().startswith(b"\x89PNG")
    assert read_json(mapped.folder / "map.json") == mapped.facts
    assert mapped.facts["disagreement"]["t2i"]["base"] == pytest.approx([0, 0], abs=1e-6)  # the student starts as it
    assert min(mapped.facts["disagreement"]["global_style"]["global_style"]) > 0
    assert set(mapped.facts["conflict"]) == {"t2i / local_edit", "t2i / global_style", "local_edit / global_style"}
    assert steps.map_teachers(run, teachers, levels=2, records=3).folder == mapped.folder
    assert steps.map_teachers(run, teachers, levels=3, records=3).folder != mapped.folder


def test_a_map_that_cannot_be_made_is_refused(base_folder, recipe, workspace, made, monkeypatch):
    base, data, teachers, _ = made
    with pytest.raises(UserError, match="--levels 4: the student's grid has 3 steps"):
        steps.map_teachers(steps.Run(recipe, workspace, base, data), teachers, levels=4, records=3)
    merge = load_recipe("world", [f"model.base={base_folder}", *SMALL, "distill.method=merge_average"])
    with pytest.raises(UserError, match="merge_average trains nothing"):
        steps.map_teachers(steps.Run(merge, workspace, base, data), teachers, levels=2, records=3)
    monkeypatch.setattr("danceopd.steps.teacher_map.joined_processes", lambda: Processes(0, 2, torch.device("cpu")))
    with pytest.raises(UserError, match="made by one process"):
        steps.map_teachers(steps.Run(recipe, workspace, base, data), teachers, levels=2, records=3)


@pytest.mark.slow
def test_evaluation_and_registration_follow(recipe, workspace, made):
    base, data, teachers, student = made
    evaluation = steps.evaluate_student(steps.Run(recipe, workspace, base, data), teachers, student)
    metrics = read_json(evaluation.folder / "metrics.json")
    assert set(metrics["scores"]) == {"base", "local_edit", "global_style", "student"}
    assert (evaluation.folder / "report.html").stat().st_size > 10_000
    told = (evaluation.folder / "report.md").read_text()
    facts = student.facts
    assert facts["forwards"] == pytest.approx(
        facts["forwards_per_sample"] * recipe.distill.batch * facts["steps"], abs=1
    )
    assert re.search(rf"- cost, distillation: [\d,]+ s on \d+ CPU cores?, {facts['forwards']:,} forwards\n", told)
    assert re.search(rf"- cost, evaluation: [\d,]+ s on \d+ CPU cores?, {metrics['forwards']:,} forwards\n", told)
    trained = sum(teacher.facts.get("forwards", 0) for teacher in teachers.values())
    assert trained > 0 and f"- cost, forwards: {trained + facts['forwards'] + metrics['forwards']:,}\n" in told
    assert re.search(r"- cost, CPU core hours: [\d.e-]+\n", told) and f"- software, torch: {torch.__version__}" in told
    for fact in ("recipe", "code", "dvc", "data", "base", "student"):
        assert f"- Run, {fact}: " in told
    lineage = steps.lineage(steps.Run(recipe, workspace, base, data), teachers, student)
    assert lineage["teachers"] == {name: product.digest for name, product in teachers.items()}
    assert json.dumps(lineage)


def test_a_teacher_no_better_than_the_base_fails_with_the_figures(base_folder, workspace, made, monkeypatch, caplog):
    from danceopd.evaluation import scoring as ev

    figures = {"base": [2.5], "global_style": [2.0]}
    monkeypatch.setattr(ev, "score_records", lambda field, *_: ev.Scored(None, {"psnr": figures[field.name]}))
    teacher = f"{{kind: lora, path: {made[2]['global_style'].folder}}}"
    settings = [f"model.base={base_folder}", *SMALL, f"teachers.global_style={teacher}"]
    with pytest.raises(UserError, match=r"no better than the base on its task 'global_style' \(psnr 2, the base 2.5"):
        steps.finetune_teacher(steps.Run(load_recipe("world", settings), workspace / "lost", *made[:2]), "global_style")
    assert not list((workspace / "lost" / "teachers").iterdir())
    with caplog.at_level(logging.WARNING, "danceopd"):  # a metric without a gate is there to be looked at
        product = steps.finetune_teacher(
            steps.Run(with_teacher(base_folder, teacher), workspace / "l", *made[:2]), "global_style"
        )
    assert "global_style is no better than the base on global_style, which has no gates" in caplog.text
    assert product.facts["scores"] == {"global_style": {"base": {"psnr": 2.5}, "teacher": {"psnr": 2.0}}}


def test_a_teacher_that_exists_is_taken_and_proved(base_folder, workspace, made):
    path = made[2]["global_style"].folder
    settings = [f"teachers.global_style={{kind: lora, path: {path}}}"]
    recipe = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
    product = steps.finetune_teacher(steps.Run(recipe, workspace, *made[:2]), "global_style")
    assert product.facts["scores"] == made[2]["global_style"].facts["scores"]


def with_teacher(base_folder, teacher, *settings):
    """The small recipe with another teacher of the styles, which no gate judges."""
    own = [f"teachers.global_style={teacher}", "tasks.global_style.gates=[]", *settings]
    return load_recipe("world", [f"model.base={base_folder}", *SMALL, *own])


def state_of(folder, dtype=None):
    from safetensors.torch import load_file

    found = load_file(next((folder / "transformer").glob("*.safetensors")))
    return {key: value.to(dtype or value.dtype) for key, value in found.items()}


@pytest.mark.slow
def test_a_teacher_that_changes_nothing_is_refused_by_name(base_folder, workspace, made, tmp_path):
    from safetensors.torch import save_file

    from danceopd.backbones.lora import add_lora, save_lora
    from danceopd.config.recipe import LoraRecipe

    backbone = load_backbone(base_folder, with_teacher(base_folder, "{kind: base}").model)
    add_lora(backbone.transformer, "fresh", LoraRecipe(rank=2, alpha=2), backbone.lora_targets, 0)
    save_lora(backbone.transformer, "fresh", tmp_path / "fresh")
    save_file(state_of(base_folder, torch.bfloat16), tmp_path / "half.safetensors")
    for teacher, settings, why in (
        (f"{{kind: lora, path: {tmp_path / 'fresh'}}}", [], "an untrained LoRA"),
        (f"{{kind: checkpoint, path: {base_folder}}}", [], "this base's own weights"),
        (f"{{kind: checkpoint, path: {base_folder}, guidance: 3}}", [], "For the base itself write kind: base"),
        (f"{{kind: checkpoint, path: {tmp_path / 'half.safetensors'}}}", [], "this base's own weights"),
        (
            "{kind: finetune, task: global_style, train: {trainable: lora, lr: 1.0e-12, steps: 1, batch: 2}}",
            [],
            r"train it longer, or at a higher rate \(teachers\.global_style\.train\)",
        ),
    ):
        recipe = with_teacher(base_folder, teacher, *settings)
        with pytest.raises(
            UserError, match=rf"teachers\.global_style changes the base's velocity by .* nothing; .*{why}"
        ):
            steps.finetune_teacher(steps.Run(recipe, workspace, *made[:2]), "global_style")
    recipe = with_teacher(base_folder, f"{{kind: checkpoint, path: {tmp_path / 'fresh'}}}")
    with pytest.raises(UserError, match=r"kind is checkpoint, and .* holds a lora; write kind: lora"):
        steps.finetune_teacher(steps.Run(recipe, workspace, *made[:2]), "global_style")


def test_guidance_that_finds_no_prompt_is_refused(base_folder, made, tmp_path):
    from safetensors.torch import save_file

    deaf = shutil.copytree(base_folder, tmp_path / "deaf")
    file = next((deaf / "transformer").glob("*.safetensors"))
    state = state_of(deaf)
    save_file(state | {"context_embedder.weight": 0 * state["context_embedder.weight"]}, file, {"format": "pt"})
    recipe = with_teacher(deaf, "{kind: base, guidance: 3}")
    with pytest.raises(UserError, match=r"teachers\.global_style changes .* guidance finds no difference between"):
        steps.finetune_teacher(
            steps.Run(recipe, tmp_path, steps.resolve_base(recipe, tmp_path), made[1]), "global_style"
        )


@pytest.mark.slow
def test_merged_and_other_checkpoints_teach(base_folder, workspace, made, tmp_path):
    from safetensors.torch import save_file

    from danceopd.backbones.lora import plain_copy

    base, data, teachers, _ = made
    model = with_teacher(base_folder, "{kind: base}").model
    lora = load_field(load_backbone(base_folder, model), "lora", teachers["global_style"].folder)
    merged = plain_copy(lora.network, merge="lora")
    lora.backbone.save(tmp_path / "merged", merged)
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    save_file({key: value * 0.9 for key, value in state_of(base_folder).items()}, tmp_path / "other.safetensors")
    condition = Condition(lora.backbone.encode_prompts(["a ring", ""]), None, 64, 64)
    wanted = probe(lora, condition)
    for name, same in (("merged", True), ("merged.safetensors", True), ("other.safetensors", False)):
        recipe = with_teacher(base_folder, f"{{kind: checkpoint, path: {tmp_path / name}}}")
        product = steps.finetune_teacher(steps.Run(recipe, workspace, base, data), "global_style")
        found = probe(load_field(load_backbone(base_folder, model), "x", product.folder), condition)
        assert torch.allclose(found, wanted, atol=1e-4) == same


def test_missing_things_are_named(recipe, workspace, made):
    base, data, teachers, _ = made
    with pytest.raises(UserError, match="teacher 'painter' is not in the recipe; teachers are: "):
        steps.finetune_teacher(steps.Run(recipe, workspace, base, data), "painter")
    with pytest.raises(UserError, match=r"lacks the teacher\(s\) global_style"):
        steps.distill_student(
            steps.Run(recipe, workspace, base, data), {"base": teachers["base"], "local_edit": teachers["base"]}
        )
    with pytest.raises(UserError, match="no finished step there"):
        steps.open_product(workspace)


def test_a_task_without_training_records_is_named(recipe, workspace, made, base_folder):
    base, _, teachers, _ = made
    whole = "{train: 3, val: 2, test: 2}"
    sizes = f"data.world={{t2i: {whole}, global_style: {whole}, local_edit: {{val: 2, test: 2}}}}"
    bare = load_recipe("world", [f"model.base={base_folder}", *SMALL, sizes])
    data = steps.build_data(bare, workspace, repo=workspace)
    with pytest.raises(UserError, match=r"no training records for task\(s\) local_edit"):
        steps.distill_student(steps.Run(bare, workspace, base, data), teachers)


@pytest.mark.slow
def test_a_guided_teacher_goes_the_whole_way(base_folder, workspace, made, monkeypatch, caplog):
    from danceopd.evaluation import scoring as ev

    settings = [
        "teachers.strong={kind: base, guidance: 3}",
        "tasks.t2i.teacher=strong",
        "distill.start=base",
        "tasks.t2i.metrics=[scene_accuracy, psnr]",
        "tasks.t2i.gates=[]",
    ]
    guided = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
    base, data, teachers, _ = made
    scores = iter([0.1, 0.2])  # the random base's guided pictures are no better than its own
    monkeypatch.setattr(ev, "score_records", lambda field, *_: ev.Scored(None, {"scene_accuracy": [next(scores)]}))
    strong = steps.finetune_teacher(steps.Run(guided, workspace, base, data), "strong")
    monkeypatch.undo()
    assert read_json(strong.folder / "field.json")["guidance"] == {"scale": 3.0, "batched": True}
    assert strong.facts["scores"]["t2i"]["teacher"] == {"scene_accuracy": 0.2}
    with caplog.at_level(logging.INFO, "danceopd"):
        student = steps.distill_student(steps.Run(guided, workspace, base, data), teachers | {"strong": strong})
    assert student.facts["loss"]["t2i"] > 1e-6  # plain, the base would teach itself
    assert any("teacher 'strong' and the student differ" in line for line in caplog.messages)
    evaluation = steps.evaluate_student(
        steps.Run(guided, workspace, base, data), teachers | {"strong": strong}, student
    )
    scores = read_json(evaluation.folder / "metrics.json")["scores"]
    assert scores["strong"]["t2i"]["psnr"] != scores["base"]["t2i"]["psnr"]


def test_a_teacher_that_cannot_be_proved_is_not_trained(recipe, made, tmp_path, monkeypatch):
    base, data, _, _ = made
    counts = {task: of | ({"val": 0} if task == "global_style" else {}) for task, of in data.facts["counts"].items()}
    unsplit = steps.Product(data.folder, "1" * 64, data.facts | {"counts": counts})
    monkeypatch.setattr("danceopd.finetune.finetune", None)
    with pytest.raises(UserError, match=r"task 'global_style': no records in split 'val', on which teacher 'global_s"):
        steps.finetune_teacher(steps.Run(recipe, tmp_path, base, unsplit), "global_style")


def test_a_guided_teacher_no_better_than_the_base_is_refused(base_folder, workspace, made):
    settings = ["teachers.strong={kind: base, guidance: 3}", "tasks.t2i.teacher=strong"]
    guided = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
    with pytest.raises(UserError, match="teacher 'strong' is no better than the base on its task 't2i'"):
        steps.finetune_teacher(steps.Run(guided, workspace, *made[:2]), "strong")


def test_a_guided_checkpoint_keeps_its_weights(base_folder, workspace, made):
    path = made[2]["global_style"].folder
    settings = [f"teachers.global_style={{kind: lora, path: {path}, guidance: 1.01, guidance_batched: false}}"]
    recipe = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
    product = steps.finetune_teacher(steps.Run(recipe, workspace, *made[:2]), "global_style")
    assert read_json(product.folder / "field.json")["guidance"] == {"scale": 1.01, "batched": False}
    assert product.facts["scores"] != made[2]["global_style"].facts["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_bfloat16_base_and_offloaded_teachers_go_the_whole_way(base_folder, tmp_path, trainable):
    from danceopd.export.student import check_export, prove_export

    settings = [
        "model.dtype=bfloat16",
        "model.offload=true",
        "distill.start=base",
        f"distill.trainable={trainable}",
        "teachers.global_style.train={trainable: full, lr: 0.002, steps: 40, batch: 8, warmup: 2}",
    ]
    recipe = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
    made = run_to_student(recipe, tmp_path)
    student = made[3]
    evaluation = steps.evaluate_student(steps.Run(recipe, tmp_path, *made[:2]), *made[2:])
    assert set(evaluation.facts["scores"]) == {"t2i", "local_edit", "global_style"}
    assert check_export(student.folder) and prove_export(student.folder) < 1e-5


def test_preflight_stops_the_run_with_every_error(base_folder, workspace, made, recipe):
    base, data, teachers, _ = made
    worse = {"global_style": {"teacher": {"psnr": 1.0}, "base": {"psnr": 2.0}}}
    product = steps.Product(teachers["global_style"].folder, "0" * 64, {"kind": "lora", "scores": worse})
    strange = steps.Product(
        data.folder, data.digest, data.facts | {"counts": data.facts["counts"] | {"paint": {"train": 2}}}
    )
    with pytest.raises(
        UserError, match=r"unknown task\(s\) paint \(2\)(.|\n)*no better than the base \(psnr 1, the base 2"
    ):
        steps.distill_student(steps.Run(recipe, workspace, base, strange), teachers | {"global_style": product})
    assert not [p for p in (workspace / "students").iterdir() if p.name.startswith(".")]


def test_a_teacher_pipeline_of_another_latent_space_is_refused(base_folder, workspace, made, tmp_path):
    other = shutil.copytree(base_folder, tmp_path / "other")
    config = read_json(other / "vae" / "config.json")
    (other / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 9}))
    recipe = load_recipe(
        "world", [f"model.base={base_folder}", *SMALL, f"teachers.global_style={{kind: checkpoint, path: {other}}}"]
    )
    with pytest.raises(UserError, match=r"another latent space than the base: vae/config.json, scaling_factor is 9"):
        steps.finetune_teacher(steps.Run(recipe, workspace, *made[:2]), "global_style")


def test_the_data_revision_follows_recipe_and_inputs(recipe, tmp_path):
    settings = ["data.world=null", f"data.inputs=[{tmp_path / 'in.parquet'}]"]
    mine = load_recipe("world", settings)
    (tmp_path / "in.parquet").write_bytes(b"1")
    first = steps.data_revision(mine, tmp_path)
    assert first == steps.data_revision(mine, tmp_path)
    (tmp_path / "in.parquet").write_bytes(b"22")
    assert steps.data_revision(mine, tmp_path) != first
    assert steps.data_revision(recipe, tmp_path) != first


def test_the_code_revision_is_stable():
    assert steps.code_revision() == steps.code_revision()
    assert len(steps.code_revision()) == 16


def test_changed_inputs_are_read_again(recipe, base_folder, tmp_path):
    from danceopd.data import world
    from danceopd.data.assemble import assemble

    mine = load_recipe("world", [f"model.base={base_folder}", "data.world=null", f"data.inputs=[{tmp_path / 'in'}]"])
    found = []
    for count in (2, 3):
        assemble(world.world_records({"t2i": {"train": count}}), tmp_path / "in")
        found.append(steps.build_data(mine, tmp_path / "ws", repo=tmp_path))
    assert [p.facts["counts"]["t2i"]["train"] for p in found] == [2, 3]
    assert found[0].digest != found[1].digest


@pytest.mark.slow
def test_a_start_that_teaches_no_task_is_brought_along(base_folder, workspace, made):
    settings = [f"model.base={base_folder}", *SMALL, "tasks.global_style.teacher=base", "distill.start=global_style"]
    recipe = load_recipe("world", settings)
    base, data, teachers, _ = made
    with pytest.raises(UserError, match=r"lacks the teacher\(s\) global_style"):
        steps.distill_student(
            steps.Run(recipe, workspace, base, data), {n: t for n, t in teachers.items() if n != "global_style"}
        )
    student = steps.distill_student(steps.Run(recipe, workspace, base, data), teachers)
    loss = read_json(student.folder / "history.json")[0]["loss"]
    assert loss["t2i"] > 1e-6  # it does not start as the base, which teaches this task


def test_an_evaluation_is_made_anew_once_a_metric_can_be_measured(recipe, base_folder, tmp_path):
    clip = tmp_path / "clip"
    settings = ["tasks.t2i.metrics=[scene_accuracy, clip_score]", f"evaluate.networks.clip={clip}"]
    asking = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
    lacking = looks_with(asking)
    clip.mkdir()
    (clip / "model.safetensors").write_bytes(b"1")
    there = looks_with(asking)
    (clip / "model.safetensors").write_bytes(b"2")
    assert looks_with(recipe) == [] and "not there" in lacking[0]["clip"][0]
    assert there[0]["clip"][0] is None and there != looks_with(asking) != lacking


def test_a_teacher_that_nothing_here_can_measure_is_refused(base_folder, workspace, made):
    settings = [
        "teachers.strong={kind: base, guidance: 3}",
        "tasks.t2i.teacher=strong",
        "tasks.t2i.metrics=[clip_score]",
        "tasks.t2i.gates=[]",
    ]
    guided = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
    with pytest.raises(UserError, match=r"none of its metrics can be measured here \(clip_score: evaluate.networks"):
        steps.finetune_teacher(steps.Run(guided, workspace, *made[:2]), "strong")


@pytest.mark.slow
def test_a_champion_measured_otherwise_is_measured_anew(base_folder, workspace, made, recipe, tmp_path, caplog):
    base, data, teachers, student = made
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = [f"model.base={base_folder}", *SMALL, "distill.window=semantic"]
    alike, otherwise = (load_recipe("world", [*settings, f"evaluate.seed={seed}"]) for seed in (0, 3))
    first, second, third = (steps.Run(of, workspace, base, data, store) for of in (recipe, alike, otherwise))

    def measure(run, student, place=workspace):
        evaluation = steps.evaluate_student(run, teachers, student)
        return steps.measure_champion(replace(run, workspace=place), student, evaluation)

    def register(run, student):
        return steps.register_student(run, teachers, student, steps.evaluate_student(run, teachers, student))

    assert measure(first, student) is None  # no store yet
    assert register(first, student).alias == ["champion"]
    other = steps.distill_student(second, teachers)
    assert other.digest != student.digest
    assert measure(first, student) is None  # the champion itself
    assert measure(second, other) is None  # its own figures do
    found = measure(third, other)
    assert (found.version, found.reason) == ("1", "")
    assert found.measured.scores == steps.evaluate_student(third, teachers, student).facts["scores"]
    with caplog.at_level(logging.INFO, "danceopd"):
        assert measure(third, other) == found
    assert any("champions version-1: reused" in line for line in caplog.messages)
    shutil.rmtree(tmp_path / "mlflow-artifacts")
    lost = measure(third, other, tmp_path / "elsewhere")
    assert lost.measured is None and "its files cannot be fetched" in lost.reason
    shutil.rmtree(workspace / "champions")
    refused = register(third, other)
    assert refused.alias == ["challenger"] and "its files cannot be fetched" in refused.reasons[0]


@pytest.mark.slow
def test_what_the_registry_said_is_asked_again_only_once_it_changes(workspace, made, recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    base, data, teachers, student = made
    evaluation = steps.evaluate_student(steps.Run(recipe, workspace, base, data), teachers, student)
    run = steps.Run(recipe, tmp_path, base, data)
    first = steps.register_student(run, teachers, student, evaluation)
    client = mlflow_store.open_client(run.store)

    def refuse(uri):
        raise ConnectionError("asked")

    with monkeypatch.context() as away:
        away.setattr(mlflow_store, "open_client", refuse)
        assert steps.register_student(run, teachers, student, evaluation) == first
    client.delete_registered_model_alias(recipe.register_as.model, "champion")
    with monkeypatch.context() as away:
        away.setattr(mlflow_store, "open_client", refuse)
        with pytest.raises(ConnectionError, match="asked"):
            steps.register_student(run, teachers, student, evaluation)
    assert steps.register_student(run, teachers, student, evaluation).alias != first.alias == ["champion"]


@pytest.mark.slow
def test_a_champion_is_judged_again_where_the_judge_has_moved(base_folder, workspace, made, tmp_path, judge_server):
    base, data, teachers, student = made
    settings = [
        f"model.base={base_folder}",
        *SMALL,
        "tasks.global_style.metrics=[psnr, judge_overall]",
        "tasks.global_style.gates=[{metric: judge_overall, max_drop: 9, champion_margin: 0.5}]",
        "register_as.model=judged",
        f"evaluate.judge={{url: {judge_server.url}, model: m}}",
    ]
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first, second = (
        steps.Run(load_recipe("world", [*settings, *more]), workspace, base, data, store)
        for more in ([], ["distill.window=semantic"])
    )

    def evaluate(run, student):
        return steps.evaluate_student(run, teachers, student)

    def register(run, student):
        return steps.register_student(run, teachers, student, evaluate(run, student))

    assert register(first, student).alias == ["champion"]
    other = steps.distill_student(second, teachers)
    before = evaluate(second, other)
    assert steps.measure_champion(second, other, before) is None  # the judge said the same of the canaries
    shutil.rmtree(before.folder)
    judge_server.usual = GOOD | {"instruction": 7, "preservation": 7}  # another judge under the same name
    stale = evaluate(second, other)
    judge_server.usual = GOOD | {"instruction": 5, "preservation": 5}  # and another one
    refused = steps.measure_champion(second, other, stale)
    assert refused.measured is None and f"since the student was judged; remove {stale.folder}" in refused.reason
    shutil.rmtree(stale.folder)
    found = steps.measure_champion(second, other, evaluate(second, other))
    assert found.measured.scores["global_style"]["judge_overall"] == pytest.approx(30**0.5)
    done = register(second, other)
    assert (done.alias, done.reasons) == (["champion"], [])  # below the old figure, 6, by more than the margin


def test_what_selects_a_state_names_the_student(base_folder, made, workspace, tmp_path):
    base, data, teachers, _ = made
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"1")
    select = ["distill.select={every: 1}", "tasks.global_style.metrics=[psnr, clip_score]"]

    def name(*settings: str) -> str:
        recipe = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
        return steps.student_folder(steps.Run(recipe, workspace, base, data), teachers).name

    assert name() == name("evaluate.seed=1")
    changes = ([], ["evaluate.seed=1"], ["evaluate.steps=3"], [f"evaluate.networks.clip={tmp_path / 'clip'}"])
    assert len({name(*select, *more) for more in changes}) == 4
    judged = [*select, "tasks.global_style.metrics=[psnr, judge_overall]"]
    judges = [f"evaluate.judge={{url: http://{host}/v1, model: {model}}}" for host, model in ("am", "bm", "an")]
    assert len({name(*judged, judge) for judge in judges}) == 2


def test_an_unfinished_run_under_other_settings_is_told(tmp_path, caplog):
    from danceopd.workspace import make_product

    def build(scratch, checkpoints):
        (checkpoints / "step-00000004").mkdir(parents=True, exist_ok=True)
        raise RuntimeError("stopped")

    for name in ("world", "world-big"):
        with pytest.raises(RuntimeError, match="stopped"):
            make_product(tmp_path, "students", name, {"lr": 1}, build)
    assert "unfinished" not in caplog.text
    with pytest.raises(RuntimeError, match="stopped"):
        make_product(tmp_path, "students", "world", {"lr": 1}, build)  # the same goes on
    assert "unfinished" not in caplog.text
    with caplog.at_level(logging.WARNING, "danceopd"):
        make_product(tmp_path, "students", "world", {"lr": 2}, lambda scratch, checkpoints: {})
    [told] = [line for line in caplog.messages if "unfinished" in line]
    assert "students-world-" in told and "world-big" not in told and "saved at step 4" in told
