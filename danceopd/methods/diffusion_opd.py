"""DiffusionOPD: closed-form matching of the means of each ODE step, at every step of the student's path."""

from __future__ import annotations

import torch

from danceopd.methods.base import Distillation, Group, Method, UpdateFigures, match_velocity
from danceopd.methods.routing import routed_velocity
from danceopd.training.learner import Learner


class DiffusionOPD(Method):
    """DiffusionOPD (arXiv 2605.15055) with ODE sampling: sum over the path of dt_k^2 / 2 |v_student - v_teacher|^2.

    A step of the sampler is taken as a Gaussian around its Euler mean z + dt v. Student and teacher share the variance,
    so the reverse KL of a step is the squared distance of the means over twice the variance; for the ODE the variance
    is a constant and is left out, which gives 1/2 |dt (v_student - v_teacher)|^2. Here dt_k is the true width
    sigma_k - sigma_{k+1} of the sampling grid's step k, which a shifted grid makes uneven.

    Taken from the paper: the objective, hard routing by task, every step of the student's own path, no gradient
    through the path. Ours: |.|^2 is the mean over the latent's entries, as in every method here, and the pass that
    learns at a step also takes the step, so the path costs nothing more. The query window has no say. A sample costs,
    for every step of the grid, 1 teacher and 3 student forwards.
    """

    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """See `Method`."""
        state, routes, losses = group.noise, setup.routes(group.tags), []
        grid = group.grid.to(group.noise)
        steps = len(grid) - 1
        for step in range(steps):
            sigma = grid[step].expand(len(group.rows))
            width = grid[step] - grid[step + 1]
            target = routed_velocity(setup.teachers, routes, state, sigma, group.condition)
            sync = group.last and step == steps - 1
            loss, velocity = match_velocity(setup, learner, group, state, sigma, target, sync, width.square() / 2)
            state = state - width * velocity.to(state.dtype)
            losses.append(loss)
        sigmas = grid[:-1].repeat(len(group.rows))
        spent = steps * (setup.teacher_forwards(group.tags) + len(group.rows) * learner.update_forwards)
        figures.add(group.tags, torch.stack(losses, dim=1).flatten(), sigmas, spent)
