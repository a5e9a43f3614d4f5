"""A network's blocks with their matrix products in float8: what such a rollout would gain, and how far it drifts.

Each product takes one scale per row of either matrix. Layers outside the blocks (embeddings, modulation, the last one)
stay as they are. For trial only: torch's product is private.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danceopd.backbones.base import repeated_blocks

GREATEST = torch.finfo(torch.float8_e4m3fn).max


def by_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (R, C) in float8, and what each row is to be multiplied by, (R, 1) in float32."""
    scale = matrix.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / GREATEST
    return (matrix / scale.to(matrix.dtype)).clamp(-GREATEST, GREATEST).to(torch.float8_e4m3fn), scale


class Float8Linear(nn.Module):
    """A linear layer whose product is taken in float8; its own weight stays to be renewed from."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Take the weight as it is now."""
        weight, scale = by_rows(self.linear.weight)
        if hasattr(self, "weight"):
            self.weight.copy_(weight)
            self.scale.copy_(scale)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = by_rows(x.flatten(0, -2))
        product = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.scale.t(), bias=self.linear.bias, out_dtype=x.dtype
        )
        return product.unflatten(0, x.shape[:-1])


def in_float8(network: nn.Module) -> list[Float8Linear]:
    """Replace the linear layers of a network's blocks; returns what stands there now."""
    made = []
    for block in repeated_blocks(network):
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, leaf = path.rpartition(".")
                made.append(Float8Linear(layer))
                setattr(block.get_submodule(parent), leaf, made[-1])
    return made
