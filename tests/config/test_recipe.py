"""Recipes: the shipped ones load, and every mistake gets one line that lists the right names."""

from __future__ import annotations

import pytest
import yaml

from danceopd.config.load import RECIPES, apply_overrides, load_recipe, parse_recipe
from danceopd.config.shipped import shipped_names
from danceopd.errors import UserError
from danceopd.evaluation.metrics import METRICS


@pytest.mark.parametrize("name", shipped_names(RECIPES))
def test_shipped_recipes_load_and_survive_json(name):
    recipe = load_recipe(name)
    again = type(recipe).model_validate_json(recipe.model_dump_json())
    assert again == recipe
    assert again.digest() == recipe.digest()


@pytest.mark.parametrize("name", ["zimage_t2i_edit", "zimage_local_global", "sd35_realism", "flux2_klein_t2i_edit"])
def test_recipes_of_the_paper_hold_its_settings(name):
    recipe = load_recipe(name)
    spec, model = recipe.distill, recipe.model
    assert (spec.method, spec.trainable, spec.lora.rank, spec.lora.alpha) == ("danceopd", "lora", 128, 128)
    assert (spec.lr, spec.rollout_steps, spec.window, spec.steps) == (2e-4, 16, "late_steps", 3000)
    assert (model.height, model.width) == (1024, 1024)
    for task in recipe.tasks.values():
        assert set(task.metrics) <= set(METRICS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("distill.stps=3", r"distill\.stps: no such field; here are: accumulate, .*steps, "),
        ("teachers.local_edit.train.lrr=1", r"lrr: no such field; here are: accumulate, .*lr, "),
        (
            "distill.window=sematic",
            "distill.window: Input should be .semantic., .* .early_steps., .late_steps. or .every_step.",
        ),
        ("distill.window=[0.5, 0.2]", "sigma_lo < sigma_hi"),
        ("distill.window=[{until: 0.5, window: mid}]", "'until' must rise and the last be 1"),
        ("distill.window=[{until: 1, window: [0.5, 0.2]}]", "sigma_lo < sigma_hi"),
        ("tasks.t2i.weight=[{until: 0.5, weight: 1}]", "weight: the phases end at"),
        ("tasks.t2i.weight=0", r"tasks\.t2i\.weight"),
        (
            "distill={parallel: shard, optimizer: adamw8bit, lr: 1, steps: 1, batch: 3}",
            "parallel: shard cannot share out the state of optimizer adamw8bit; use adamw or muon",
        ),
        ("distill.optimizer=adam", "'adamw', 'adamw8bit' or 'muon'"),
        ("distill.start=nobody", "distill.start is 'nobody'; choose one of: base, "),
        ("distill.method=dance", "Input should be 'danceopd', 'off_policy', 'soft', 'dense'"),
        ("distill.queries=8", "queries is for method dense, and method is danceopd; remove it"),
        (
            "distill.merge_scale=1",
            "merge_scale is for method merge_task_arithmetic or merge_ties, and",
        ),
        ("distill.merge_density=0.5", "merge_density is for method merge_ties, and method is danceopd; remove it"),
        ("distill.merge_density=0", r"distill\.merge_density: Input should be greater than 0"),
        (
            "distill={start: local_edit, trainable: lora, lr: 1, steps: 1, batch: 3}",
            "a LoRA student starts from the base",
        ),
        ("distill.rollout_stride=0", r"distill\.rollout_stride: Input should be greater than 0"),
        ("distill.steps=0", r"distill\.steps: Input should be greater than 0"),
        ("tasks.t2i.teacher=nobody", "tasks.t2i.teacher is 'nobody'; teachers are: base, local_edit, global_style"),
        ("teachers.local_edit.task=paint", "teachers.local_edit.task is 'paint'; tasks are: "),
        ("teachers.base={kind: checkpoint, path: x}", "'base' the base's"),
        ("teachers.base.guidance=3.5", "'base' is the plain base; give the guided one another name"),
        ("distill.guidance={keep: 3, absorb: 3}", "distill.guidance: give exactly one of 'keep' and 'absorb'"),
        ("distill.target_steps=3", "distill: target_steps is for target: displacement, and target is velocity"),
        ("teachers.local_edit.guidance=1", "guidance: Input should be greater than 1"),
        ("model.dtype=float16", "'float32' or 'bfloat16'"),
        ("tasks.t2i.gates=[{metric: psnr, retain: 0.9, champion_margin: 0}]", "not among the task's metrics"),
        ("tasks.t2i.gates=[{metric: scene_accuracy, champion_margin: 0}]", "exactly one of 'retain' and 'max_drop'"),
        (
            "tasks.t2i={teacher: base, needs_source: false, metrics: [fid], "
            "gates: [{metric: fid, retain: 0.9, champion_margin: 0}]}",
            "gate on 'fid': it is minus a distance, of which no share is kept; give 'max_drop'",
        ),
        ("evaluate.benchmarks={x: {input: f, task: nobody, metrics: [psnr]}}", "x.task is 'nobody'; tasks are: t2i"),
        ("evaluate.benchmarks={t2i: {input: f, task: t2i, metrics: [psnr]}}", "a task has that name already"),
        ("evaluate.judge={url: 'http://h/v1'}", "model: Field required"),
        ("data.inputs=[x.parquet]", "give either 'inputs'"),
        ("model.backbone=z_image", "text_encoder_out_layers is for flux2_klein, and backbone is z_image; remove it"),
        (
            "model={base: x, backbone: sd3, height: 64, width: 64}",
            "tasks.local_edit.needs_source: backbone sd3 cannot edit a source image; take another base, or remove",
        ),
        ("distill.steps", "write it as key.sub=value"),
        ("name.more=1", "'name' is not a section"),
        ("distill.steps=[", "not valid YAML"),
    ],
)
def test_mistakes_are_named(setting, message):
    with pytest.raises(UserError, match=message):
        load_recipe("world", [setting])


