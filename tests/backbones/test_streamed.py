"""Every family computes alike in float32 whether its weights are at hand in 16 bits or lie in files."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES

from danceopd.backbones import load_backbone, open_outline
from danceopd.backbones.base import Condition
from danceopd.backbones.sharded import outline_of, write_transformer
from danceopd.backbones.streamed import OwnWeights, StoredWeights, in_float32


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_weights_at_hand_and_in_files_give_one_velocity(folder_of, family, tmp_path):
    shape = family.shape().model_copy(update={"dtype": "bfloat16"})
    base = load_backbone(folder_of(family), shape)
    condition = Condition(base.encode_prompts(["a cat", "two dogs"]), None, 64, 64)
    noise = torch.randn(2, *base.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.9])
    own = OwnWeights(base.transformer, None, torch.bfloat16)
    base.save(tmp_path, outline_of(base.transformer))
    write_transformer(base.transformer, tmp_path / "transformer", own)
    with in_float32(base.transformer, own, "cpu"):
        live = base.velocity(base.transformer, noise, sigma, condition)
    outline = open_outline(tmp_path, shape)
    stored = StoredWeights(outline.transformer, tmp_path / "transformer")
    with in_float32(outline.transformer.eval(), stored, "cpu"):
        read = outline.velocity(outline.transformer, noise, sigma, condition)
    assert live.dtype == torch.float32 and torch.equal(live, read)
    whole = load_backbone(tmp_path, shape.model_copy(update={"dtype": "float32"}))
    wanted = whole.velocity(whole.transformer, noise, sigma, condition)
    torch.testing.assert_close(live, wanted, rtol=1e-5, atol=1e-5)
