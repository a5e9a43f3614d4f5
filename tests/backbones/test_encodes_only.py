"""A back end that is there to encode reads no weight of its transformer, which is most of a base."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES

from danceopd.backbones import load_backbone
from danceopd.backbones.lora_factors import check_finite
from danceopd.errors import UserError


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_it_encodes_as_the_whole_base_does(folder_of, family, tmp_path):
    folder, shape = folder_of(family), family.shape()
    whole = load_backbone(folder, shape)
    bare = tmp_path / "bare"
    bare.mkdir()
    for part in folder.iterdir():
        (bare / part.name).symlink_to(part)
    (bare / "transformer").unlink()
    (bare / "transformer").mkdir()
    (bare / "transformer" / "config.json").symlink_to(folder / "transformer" / "config.json")
    encoder = load_backbone(bare, shape, encodes_only=True)  # there are no weights to read
    assert all(p.is_meta for p in encoder.transformer.parameters())
    assert encoder.latent_shape(64, 64) == whole.latent_shape(64, 64)
    if not whole.prompt_sees_source:
        assert torch.equal(encoder.encode_prompts(["a cat"]), whole.encode_prompts(["a cat"]))
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    assert torch.equal(encoder.encode_images(pixels), whole.encode_images(pixels))


def test_it_needs_the_configuration(folder_of, tmp_path):
    folder = folder_of(FAMILIES[0])
    for part in folder.iterdir():
        if part.name != "transformer":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="no transformer's config"):
        load_backbone(tmp_path, FAMILIES[0].shape(), encodes_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found(dtype, broken, tmp_path):
    weights = torch.full((100,), 60000.0 if dtype == torch.float16 else 1.0)  # whose sum is not finite in 16 bits
    check_finite(tmp_path, {"w": weights.to(dtype)})
    weights[7] = broken
    if not bool(torch.isfinite(weights.to(dtype).float()).all()):  # 8 bits have no infinity
        with pytest.raises(UserError, match="w holds numbers that are not finite"):
            check_finite(tmp_path, {"w": weights.to(dtype)})
