"""What the networks are trained on: flow matching to data, and velocity matching to a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danceopd.backbones.base import Backbone, Condition


def flow_matching_loss(
    backbone: Backbone, network: nn.Module, clean: Tensor, condition: Condition, generator: torch.Generator
) -> Tensor:
    """Flow matching: z = (1 - sigma) x + sigma eps, loss = |v(z, sigma, c) - (eps - x)|^2, sigma uniform in [0, 1].

    Args:
        backbone: the model family.
        network: the transformer that learns.
        clean: latents x (B, N, C).
        condition: of the same B samples.
        generator: for noise and noise level, on the CPU.

    Returns:
        Mean over the batch, a float32 scalar.
    """
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    sigma = torch.rand(len(clean), generator=generator).to(clean)
    state = torch.lerp(clean, noise, sigma[:, None, None])
    velocity = backbone.velocity(network, state, sigma, condition)
    return (velocity.float() - (noise - clean).float()).square().mean()


def velocity_matching_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|v_student - v_teacher|^2 of each sample, in float32: (B,). The teacher's side carries no gradient.

    Args:
        student: (B, N, C), at the student's own query states.
        teacher: (B, N, C), the routed teacher's velocity there.
    """
    return (student.float() - teacher.detach().float()).square().mean(dim=(1, 2))
