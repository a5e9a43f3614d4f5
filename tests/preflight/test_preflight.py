"""What is said before the first step, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from danceopd.backbones import open_outline
from danceopd.backbones.base import Condition, repeated_blocks
from danceopd.backbones.lora import add_lora
from danceopd.config.load import load_recipe
from danceopd.config.recipe import LoraRecipe
from danceopd.data.assemble import open_dataset
from danceopd.data.encode import encode_records
from danceopd.errors import UserError
from danceopd.flow.fields import VelocityField
from danceopd.flow.guidance import GuidedField
from danceopd.preflight import memory
from danceopd.preflight.checks import check_proofs, check_records, check_stride, check_teachers_differ, preflight
from danceopd.preflight.compatibility import check_pipeline
from danceopd.preflight.fake_pass import Samples, kept_bytes
from danceopd.preflight.findings import Finding, settle
from danceopd.preflight.memory import (
    available_memory,
    check_memory,
    estimate_memory,
    gathered_bytes,
    largest_shapes,
    samples_at_once,
    trained_parameters,
)
from danceopd.pretraining import world_base
from danceopd.pretraining.world_base import SHAPE
from danceopd.training.learner import new_learner

SETTINGS = [
    "distill.start=base",
    "distill.batch=6",
    "teachers.local_edit={kind: base}",
    "teachers.global_style={kind: checkpoint, path: nowhere}",
]
COUNTS = {task: {"train": 12, "val": 6, "test": 6} for task in ("t2i", "local_edit", "global_style")}


def recipe_with(*settings):
    return load_recipe("world", [*SETTINGS, *settings])


@pytest.fixture
def base(own_backbone):
    return own_backbone


@pytest.fixture(scope="module")
def encoded(backbone, small_data):
    return encode_records(backbone, open_dataset(small_data).records("train"), 64, 64, None, "k", targets=False)


def teachers(base, factor=1.5):
    network = base.new_transformer()
    with torch.no_grad():
        network.proj_out.weight.mul_(factor)
    plain = VelocityField("base", base, base.transformer)
    return {"base": plain, "local_edit": plain, "global_style": VelocityField("global_style", base, network)}


def figures(teacher, base):
    scores = {"global_style": {"teacher": {"psnr": teacher}, "base": {"psnr": base}}}
    return {"base": {}, "local_edit": {}, "global_style": {"scores": scores}}


def levels(findings, check=None):
    return [f.level for f in findings if check in (None, f.check)]


def message(findings, level="error"):
    (found,) = [f.message for f in findings if f.level == level]
    return found


def meant(findings):
    """How many tasks keep what the student starts as."""
    return sum("the student starts as its teacher" in found.message for found in findings)


def test_a_sound_run_passes_and_says_its_figures(base, encoded, tiny_base, caplog):
    found = preflight(recipe_with(), base, tiny_base, teachers(base), figures(20, 10), encoded, COUNTS)
    with caplog.at_level(logging.INFO, "danceopd"):
        settle(found)
    assert "error" not in levels(found)
    assert levels(found, "teacher equals student") == ["note", "note", "note"]
    assert meant(found) == 2
    assert any("psnr 20, the base 10" in line for line in caplog.messages)
    assert any("memory: training needs about" in line for line in caplog.messages)
    assert all(p.requires_grad is False for p in base.transformer.parameters())


def test_a_merge_needs_no_memory_to_train_in(base, encoded, tiny_base):
    merge = recipe_with("distill.method=merge_average")
    found = preflight(merge, base, tiny_base, teachers(base), figures(20, 10), encoded, COUNTS)
    assert levels(found, "memory") == []


def test_errors_are_raised_together_a_line_each(caplog):
    found = [Finding("error", "a", "first"), Finding("warning", "b", "careful"), Finding("error", "c", "last")]
    with pytest.raises(UserError, match=r"^first\nlast$"):
        settle(found)
    assert caplog.messages == ["preflight: careful"]


def test_strides_say_how_far_they_lead_from_the_path(base, encoded):
    fields = teachers(base)
    for other in ("distill.rollout_stride=1", "distill.method=joint"):
        assert check_stride(recipe_with(other), base, fields, encoded) == []
    found = check_stride(recipe_with("distill.rollout_stride=4"), base, fields, encoded)
    assert [f.message.partition(":")[0] for f in found] == [f"task {task!r}" for task in COUNTS]
    assert set(levels(found)) == {"note"}
    shares = [float(f.message.partition("last query ")[2].split()[0]) for f in found]
    assert all(0 < share < 1 for share in shares)


@pytest.mark.parametrize(("accumulate", "processes", "most"), [(6, 1, 1), (1, 6, 1), (3, 1, 2), (1, 1, 6)])
def test_a_look_asks_no_more_samples_at_once_than_training(base, encoded, monkeypatch, accumulate, processes, most):
    asked = []
    plain = VelocityField.__call__

    def counted(field, z, sigma, condition):
        asked.append(len(z))
        return plain(field, z, sigma, condition)

    strides = ["distill.rollout_stride=2", "distill.rollout_steps=4"]
    whole = figures_of(recipe_with(*strides), base, encoded, 1)
    monkeypatch.setattr(VelocityField, "__call__", counted)
    assert figures_of(recipe_with(*strides, f"distill.accumulate={accumulate}"), base, encoded, processes) == whole
    assert max(asked) == most


def figures_of(recipe, base, encoded, processes):
    """What is said of teachers and strides, in two digits."""
    differ = check_teachers_differ(recipe, base, teachers(base), encoded, processes)
    return [found.message for found in [*differ, *check_stride(recipe, base, teachers(base), encoded, processes)]]


def test_a_teacher_that_is_the_student_is_an_error_unless_meant(base, encoded):
    same = teachers(base, factor=1.0)
    found = check_teachers_differ(recipe_with(), base, same, encoded)
    assert (
        "teacher 'global_style' is the same field as the student's start, 'base' (relative velocity difference 0"
        in (message(found))
    )
    on_purpose = recipe_with("distill.start=global_style", "distill.trainable=full")
    found = check_teachers_differ(on_purpose, base, teachers(base), encoded)
    assert levels(found) == ["note", "note", "note"]
    assert meant(found) == 1
    assert "the student starts as its teacher 'global_style'" in found[-1].message


def test_guidance_makes_the_base_a_teacher(base, encoded):
    recipe = recipe_with("teachers.strong={kind: base, guidance: 4}", "tasks.t2i.teacher=strong")
    plain = VelocityField("strong", base, base.transformer)
    empty = base.encode_prompts([""])[0]
    fields = teachers(base) | {"strong": GuidedField(plain, 4.0, empty)}
    found = check_teachers_differ(recipe, base, fields, encoded)
    assert levels(found) == ["note", "note", "note"]
    assert meant(found) == 1
    fields["strong"] = GuidedField(plain, 1.0, empty)
    assert "teacher 'strong' is the same field" in message(check_teachers_differ(recipe, base, fields, encoded))


@pytest.mark.parametrize(
    ("facts", "level", "text"),
    [
        (figures(12.5, 10), "note", "psnr 12.5, the base 10"),
        (figures(9, 10), "error", "no better than the base (psnr 9, the base 10)"),
        (figures(10, 10), "error", "no better than the base"),
        ({"global_style": {"scores": {}}}, "warning", "has no figures of psnr"),
    ],
)
def test_the_proof_of_each_teacher_is_read_again(facts, level, text):
    found = check_proofs(recipe_with(), facts)
    assert levels(found) == [level]
    assert text in found[0].message


def test_records_that_do_not_fit_are_counted(encoded):
    recipe = recipe_with("tasks.t2i.needs_source=true")
    found = check_records(recipe, COUNTS | {"paint": {"train": 3, "val": 1}, "gone": {"train": 0}}, encoded)
    unknown, sources = (f.message for f in found)
    assert unknown == "records of unknown task(s) paint (4); the recipe's tasks are: t2i, local_edit, global_style"
    assert "12 of its 12 training records have none" in sources
    rows = [row for row, task in enumerate(encoded.tasks) if task != "local_edit"]
    assert "no training records for task(s) local_edit" in message(
        check_records(recipe_with(), COUNTS, encoded.subset(rows))
    )
    assert check_records(recipe_with(), COUNTS, encoded) == []


@pytest.fixture
def other(tiny_base, tmp_path):
    """A pipeline folder like the base's, to change."""
    return shutil.copytree(tiny_base, tmp_path / "other")


