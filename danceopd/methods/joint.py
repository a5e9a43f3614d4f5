"""Joint training: no teacher at all, one network on the data of every task."""

from __future__ import annotations

import torch

from danceopd.flow.losses import flow_matching_loss
from danceopd.methods.base import Distillation, Group, Method, UpdateFigures
from danceopd.training.learner import Learner


class Joint(Method):
    """Flow matching on the tasks' paired targets, all tasks in one batch: |v(z_sigma) - (eps - x)|^2.

    The joint-training baseline of DanceOPD (arXiv 2606.27377): what the teachers were fine-tuned with, in one student.
    As there, sigma is uniform on [0, 1]; the query window has no say. A sample costs 3 forwards.
    """

    seeded = True  # for sigma, which is not tied to the grid
    needs_targets = True

    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """See `Method`."""
        draws = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in group.seeds]
        sigma = torch.stack(draws).to(group.noise)
        clean = setup.encoded.target(group.rows, learner.device).to(group.noise)
        with learner.field.active():
            losses = flow_matching_loss(setup.backbone, learner.field.network, clean, group.trained, group.noise, sigma)
            learner.backward((losses * group.weights.to(losses)).sum(), sync=group.last)
        figures.add(group.tags, losses.detach(), sigma, len(group.rows) * learner.update_forwards)
