"""Every family's transformer is the same function when two processes share its weights, and is written as it is."""

from __future__ import annotations

import pytest
import torch
from many_processes import together
from tiny_models import FAMILIES

from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition, kind_of, repeated_blocks
from danceopd.backbones.sharded import is_sharded, write_transformer
from danceopd.training.fsdp import Shares
from danceopd.training.processes import this_process


@torch.no_grad()
def share_write_read(rank, bases, written):
    return {family.name: one_family(rank, bases / family.name, written / family.name, family) for family in FAMILIES}


def one_family(rank, folder, written, family):
    shape = family.shape()
    base = load_backbone(folder, shape)
    condition = Condition(base.encode_prompts(["a cat", "two dogs"]), None, 64, 64)
    noise = torch.randn(2, *base.latent_shape(64, 64), generator=torch.Generator().manual_seed(rank))
    sigma = torch.tensor([0.3, 0.9])
    kind, blocks = kind_of(base.transformer), len(repeated_blocks(base.transformer))
    wanted = base.velocity(base.transformer, noise, sigma, condition)
    shares = Shares.among(this_process())
    shares.add(base.transformer)
    assert is_sharded(base.transformer) and kind_of(base.transformer) is kind
    assert len(repeated_blocks(base.transformer)) == blocks > 0
    copy = shares.copy(base.transformer, "native", torch.float32)
    shared = [base.velocity(network, noise, sigma, condition) for network in (base.transformer, copy)]
    write_transformer(copy, written)
    this_process().wait()
    again = load_backbone(folder, shape).new_transformer(written)
    same = [torch.equal(found, wanted) for found in (*shared, base.velocity(again, noise, sigma, condition))]

    # A base in 16 bits whose files hold 32 is mapped as it lies, and rounded when it is shared out.
    low = shape.model_copy(update={"dtype": "bfloat16"})
    wanted = base.velocity(load_backbone(folder, low).transformer, noise, sigma, condition)
    mapped = load_backbone(folder, low, transformer=False)
    assert {p.dtype for p in mapped.transformer.parameters()} == {torch.float32}
    assert {p.dtype for p in mapped.new_transformer(written).parameters()} == {torch.float32}
    shares.add(mapped.transformer, dtype=torch.bfloat16)
    assert {p.dtype for p in mapped.transformer.parameters()} == {torch.bfloat16}
    return [*same, torch.equal(base.velocity(mapped.transformer, noise, sigma, condition), wanted)]


@pytest.mark.slow
def test_every_family_is_the_same_shared_out(tmp_path):
    for family in FAMILIES:
        family.make(tmp_path / family.name)
    found = together(2, share_write_read, tmp_path, tmp_path / "written")
    assert found == [{family.name: [True] * 4 for family in FAMILIES}] * 2
    for family in FAMILIES:
        files = sorted(path.name for path in (tmp_path / "written" / family.name).iterdir())
        assert "config.json" in files and "diffusion_pytorch_model.safetensors.index.json" in files
