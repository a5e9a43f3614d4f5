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
        save_file(state | {key: state[key] + 0.05}, file)
        with pytest.raises(UserError, match="its velocity differs from the student's"):
            prove_lora_file(student, file, condition)
        assert list(student.network.peft_config) == ["student"]


def test_a_base_in_16_bits_is_compared_more_roughly(tiny_base, tmp_path):
    student, condition = trained(tiny_base)
    for key, parameter in student.network.named_parameters():
        if "lora_" not in key:
            parameter.data = parameter.data.bfloat16()
    rounded = Condition(condition.prompt.bfloat16(), None, 64, 64)
    assert len(export_lora(student, tmp_path, rounded)) == 2
