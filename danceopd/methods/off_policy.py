"""Off-policy distillation: the teacher is asked at noised data, which the student may never visit."""

from __future__ import annotations

import torch

from danceopd.methods.base import Distillation, Group, Method, UpdateFigures, match_velocity
from danceopd.training.learner import Learner


class OffPolicy(Method):
    """DanceOPD with one change: the query is z = (1 - sigma) x + sigma eps, x the record's target, not a rollout's end.

    Noise level, noise and route are those DanceOPD would draw; at sigma = 1 both ask at the same state. It is the
    off-policy baseline of DanceOPD (arXiv 2606.27377). A sample costs 1 teacher and 3 student forwards.
    """

    needs_targets = True

    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """See `Method`."""
        sigma = group.grid[group.stop[:, 0]].to(group.noise)
        clean = setup.encoded.target(group.rows, learner.device).to(group.noise)
        state = torch.lerp(clean, group.noise, sigma[:, None, None])
        answer = setup.ask(group, state, group.stop[:, 0])
        losses, _ = match_velocity(setup, learner, group, state, sigma, answer.velocity, sync=group.last)
        spent = answer.forwards + len(group.rows) * learner.update_forwards
        figures.add(group.tags, losses, sigma, spent)
