"""Soft routing: every sample learns from the mean of all teachers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.flow.fields import Field
from danceopd.flow.rollout import roll_out
from danceopd.methods.base import Distillation, Group, Method, UpdateFigures, match_velocity
from danceopd.training.learner import Learner


@torch.no_grad()
def mean_velocity(fields: Sequence[Field], z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """The mean of several fields' velocities at `z` (B, N, C), `sigma` (B,): (B, N, C), in the dtype of `z`."""
    total = torch.zeros_like(z, dtype=torch.float32)
    for field in fields:
        total += field(z, sigma, condition).float()
    return (total / len(fields)).to(z.dtype)


class SoftRouting(Method):
    """DanceOPD with one change: the target is the mean of the velocities of all teachers that any task is routed to.

    It is the soft-routing ablation of DanceOPD (arXiv 2606.27377). A teacher that serves several tasks counts once. A
    sample costs the steps before its query, a forward for each teacher, and 3 for the student.
    """

    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """See `Method`."""
        fields = [setup.teachers[name] for name in sorted(set(setup.teacher_of.values()))]
        path, stop = setup.path(learner.walker), group.stop[:, 0]
        query = roll_out(path, group.noise, group.grid, stop, group.condition, setup.rollout_stride)
        target = mean_velocity(fields, query.state, query.sigma, group.trained)
        losses, _ = match_velocity(setup, learner, group, query.state, query.sigma, target, sync=group.last)
        spent = query.forwards + len(group.rows) * (sum(field.forwards for field in fields) + learner.update_forwards)
        figures.add(group.tags, losses, query.sigma, spent)
