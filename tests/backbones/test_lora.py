"""Adapters of student and teachers on one base: whose gradient it is, whatever is switched on meanwhile."""

from __future__ import annotations

import pytest
import torch

from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition
from danceopd.backbones.lora import adapter_parameters, add_lora, load_lora, plain_copy, save_lora
from danceopd.config.recipe import LoraRecipe
from danceopd.flow.field_io import probe
from danceopd.flow.fields import VelocityField
from danceopd.flow.losses import velocity_matching_loss
from danceopd.pretraining.world_base import SHAPE

NAMES = ("student", "teacher", "second")


def with_adapters(folder, names, settings=SHAPE):
    """A base with adapters that do something; an adapter's weights depend on its name alone. The student's train."""
    backbone = load_backbone(folder, settings)
    for name in names:
        seed = NAMES.index(name)
        add_lora(backbone.transformer, name, LoraRecipe(rank=4, alpha=4), backbone.lora_targets, seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(backbone.transformer, name):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    for name in names:
        for parameter in adapter_parameters(backbone.transformer, name):
            parameter.requires_grad_(name == "student")
    return backbone, {name: VelocityField(name, backbone, backbone.transformer, name) for name in names}


def question(backbone):
    generator = torch.Generator().manual_seed(5)
    state, source = torch.randn(2, 3, *backbone.latent_shape(64, 64), generator=generator)
    return state, torch.linspace(0.2, 0.9, 3), Condition(backbone.encode_prompts(["a", "b", "c"]), source, 64, 64)


def forward(student, target):
    backbone = student.backbone
    return velocity_matching_loss(backbone.velocity(student.network, *question(backbone)), target).mean()


def gradients_of_separate_copies(folder):
    """No sharing, no checkpointing: a copy of the base with the student's adapter, another with the teacher's."""
    with torch.no_grad():
        backbone, fields = with_adapters(folder, ("teacher",))
        target = fields["teacher"](*question(backbone))
    backbone, fields = with_adapters(folder, ("student",))
    forward(fields["student"], target).backward()
    return [p.grad for p in adapter_parameters(backbone.transformer, "student")]


def gradients_of_shared_base(folder, held):
    """One base; other adapters and none are asked between the student's forward and backward pass."""
    backbone, fields = with_adapters(folder, NAMES)
    backbone.transformer.enable_gradient_checkpointing()
    asked = question(backbone)
    target = fields["teacher"](*asked).detach()
    with fields["student"].active():
        loss = forward(fields["student"], target)
        with torch.no_grad():
            fields["teacher"](*asked)
            VelocityField("base", backbone, backbone.transformer)(*asked)
            fields["second"](*asked)
        if held:
            loss.backward()
    if not held:
        with fields["teacher"].active():
            loss.backward()
    for other in ("teacher", "second"):
        assert all(p.grad is None for p in adapter_parameters(backbone.transformer, other))
    return [p.grad for p in adapter_parameters(backbone.transformer, "student")]


def test_gradients_under_checkpointing_are_those_of_separate_copies(tiny_base):
    expected, found = gradients_of_separate_copies(tiny_base), gradients_of_shared_base(tiny_base, held=True)
    assert all(g.abs().max() > 0 for g in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_backward_pass_under_another_adapter_is_refused(tiny_base):
    """What `VelocityField.active` is there for: recomputed activations would be another field's."""
    with pytest.raises(RuntimeError, match="checkpoint"):
        gradients_of_shared_base(tiny_base, held=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_float32_on_any_base_and_come_back_exactly(tiny_base, tmp_path, dtype):
    settings = SHAPE.model_copy(update={"dtype": dtype})
    backbone, fields = with_adapters(tiny_base, ("student",), settings)
    network = backbone.transformer
    assert {p.dtype for p in adapter_parameters(network, "student")} == {torch.float32}
    assert network.proj_out.weight.dtype == getattr(torch, dtype)
    save_lora(network, "student", tmp_path)
    other = load_backbone(tiny_base, settings)
    load_lora(other.transformer, "student", tmp_path)
    pairs = zip(adapter_parameters(network, "student"), adapter_parameters(other.transformer, "student"), strict=True)
    for saved, loaded in pairs:
        torch.testing.assert_close(loaded, saved, atol=0, rtol=0)
    condition = question(backbone)[2]
    again = VelocityField("student", other, other.transformer, "student")
    torch.testing.assert_close(probe(again, condition), probe(fields["student"], condition))


def test_a_bfloat16_base_is_near_the_float32_one_and_its_student_trains_in_float32(tiny_base):
    settings = SHAPE.model_copy(update={"dtype": "bfloat16"})
    exact, exact_fields = with_adapters(tiny_base, ("student",))
    low, low_fields = with_adapters(tiny_base, ("student",), settings)
    asked = question(exact)
    assert question(low)[2].prompt.dtype == torch.float32
    with torch.no_grad():
        expected, found = (fields["student"](*asked).float() for fields in (exact_fields, low_fields))
    assert (found - expected).norm() < 0.03 * expected.norm()
    forward(low_fields["student"], torch.zeros_like(asked[0])).backward()
    assert {p.grad.dtype for p in adapter_parameters(low.transformer, "student")} == {torch.float32}
    merged = plain_copy(low.transformer, merge="student")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    with torch.no_grad():
        assert (VelocityField("m", low, merged)(*asked) - expected).norm() < 0.03 * expected.norm()


STOCK = """
import sys
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file

pipe = Flux2KleinPipeline.from_pretrained(sys.argv[1])
inputs = load_file(sys.argv[3])
with torch.no_grad():
    bare = pipe.transformer(**inputs, guidance=None, return_dict=False)[0]
    pipe.load_lora_weights(sys.argv[2], weight_name="pytorch_lora_weights.safetensors")
    drawn = pipe.transformer(**inputs, guidance=None, return_dict=False)[0]
assert "danceopd" not in sys.modules
save_file({"bare": bare.contiguous(), "drawn": drawn.contiguous()}, sys.argv[4])
"""


@pytest.mark.slow
def test_another_process_loads_the_lora_with_diffusers_alone(tiny_base, tmp_path):
    import subprocess
    import sys

    from safetensors.torch import load_file, save_file

    from danceopd.backbones import load_backbone
    from danceopd.backbones.lora import active_adapter, save_diffusers_lora
    from danceopd.pretraining.world_base import SHAPE

    backbone = load_backbone(tiny_base, SHAPE)
    network = backbone.transformer
    add_lora(network, "student", LoraRecipe(rank=3, alpha=12), backbone.lora_targets, 0)  # alpha unlike the rank
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(network, "student"):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tokens, channels = backbone.latent_shape(64, 64)
    prompt = backbone.encode_prompts(["red ring"])
    image_ids = backbone.pipeline._prepare_latent_ids(torch.empty(1, channels, 8, tokens // 8))
    inputs = {
        "hidden_states": torch.randn(1, tokens, channels, generator=generator),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": prompt,
        "img_ids": image_ids,
        "txt_ids": backbone.pipeline._prepare_text_ids(prompt),
    }
    save_file({k: v.contiguous() for k, v in inputs.items()}, tmp_path / "inputs.safetensors")
    with torch.no_grad(), active_adapter(network, "student"):
        wanted = network(**inputs, guidance=None, return_dict=False)[0]
    file = save_diffusers_lora(network, "student", tmp_path / "lora")
    assert file.name == "pytorch_lora_weights.safetensors"
    paths = [tiny_base, tmp_path / "lora", tmp_path / "inputs.safetensors", tmp_path / "out.safetensors"]
    ran = subprocess.run(
        [sys.executable, "-c", STOCK, *map(str, paths)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found["drawn"], wanted, atol=1e-5, rtol=1e-5)
    assert (found["bare"] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["attn", "ff", "to_q", "norm1", "x_embedder"])
def test_an_adapter_called_like_a_part_of_the_network_trains_nothing_else(tiny_base, name):
    backbone = load_backbone(tiny_base, SHAPE)
    add_lora(backbone.transformer, name, LoraRecipe(rank=2, alpha=2), backbone.lora_targets, 0)
    trained = {key for key, p in backbone.transformer.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in key for key in trained)
    assert len(trained) == len(adapter_parameters(backbone.transformer, name))
