"""What the networks are trained on: flow matching to data, and velocity matching to a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danceopd.backbones.base import Backbone, Condition


def flow_matching_loss(
    backbone: Backbone, network: nn.Module, clean: Tensor, condition: Condition, noise: Tensor, sigma: Tensor
) -> Tensor:
    """Flow matching: z = (1 - sigma) x + sigma eps, |v(z, sigma, c) - (eps - x)|^2 of each sample, in float32: (B,).

    Args:
        backbone: the model family.
        network: the transformer that learns.
        clean: latents x (B, N, C).
        condition: of the same B samples.
        noise: eps (B, N, C).
        sigma: noise levels (B,), in [0, 1].
    """
    state = torch.lerp(clean, noise, sigma[:, None, None])
    velocity = backbone.velocity(network, state, sigma, condition)
    return (velocity.float() - (noise - clean).float()).square().mean(dim=(1, 2))


def velocity_matching_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|v_student - v_teacher|^2 of each sample, in float32: (B,). The teacher's side carries no gradient.

    Args:
        student: (B, N, C), at the student's own query states.
        teacher: (B, N, C), the routed teacher's velocity there.
    """
    return (student.float() - teacher.detach().float()).square().mean(dim=(1, 2))
