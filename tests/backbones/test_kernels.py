"""Other kernels, the same velocity: attention backends, and a frozen base in 8 bits."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

from danceopd import steps
from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition
from danceopd.backbones.kernels import compile_blocks
from danceopd.backbones.lora import add_lora
from danceopd.config.load import load_recipe
from danceopd.config.recipe import LoraRecipe, TrainRecipe
from danceopd.errors import UserError
from danceopd.flow.field_io import probe
from danceopd.flow.fields import VelocityField
from danceopd.pretraining.world_base import SHAPE
from danceopd.training.learner import new_learner

NEEDS_TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(autouse=True)
def default_attention():
    """diffusers makes a backend that one network is given the whole process's."""
    with attention_backend("native"):
        yield


def velocity(base):
    condition = Condition(base.encode_prompts(["red ring", "blue dot"]), None, 64, 64)
    return probe(VelocityField("base", base, base.transformer), condition)


def test_another_attention_backend_gives_the_velocity_within_a_millionth(tiny_base, backbone):
    wanted = velocity(backbone)
    plain = load_backbone(tiny_base, SHAPE.model_copy(update={"attention": "_native_math"}))
    processor = plain.transformer.transformer_blocks[0].attn.processor
    assert processor._attention_backend.value == "_native_math"
    found = velocity(plain)
    assert not torch.equal(found, wanted)  # another kernel sums in another order
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.slow
def test_more_adapters_than_torch_takes_variants_are_all_compiled(tiny_base, monkeypatch):
    def compile_eagerly(block, mode, dynamic):
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    base = load_backbone(tiny_base, SHAPE)
    names = ["one", "two", "three"]
    for seed, name in enumerate(names):
        add_lora(base.transformer, name, LoraRecipe(rank=2, alpha=2), base.lora_targets, seed)
    condition = Condition(torch.randn(1, *base.prompt_shape(False)), None, 64, 64)
    few = torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)  # it is 8, and takes longer
    with few, torch.no_grad():
        compile_blocks(base.transformer, "default")
        for name in names:
            probe(VelocityField(name, base, base.transformer, adapter=name), condition)


@pytest.mark.parametrize(("name", "message"), [("flsh", "native"), ("xformers", "xformers")])
def test_attention_that_is_not_here_is_refused(tiny_base, name, message):
    if name == "xformers" and find_spec("xformers") is not None:
        pytest.skip("xformers is installed")
    with pytest.raises(UserError, match=f"model.attention: .*{message}"):
        load_backbone(tiny_base, SHAPE.model_copy(update={"attention": name}))


@NEEDS_TORCHAO
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.02), ("float8", 0.08)])
def test_eight_bits_change_the_velocity_by_little_and_only_the_adapter_learns(tiny_base, backbone, kind, tolerance):
    """By less than 2 % of its length for int8, 8 % for float8 (three bits of mantissa)."""
    small = load_backbone(tiny_base, SHAPE.model_copy(update={"quantize": kind}))
    wanted = velocity(backbone)
    difference = (velocity(small) - wanted).norm() / wanted.norm()
    assert 0 < difference < tolerance
    learner = new_learner(
        small, "student", TrainRecipe(trainable="lora", lora=LoraRecipe(rank=2), lr=1, steps=1, batch=1)
    )
    z = torch.randn(1, *small.latent_shape(64, 64))
    condition = Condition(small.encode_prompts(["red ring"]), None, 64, 64)
    with learner.field.active():
        small.velocity(small.transformer, z, torch.ones(1), condition).square().sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in learner.parameters)
    assert all(p.grad is None for n, p in small.transformer.named_parameters() if ".student." not in n)


def test_eight_bits_without_their_library_are_refused(tiny_base, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"model.quantize needs torchao; install it"):
        load_backbone(tiny_base, SHAPE.model_copy(update={"quantize": "int8"}))


def test_whole_weights_do_not_train_in_eight_bits():
    with pytest.raises(UserError, match=r"set trainable: lora in distill, teachers.local_edit.train, teachers.global"):
        load_recipe("world", ["model.quantize=int8"])


@NEEDS_TORCHAO
@pytest.mark.slow
def test_a_student_of_an_eight_bit_base_is_exported_whole(tiny_base, tmp_path):
    tasks = (
        "{t2i: {teacher: base, needs_source: false, metrics: [scene_accuracy]},"
        " local_edit: {teacher: editor, needs_source: true, metrics: [psnr]}}"
    )
    recipe = load_recipe(
        "world",
        [
            f"model.base={tiny_base}",
            "model.quantize=int8",
            f"tasks={tasks}",
            "data.world={t2i: {train: 6, val: 3, test: 3}, local_edit: {train: 6, val: 3, test: 3}}",
            "teachers={base: {kind: base}, editor: {kind: base}}",
            "distill={trainable: lora, steps: 3, batch: 4, lr: 0.01, rollout_steps: 3, warmup: 1}",
            "evaluate={per_task: 2, steps: 2}",
        ],
    )
    base, data = steps.resolve_base(recipe, tmp_path), steps.build_data(recipe, tmp_path, repo=tmp_path)
    teachers = {name: steps.finetune_teacher(steps.Run(recipe, tmp_path, base, data), name) for name in recipe.teachers}
    student = steps.distill_student(steps.Run(recipe, tmp_path, base, data), teachers)
    opened = load_backbone(student.pipeline, recipe.model.model_copy(update={"quantize": None}))
    assert opened.transformer.proj_out.weight.dtype == torch.float32
    assert type(opened.transformer.proj_out.weight.data) is torch.Tensor
    assert steps.evaluate_student(steps.Run(recipe, tmp_path, base, data), teachers, student).facts["scores"]
