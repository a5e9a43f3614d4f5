"""`danceopd recipe check`: figures from configurations, held against what the real thing counts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from danceopd.backbones import load_backbone
from danceopd.cli.recipe import check
from danceopd.config.load import load_recipe
from danceopd.errors import UserError
from danceopd.preflight.outlook import look_ahead, what_is_there
from danceopd.pretraining.world_base import SHAPE


@pytest.fixture
def recipe(tiny_base):
    def load(*settings):
        return load_recipe("world", [f"model.base={tiny_base}", *settings])

    return load


def test_weights_and_forwards_are_those_of_the_run(recipe, tiny_base, tmp_path):
    ahead = look_ahead(recipe("distill.window=[0.99, 1]"), tmp_path)
    from diffusers import Flux2Transformer2DModel

    network = Flux2Transformer2DModel.from_pretrained(tiny_base / "transformer")
    assert ahead.parameters == sum(p.numel() for p in network.parameters())
    assert ahead.forwards == 4  # the query is the first step: a teacher, the student's three
    assert ahead.training.weights == ahead.training.gradients == 4 * ahead.parameters
    tokens, _ = load_backbone(tiny_base, SHAPE).latent_shape(64, 64)
    assert ahead.tokens == (2 * tokens, 24)
    guided = look_ahead(
        recipe(
            "distill.window=[0.99, 1]",
            "teachers.base={kind: base}",
            "teachers.strong={kind: base, guidance: 3}",
            "tasks.t2i.teacher=strong",
        ),
        tmp_path,
    )
    assert 4 < guided.forwards < 5


@pytest.mark.slow
def test_memory_heeds_teachers_dtype_and_what_trains(recipe, tmp_path):
    plain = look_ahead(recipe(), tmp_path)
    assert plain.held == 3 * 4 * plain.parameters  # the base and two fine-tuned teachers
    small = look_ahead(recipe("model.dtype=bfloat16", "model.offload=true"), tmp_path)
    assert small.held == 2 * 2 * plain.parameters
    own = "teachers.local_edit={kind: lora, path: teachers/local_edit}"
    like_the_students = look_ahead(recipe(own, "distill.lora={rank: 2, alpha: 2}"), tmp_path)
    rank_2 = like_the_students.held - 2 * 4 * plain.parameters
    assert 0 < rank_2 < 4 * plain.parameters
    (tmp_path / "lora").mkdir()
    save_file({"lora_A": torch.zeros(10, 30)}, tmp_path / "lora" / "adapter_model.safetensors")
    counted = look_ahead(recipe(own.replace("teachers/local_edit}", f"{tmp_path / 'lora'}}}")), tmp_path)
    assert counted.held == 2 * 4 * plain.parameters + 4 * 300
    taught = "teachers.local_edit.train.{}={}"
    rank_4 = look_ahead(
        recipe(taught.format("trainable", "lora"), taught.format("lora", "{rank: 4, alpha: 2}")), tmp_path
    )
    assert rank_4.held == 2 * 4 * plain.parameters + 2 * rank_2
    lora = look_ahead(
        recipe("distill.trainable=lora", "distill.start=base", "distill.activation_checkpointing=true"), tmp_path
    )
    assert lora.training.sure < plain.training.sure / 2
    assert lora.training.activations < plain.training.activations


@pytest.mark.slow
def test_what_processes_share_is_counted_once_among_them(recipe, tmp_path):
    settings = ["model.dtype=bfloat16", "distill.optimizer=adamw"]
    whole, shared = (
        look_ahead(recipe(*settings, f"distill.parallel={kind}"), tmp_path, 4) for kind in ("replicate", "shard")
    )
    assert shared.held == whole.held // 4  # base and teachers
    assert shared.training.weights == whole.training.weights // 4
    assert (shared.other, whole.other) == (whole.held + whole.training.total, shared.held + shared.training.total)
    assert look_ahead(recipe(*settings), tmp_path).other is None
    assert look_ahead(recipe("model.offload=true"), tmp_path, 4).other is None  # no sharing beside it


@pytest.mark.slow
def test_the_command_tells_and_names_what_is_missing(tiny_base, tmp_path, capsys):
    settings = [f"model.base={tiny_base}", "teachers.global_style={kind: lora, path: nowhere/lora}"]
    with pytest.raises(UserError, match="teacher global_style: lora nowhere/lora: no such file or folder"):
        check("world", settings, gpus=2, tflops=1.0, workspace=tmp_path)
    told = capsys.readouterr().out
    assert all(
        word in told for word in ("fine-tuned on local_edit", "memory per GPU", "forwards", "of 2 GPUs", "with shard")
    )
    check("world", [], gpus=1, tflops=1.0, workspace=tmp_path)
    assert "ships with the package" in capsys.readouterr().out


def test_a_base_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = load_recipe("qwen_image_edit")
    assert what_is_there(recipe)[0][2] is None
    with pytest.raises(UserError, match=r"Qwen/Qwen-Image-Edit-2509.*hf download"):
        look_ahead(recipe, tmp_path)