def change_config(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weight(folder, name, change):
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    save_file({k: change(v) if name in (k, "*") else v for k, v in state.items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("file", "values", "check", "text"),
    [
        ("vae/config.json", {"latent_channels": 5}, "latent space", "latent_channels is 5, the base has 4"),
        ("vae/config.json", {"scaling_factor": 0.2}, "latent space", "scaling_factor is 0.2, the base has"),
        ("scheduler/scheduler_config.json", {"shift": 3.0}, "scheduler", "shift is 3.0, the base has"),
        ("text_encoder/config.json", {"hidden_size": 96}, "text encoder", "hidden_size is 96, the base has 64"),
        ("transformer/config.json", {"in_channels": 32}, "latent space", "in_channels is 32, the base has 16"),
        ("transformer/config.json", {"guidance_embeds": True}, "latent space", "guidance_embeds is True"),
    ],
)
def test_a_pipeline_that_speaks_another_language_is_an_error(tiny_base, other, file, values, check, text):
    assert check_pipeline("t", other, tiny_base) == []
    change_config(other / file, **values)
    found = check_pipeline("t", other, tiny_base)
    assert levels(found, check) == ["error"]
    assert text in message(found)
    assert file in message(found)


def test_a_larger_transformer_or_another_writer_is_none(tiny_base, other):
    change_config(other / "transformer/config.json", num_layers=7, _diffusers_version="9")
    change_config(other / "text_encoder/config.json", dtype="bfloat16", transformers_version="9")
    assert check_pipeline("t", other, tiny_base) == []
    assert check_pipeline("t", other / "transformer", tiny_base) == []


def test_other_encoder_weights_are_named_and_another_dtype_is_none(tiny_base, other):
    change_weight(other / "vae", "*", lambda w: w.bfloat16() if w.is_floating_point() else w)
    assert check_pipeline("t", other, tiny_base) == []
    change_weight(other / "vae", "bn.running_mean", lambda w: w + 1)
    assert "the weights of vae differ, first bn.running_mean" in message(check_pipeline("t", other, tiny_base))


def test_a_trained_text_encoder_is_named(tiny_base, other):
    change_weight(other / "text_encoder", "model.norm.weight", lambda w: w * 1.5)
    found = check_pipeline("t", other, tiny_base)
    assert "another text encoder than the base: the weights of text_encoder differ, first model.norm" in message(found)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_the_weights_that_will_train_are_counted(base, trainable):
    recipe = recipe_with(f"distill.trainable={trainable}", "distill.lora={rank: 3, alpha: 3}")
    add_lora(base.transformer, "teacher", recipe.distill.lora, base.lora_targets, 0)
    expected = trained_parameters(base.transformer, recipe.distill, base.lora_targets)
    learner = new_learner(base, "student", recipe.distill)
    assert expected == sum(p.numel() for p in learner.parameters)


def test_suffixes_are_targets_as_in_peft(base):
    recipe = recipe_with("distill.trainable=lora", "distill.lora={rank: 2, targets: [to_q, proj_out]}")
    expected = trained_parameters(base.transformer, recipe.distill, base.lora_targets)
    learner = new_learner(base, "student", recipe.distill)
    assert expected == sum(p.numel() for p in learner.parameters) > 0


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_the_activations_are_what_autograd_keeps(base, outline, trainable):
    recipe = recipe_with(f"distill.trainable={trainable}", "distill.lora={rank: 3, alpha: 3}")
    told = kept_bytes(outline, recipe.distill, Samples(2, 64, 64, True))
    learner = new_learner(base, "student", recipe.distill)
    network = learner.field.network
    kept, own = {}, {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    state = torch.zeros(2, *base.latent_shape(64, 64))
    condition = Condition(torch.zeros(2, *outline.prompt_shape(True)), state, 64, 64)
    with learner.field.active(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        held = base.velocity(network, state, torch.full((2,), 0.5), condition)
    real = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    assert held.requires_grad
    assert told == pytest.approx(real, rel=0.05)


@pytest.mark.slow
def test_what_is_kept_grows_with_samples_and_shrinks_by_precision_and_checkpointing(outline):
    def kept(*settings, count=4):
        return kept_bytes(outline, recipe_with(*settings).distill, Samples(count, 64, 64, True))

    assert kept(count=8) == pytest.approx(2 * kept(), rel=0.05)
    assert kept("distill.precision=bfloat16") < kept()
    assert kept("distill.activation_checkpointing=true") < 0.7 * kept()
    assert kept("distill.trainable=lora") < kept()


def estimate(outline, encoded, *settings, processes=1):
    recipe = recipe_with(*settings)
    shapes = largest_shapes(encoded, samples_at_once(recipe.distill, processes))
    return estimate_memory(recipe, outline, shapes, processes)


@pytest.fixture(scope="module")
def outline(tiny_base):
    return open_outline(tiny_base, SHAPE)


@pytest.mark.slow
def test_the_estimate_follows_the_recipe(outline, encoded):
    plain = estimate(outline, encoded, "distill.optimizer=adamw")
    count = plain.parameters
    assert (plain.weights, plain.gradients, plain.optimizer, plain.averages) == (4 * count, 4 * count, 8 * count, 0)
    assert estimate(outline, encoded, "distill.optimizer=adamw8bit").optimizer == 2 * count
    assert estimate(outline, encoded, "distill.ema=0.9", "distill.select={every: 1}").averages == 8 * count
    assert estimate(outline, encoded, "distill.trainable=lora").sure < plain.sure
    assert estimate(outline, encoded, "distill.accumulate=6").activations == pytest.approx(
        plain.activations / 6, rel=0.01
    )
    assert estimate(outline, encoded, processes=2).activations == pytest.approx(plain.activations / 2, rel=0.01)
    assert estimate(outline, encoded, "distill.activation_checkpointing=true").activations < 0.7 * plain.activations
    lora = ("distill.trainable=lora", "distill.start=base")
    copy = estimate(outline, encoded, *lora, "distill.rollout_weights=merged")
    changed = [m for name, m in outline.transformer.named_modules() if re.fullmatch(outline.lora_targets, name)]
    assert copy.merged == 4 * sum(m.weight.numel() for m in changed) > 0
    assert copy.sure == estimate(outline, encoded, *lora).sure + copy.merged
    assert "merged copy" in str(copy)
    sharded = estimate(outline, encoded, "distill.optimizer=adamw", "distill.parallel=shard", processes=2)
    assert sharded.sure == plain.sure // 2 + sharded.gathered
    assert sharded.gathered > count  # of two blocks nearly everything is whole at some time
    assert plain.gathered == estimate(outline, encoded, "distill.parallel=shard").gathered == 0  # there is but one


def test_what_is_whole_for_a_moment_is_the_rest_and_some_blocks():
    with torch.device("meta"):
        deep = world_base.new_transformer(192, 16, heads=2, head_dim=16, doubles=4, singles=16)
    full, lora = (
        recipe_with(f"distill.trainable={kind}", "distill.lora={rank: 2}").distill for kind in ("full", "lora")
    )
    blocks = [sum(p.numel() for p in block.parameters()) for block in repeated_blocks(deep)]
    every, block = sum(p.numel() for p in deep.parameters()), max(blocks)
    rest = every - sum(blocks)
    assert gathered_bytes(deep, full, "", 4) == 4 * (rest + 3 * block) + 4 * (rest + block) + 4 * max(rest, block)
    low = full.model_copy(update={"precision": "bfloat16"})
    assert gathered_bytes(deep, low, "", 4) == 2 * (rest + 3 * block) + 2 * (rest + block) + 4 * max(rest, block)
    bare = lora.model_copy(update={"lora": LoraRecipe(rank=2, alpha=2, targets=("proj_out",))})
    adapter = 2 * sum(deep.proj_out.weight.shape)  # in no block
    assert gathered_bytes(deep, bare, "", 2) == 2 * (rest + 3 * block) + 3 * 4 * adapter


def test_memory_is_an_error_only_where_it_is_sure(outline, encoded):
    need = estimate(outline, encoded)
    for available, level, text in (
        (10 * need.total, "note", "memory: training needs about"),
        (need.total, "warning", "memory may not suffice"),
        (need.sure - 1, "error", "not enough memory"),
    ):
        (found,) = check_memory(need, available)
        assert (found.level, found.check) == (level, "memory")
        assert found.message.startswith(text)
        assert f"{need.parameters:,} trained weights" in found.message


def test_available_memory_is_within_the_container_limit(tmp_path, monkeypatch):
    assert available_memory(torch.device("cpu")) > 0
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert available_memory(torch.device("cpu")) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(torch.device("cpu")) > 2000
