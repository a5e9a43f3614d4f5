"""Routing to one teacher, adapters on one base, fields on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition
from danceopd.backbones.lora import (
    WEIGHTS,
    active_adapter,
    adapter_parameters,
    add_lora,
    load_lora,
    plain_copy,
    save_lora,
)
from danceopd.config.recipe import LoraRecipe
from danceopd.errors import UserError
from danceopd.flow.field_io import field_kind, load_field, probe, save_field
from danceopd.flow.fields import VelocityField
from danceopd.methods.routing import routed_velocity
from danceopd.pretraining.world_base import SHAPE


@pytest.fixture
def fresh(own_backbone):
    """A tiny base of one's own, to put adapters on."""
    return own_backbone


def condition_of(backbone, count=4):
    generator = torch.Generator().manual_seed(5)
    source = torch.randn(count, *backbone.latent_shape(64, 64), generator=generator)
    prompts = backbone.encode_prompts([f"add a red ring at the top left {i}" for i in range(count)])
    return Condition(prompts, source, 64, 64)


def randomize(network, name, seed):
    """Give a fresh adapter (whose second matrix is zero) an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(network, name):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def with_adapters(backbone, *names):
    for seed, name in enumerate(names):
        add_lora(backbone.transformer, name, LoraRecipe(rank=4, alpha=4), backbone.lora_targets, seed)
        randomize(backbone.transformer, name, seed)
    return {name: VelocityField(name, backbone, backbone.transformer, name) for name in names}


def test_each_sample_meets_its_own_teacher_alone(fresh):
    fields = with_adapters(fresh, "first", "second")
    fields["base"] = VelocityField("base", fresh, fresh.transformer)
    condition = condition_of(fresh)
    state, sigma = torch.randn(4, *fresh.latent_shape(64, 64)), torch.linspace(0.1, 0.9, 4)
    routes = ["second", "base", "first", "second"]
    routed = routed_velocity(fields, routes, state, sigma, condition)
    with torch.no_grad():
        whole = {name: field(state, sigma, condition) for name, field in fields.items()}
    for i, route in enumerate(routes):
        torch.testing.assert_close(routed[i], whole[route][i], atol=1e-5, rtol=1e-5)
        for other in set(fields) - {route}:
            assert not torch.allclose(routed[i], whole[other][i], atol=1e-3)


def test_only_the_routed_teachers_are_called(fresh):
    condition = condition_of(fresh)
    fields = {"used": VelocityField("used", fresh, fresh.transformer), "idle": None}
    state = torch.randn(4, *fresh.latent_shape(64, 64))
    routed_velocity(fields, ["used"] * 4, state, torch.full((4,), 0.5), condition)


def test_a_fresh_lora_changes_nothing_and_trains_alone(fresh):
    before = probe(VelocityField("base", fresh, fresh.transformer), condition_of(fresh))
    add_lora(fresh.transformer, "student", LoraRecipe(rank=4), fresh.lora_targets, seed=0)
    after = probe(VelocityField("student", fresh, fresh.transformer, "student"), condition_of(fresh))
    torch.testing.assert_close(before, after)
    trained = {name for name, p in fresh.transformer.named_parameters() if p.requires_grad}
    assert trained
    assert all(".student." in name for name in trained)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(fresh.transformer, "student"))


def test_adding_an_adapter_leaves_the_global_generator_alone(fresh):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    add_lora(fresh.transformer, "student", LoraRecipe(rank=4), fresh.lora_targets, seed=0)
    torch.testing.assert_close(torch.rand(2), expected)


def test_switching_touches_no_gradient_flag_and_restores(fresh):
    with_adapters(fresh, "student", "teacher")
    for parameter in adapter_parameters(fresh.transformer, "teacher"):
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in fresh.transformer.named_parameters()}
    student = VelocityField("student", fresh, fresh.transformer, "student")
    expected = probe(student, condition_of(fresh))
    with active_adapter(fresh.transformer, "student"):
        probe(VelocityField("teacher", fresh, fresh.transformer, "teacher"), condition_of(fresh))
        probe(VelocityField("base", fresh, fresh.transformer), condition_of(fresh))
        inside = fresh.velocity(
            fresh.transformer,
            torch.randn(4, *fresh.latent_shape(64, 64), generator=torch.Generator().manual_seed(0)),
            torch.linspace(0.2, 0.9, 4),
            condition_of(fresh),
        )
    torch.testing.assert_close(inside.detach(), expected)
    assert flags == {name: p.requires_grad for name, p in fresh.transformer.named_parameters()}


def test_an_adapter_that_is_not_there_is_an_error(fresh):
    with pytest.raises(ValueError, match="no adapter 'ghost'"), active_adapter(fresh.transformer, "ghost"):
        pass


@pytest.mark.parametrize("kind", ["base", "full", "lora"])
def test_a_field_comes_back_from_disk_with_the_same_velocity(fresh, tiny_base, tmp_path, kind):
    if kind == "lora":
        field = with_adapters(fresh, "t")["t"]
    elif kind == "full":
        network = fresh.new_transformer()
        with torch.no_grad():
            network.proj_out.weight.add_(0.1)
        field = VelocityField("t", fresh, network)
    else:
        field = VelocityField("t", fresh, fresh.transformer)
    save_field(field, tmp_path / "t")
    assert field_kind(tmp_path / "t") == kind
    other = load_backbone(tiny_base, SHAPE)
    torch.testing.assert_close(
        probe(load_field(other, "t", tmp_path / "t"), condition_of(other)), probe(field, condition_of(fresh))
    )


def test_a_merged_adapter_is_the_same_field_without_adapters(fresh):
    field = with_adapters(fresh, "t")["t"]
    merged = plain_copy(fresh.transformer, merge="t")
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(
        probe(VelocityField("m", fresh, merged), condition_of(fresh)),
        probe(field, condition_of(fresh)),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_copy_of_the_base_carries_no_adapter_of_a_teacher(fresh, tiny_base):
    with_adapters(fresh, "t")
    copied = fresh.new_transformer()
    original = load_backbone(tiny_base, SHAPE)
    assert copied.state_dict().keys() == original.transformer.state_dict().keys()
    torch.testing.assert_close(
        probe(VelocityField("c", fresh, copied), condition_of(fresh)),
        probe(VelocityField("o", original, original.transformer), condition_of(original)),
    )


def test_a_lora_whose_names_do_not_match_is_refused(fresh, tiny_base, tmp_path):
    with_adapters(fresh, "t")
    save_lora(fresh.transformer, "t", tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({name.replace("transformer_blocks", "blocks"): v for name, v in state.items()}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="LoRA weights do not match the transformer"):
        load_lora(load_backbone(tiny_base, SHAPE).transformer, "t", tmp_path)


def test_a_folder_without_lora_weights_is_refused(fresh, tmp_path):
    with_adapters(fresh, "t")
    save_lora(fresh.transformer, "t", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_lora(fresh.transformer, "u", tmp_path)


def test_folders_that_hold_no_field_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither a LoRA .* nor a transformer"):
        field_kind(tmp_path)
    (tmp_path / "field.json").write_text(json.dumps({"kind": "fulll"}))
    with pytest.raises(UserError, match="'fulll' is not known; choose one of: base, full, lora"):
        field_kind(tmp_path)


def test_a_lora_field_without_its_lora_is_refused(fresh, tmp_path):
    (tmp_path / "field.json").write_text(json.dumps({"kind": "lora", "name": "t"}))
    with pytest.raises(UserError, match=r"neither adapter_config.json nor a LoRA's safetensors file"):
        load_field(fresh, "t", tmp_path)
