"""The step that every method with a target velocity ends in: the student's velocity there, and its gradient."""

from __future__ import annotations

from torch import Tensor

from danceopd.distill import Distillation, Group
from danceopd.objectives import velocity_matching_loss
from danceopd.training import Learner


def match_velocity(
    setup: Distillation,
    learner: Learner,
    group: Group,
    state: Tensor,
    sigma: Tensor,
    target: Tensor,
    sync: bool,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One forward and backward pass of the student on a group; costs `learner.update_forwards` a sample.

    Args:
        setup: whose backbone is called.
        learner: the student.
        group: the samples, with their weights in the loss.
        state: where it is asked, (n, N, C), without gradient.
        sigma: noise levels (n,).
        target: the velocity to match, (n, N, C); it gets no gradient.
        sync: whether this is the process's last backward pass in the update.
        scale: factor of the loss, a number or (n,).

    Returns:
        Each sample's loss times `scale`, (n,) float32, and the student's velocity (n, N, C), both without gradient.
    """
    with learner.field.active():
        velocity = setup.backbone.velocity(learner.field.network, state, sigma, group.condition)
        losses = velocity_matching_loss(velocity, target) * scale
        learner.backward((losses * group.weights.to(losses)).sum(), sync=sync)
    return losses.detach(), velocity.detach()
