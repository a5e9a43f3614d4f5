"""JSON files that come with a checkpoint, in another encoding or not what they should be: one line with the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from danceopd.backbones import load_backbone, open_outline
from danceopd.backbones.lora import add_lora, load_lora, save_lora
from danceopd.backbones.weights import read_transformer
from danceopd.config.recipe import LoraRecipe
from danceopd.errors import UserError
from danceopd.flow.field_io import field_kind
from danceopd.preflight.compatibility import check_pipeline
from danceopd.pretraining.world_base import SHAPE

PARTS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
)
WRITTEN = {
    "latin-1": (
        lambda text: text.replace("{", '{"_by": "J\u00fcrgen", ', 1).encode("latin-1", "replace"),
        r"line \d+: not UTF-8 \(byte 0xFC",
    ),
    "utf-16": (lambda text: text.encode("utf-16"), "line 1: UTF-16, not UTF-8"),
    "utf-16 without a mark": (lambda text: text.encode("utf-16-le"), "line 1: holds a NUL byte"),
    "utf-8 with a mark": (lambda text: text.encode("utf-8-sig"), "line 1: begins with a byte-order mark"),
}


def spoil(path: Path, how: str) -> str:
    write, told = WRITTEN[how]
    path.write_bytes(write(path.read_text(encoding="utf-8")))
    return rf"{path.name}, {told}"


@pytest.fixture
def folder(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("open_folder", [load_backbone, open_outline])
def test_a_pipelines_files(folder, part, how, open_folder):
    told = spoil(folder / part, how)
    with pytest.raises(UserError, match=told) as error:
        open_folder(folder, SHAPE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", WRITTEN)
def test_a_transformers_own_folder(folder, backbone, how):
    told = spoil(folder / "transformer" / "config.json", how)
    with pytest.raises(UserError, match=told):
        read_transformer(type(backbone.transformer), folder / "transformer", backbone.transformer.dtype, {})


@pytest.mark.parametrize("how", ["latin-1", "utf-16", "utf-16 without a mark"])
def test_an_adapters_configuration(tiny_base, tmp_path, how):
    base = load_backbone(tiny_base, SHAPE)
    add_lora(base.transformer, "t", LoraRecipe(rank=2, alpha=2), base.lora_targets, 0)
    save_lora(base.transformer, "t", tmp_path)
    told = spoil(tmp_path / "adapter_config.json", how)
    with pytest.raises(UserError, match=told):
        load_lora(load_backbone(tiny_base, SHAPE).transformer, "t", tmp_path)


@pytest.mark.parametrize("how", ["latin-1", "utf-16", "utf-16 without a mark"])
def test_what_is_compared_before_a_run(folder, tiny_base, how):
    told = spoil(folder / "scheduler" / "scheduler_config.json", how)
    with pytest.raises(UserError, match=told):
        check_pipeline("t", folder, tiny_base)


@pytest.mark.parametrize("text", ["[]", "null", '"text"', "3"])
def test_json_that_is_no_object(folder, tiny_base, tmp_path, text):
    for name, opens in {
        "model_index.json": lambda: load_backbone(folder, SHAPE),
        "scheduler/scheduler_config.json": lambda: check_pipeline("t", folder, tiny_base),
        "field.json": lambda: field_kind(folder),
    }.items():
        shutil.copytree(tiny_base, folder, dirs_exist_ok=True)
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=rf"{Path(name).name}: no JSON object"):
            opens()
