"""A LoRA student's files: the names ComfyUI knows, the same velocity when read back, a broken file refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition
from danceopd.backbones.lora import adapter_parameters, add_lora
from danceopd.config.recipe import LoraRecipe
from danceopd.errors import UserError
from danceopd.export import lora_files
from danceopd.export.lora_files import COMFYUI, export_lora, prove_lora_file, save_comfyui_lora
from danceopd.flow.field_io import probe
from danceopd.flow.fields import VelocityField
from danceopd.pretraining.world_base import SHAPE


def trained(tiny_base, **lora) -> tuple[VelocityField, Condition]:
    """A student with a LoRA that changes what it draws; alpha unlike the rank."""
    backbone = load_backbone(tiny_base, SHAPE)
    add_lora(backbone.transformer, "student", LoraRecipe(rank=3, alpha=12, **lora), backbone.lora_targets, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(backbone.transformer, "student"):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    field = VelocityField("student", backbone, backbone.transformer, "student")
    return field, Condition(backbone.encode_prompts(["", "red ring"]), None, 64, 64)


def test_both_files_give_the_students_velocity_and_leave_it_as_it_was(tiny_base, tmp_path):
    student, condition = trained(tiny_base)
    before = probe(student, condition)
    bare = probe(VelocityField("base", student.backbone, student.network), condition)
    assert (before - bare).abs().max() > 1e-2
    files = export_lora(student, tmp_path, condition)
    assert [f.name for f in files] == ["pytorch_lora_weights.safetensors", COMFYUI]
    state = load_file(tmp_path / COMFYUI)
    assert all(
        key.startswith(("diffusion_model.double_blocks.0.", "diffusion_model.single_blocks.0.")) for key in state
    )
    first, second = (state[f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{x}.weight"] for x in "AB")
    assert first.shape == (9, 32) and second.shape == (96, 9)
    assert second[:32, 3:].abs().max() == 0 and second[32:64, 3:6].abs().max() > 0
    assert torch.equal(probe(student, condition), before)
    assert list(student.network.peft_config) == ["student"]


def test_a_part_without_an_adapter_stays_as_it_is(tiny_base, tmp_path):
    student, condition = trained(tiny_base, targets=("attn.to_q", "attn.to_v"))
    export_lora(student, tmp_path, condition)
    state = load_file(tmp_path / COMFYUI)
    assert set(state) == {f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{x}.weight" for x in "AB"}
    assert state["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"][32:64].abs().max() == 0


def test_a_module_that_comfyui_has_no_name_for_means_no_file(tiny_base, tmp_path, caplog):
    student, condition = trained(tiny_base, targets=("attn.to_q", "norm_out.linear"))
    assert [f.name for f in export_lora(student, tmp_path, condition)] == ["pytorch_lora_weights.safetensors"]
    assert "no ComfyUI LoRA file: it has no name for norm_out.linear" in caplog.text
    assert save_comfyui_lora(torch.nn.Linear(2, 2), "student", tmp_path) is None
    assert "the names of Linear are not known" in caplog.text


def test_a_changed_file_is_refused(tiny_base, tmp_path):
    student, condition = trained(tiny_base)
    for file in export_lora(student, tmp_path, condition):
        state = load_file(file)
        key = next(k for k in state if "lora_B" in k)
        for other in (state[key] + 0.05, state[key] * 0):
            save_file(state | {key: other}, file)
            with pytest.raises(
                UserError, match=r"what it adds to .*transformer_blocks.* differs from the student's by"
            ):
                prove_lora_file(student, file, condition)
            assert list(student.network.peft_config) == ["student"]


def test_a_layer_that_no_file_should_touch_is_found(tiny_base, tmp_path):
    student, condition = trained(tiny_base, targets=("attn.to_q", "attn.to_v"))
    _, file = export_lora(student, tmp_path, condition)
    state = load_file(file)
    key = "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"
    state[key][40] = 0.1  # a row of the keys
    save_file(state, file)
    with pytest.raises(UserError, match=r"what it adds to transformer_blocks.0.attn.to_k differs .* by inf"):
        prove_lora_file(student, file, condition)


def test_a_loader_that_draws_otherwise_is_found(tiny_base, tmp_path, monkeypatch):
    """The velocity is asked as well where rounding cannot explain a difference."""
    student, condition = trained(tiny_base)
    [file, _] = export_lora(student, tmp_path, condition)
    monkeypatch.setattr(lora_files, "probe", lambda field, of: probe(field, of) + (field.adapter != "student") * 1e-3)
    with pytest.raises(UserError, match=r"its velocity differs from the student's by 0.00"):
        prove_lora_file(student, file, condition)


def in_16_bits(student, condition, size=1.0):
    """The student on a base in bfloat16 whose velocities are so many times as large."""
    for key, parameter in student.network.named_parameters():
        if "lora_" not in key:
            parameter.data = (parameter.data * (size if key.startswith("proj_out") else 1)).bfloat16()
    return Condition(condition.prompt.bfloat16(), None, 64, 64)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_base_in_16_bits_may_round(tiny_base, tmp_path, size):
    student, condition = trained(tiny_base)
    assert len(export_lora(student, tmp_path, in_16_bits(student, condition, size))) == 2


def test_in_16_bits_one_lost_layer_is_found(tiny_base, tmp_path):
    student, condition = trained(tiny_base)
    rounded = in_16_bits(student, condition, 0.01)  # its velocity changes by less than 16 bits tell
    for file in export_lora(student, tmp_path, rounded):
        state = load_file(file)
        key = next(k for k in state if "lora_B" in k)
        save_file(state | {key: 0 * state[key]}, file)
        with pytest.raises(UserError, match="differs from the student's by 1 of its size"):
            prove_lora_file(student, file, rounded)