def test_overrides_reach_any_depth_and_leave_the_tree_alone():
    tree = {"a": {"b": 1}}
    assert apply_overrides(tree, ["a.b=[1, 2]", "a.c.d=x"]) == {"a": {"b": [1, 2], "c": {"d": "x"}}}
    assert tree == {"a": {"b": 1}}


def test_the_digest_follows_the_settings():
    assert load_recipe("world").digest() != load_recipe("world", ["distill.steps=7"]).digest()


def test_files_that_are_no_recipe_are_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "broken.yaml").write_text("a: [")
    for name, message in (("list.yaml", "YAML mapping, this is list"), ("broken.yaml", "not valid YAML")):
        with pytest.raises(UserError, match=message):
            load_recipe(str(tmp_path / name))
    with pytest.raises(UserError, match=r"neither a file nor a shipped recipe; shipped: .*world"):
        load_recipe("wrld")


def test_a_recipe_file_is_read_as_a_shipped_one(tmp_path):
    recipe = load_recipe("world")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(str(path)) == recipe
    assert parse_recipe(recipe.model_dump(mode="json"), "x") == recipe


def test_how_often_training_is_saved_names_no_product():
    settings = [
        f"{place}.{knob}=7"
        for place in ("distill", "teachers.local_edit.train")
        for knob in ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints")
    ]
    plain, saved = load_recipe("world"), load_recipe("world", settings)
    assert saved.distill.checkpoint_every == saved.teachers["local_edit"].train.keep_checkpoints == 7
    assert saved.distill.decisive() == plain.distill.decisive()
    assert saved.teachers["local_edit"].decisive() == plain.teachers["local_edit"].decisive()
    changed = load_recipe("world", ["distill.lr=0.5", "teachers.local_edit.train.seed=3"])
    assert changed.distill.decisive() != plain.distill.decisive()
    assert changed.teachers["local_edit"].decisive() != plain.teachers["local_edit"].decisive()


@pytest.mark.parametrize(
    "setting", ["distill.checkpoint_every=-1", "distill.checkpoint_minutes=-1", "distill.keep_checkpoints=0"]
)
def test_saves_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=setting.split("=")[0]):
        load_recipe("world", [setting])


def test_where_weights_wait_names_no_product():
    plain, offloaded = load_recipe("world"), load_recipe("world", ["model.offload=true"])
    assert offloaded.model.decisive() == plain.model.decisive()
    assert load_recipe("world", ["model.dtype=bfloat16"]).model.decisive() != plain.model.decisive()


def seeds(*overrides: str) -> dict[str, int]:
    recipe = load_recipe("world", overrides)
    trained = {name: t.train for name, t in recipe.teachers.items() if t.kind == "finetune"}
    return {name: spec.seed for name, spec in {**trained, "student": recipe.distill}.items()}


def test_one_seed_is_that_of_teachers_and_student_and_a_value_beside_it_wins():
    assert set(seeds().values()) == {0}
    assert set(seeds("seed=5").values()) == {5}
    assert seeds("seed=5", "distill.seed=3") == seeds("seed=5") | {"student": 3}
    own = seeds("seed=5", "teachers.local_edit.train.seed=0")
    assert own == seeds("seed=5") | {"local_edit": 0}


def test_a_product_is_named_by_the_seed_and_a_recipe_is_read_back_with_it():
    first, second = (load_recipe("world", [f"seed={seed}"]) for seed in (1, 2))
    assert first.distill.decisive() != second.distill.decisive()
    assert first.teachers["local_edit"].decisive() != second.teachers["local_edit"].decisive()
    assert parse_recipe(first.model_dump(mode="json"), "again") == first


def test_a_seed_that_is_none_is_named():
    with pytest.raises(UserError, match="seed: Input should be greater than or equal to 0"):
        load_recipe("world", ["seed=-1"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.quantize=int8", "distill={parallel: shard, trainable: lora, lr: 1, steps: 1, batch: 3}"],
            r"distill\.parallel: shard cannot share out a base in 8 bits; remove model\.quantize",
        ),
        (
            ["model.offload=true", "distill.parallel=shard"],
            r"distill\.parallel: shard shares the teachers out as well; remove model\.offload",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        load_recipe("world", settings)


def test_a_lora_can_train_on_a_base_that_is_shared_out():
    settings = ["distill={parallel: shard, trainable: lora, optimizer: muon, lr: 1, steps: 1, batch: 3}"]
    assert load_recipe("world", settings).distill.parallel == "shard"


def test_kept_guidance_and_a_guided_teacher_do_not_go_together():
    settings = ["teachers.strong={kind: base, guidance: 3}", "distill.guidance={keep: 3}"]
    with pytest.raises(UserError, match=r"teachers\.strong\.guidance: distill\.guidance\.keep distils plain teachers"):
        load_recipe("world", settings)
    load_recipe("world", ["teachers.strong={kind: base, guidance: 3}", "distill.guidance={absorb: 2}"])
