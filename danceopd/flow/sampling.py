"""Pictures from any field: Euler steps over the whole sampling grid, noise from one seed per sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.flow.fields import Field
from danceopd.flow.rollout import roll_out


def seeded_noise(seeds: list[int], shape: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Noise (B, N, C) in which each sample's draw depends on its own seed alone, not on its place in the batch."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def sample_pixels(field: Field, condition: Condition, seeds: list[int], steps: int) -> Tensor:
    """Draw pictures (B, 3, H, W) in [-1, 1] on the CPU, float32.

    Args:
        field: any velocity field.
        condition: of B samples.
        seeds: B seeds.
        steps: Euler steps of the family's own sampling grid.
    """
    backbone, height, width = field.backbone, condition.height, condition.width
    noise = seeded_noise(seeds, backbone.latent_shape(height, width), condition.prompt.device)
    grid = backbone.sigmas(steps, height, width)
    with field.resident():
        latents = roll_out(field, noise, grid, torch.full((len(seeds),), steps), condition).state
    return backbone.decode(latents, height, width).float().cpu()


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to a (B, H, W, 3) uint8 array."""
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()
