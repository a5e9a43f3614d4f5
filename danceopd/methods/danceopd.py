"""DanceOPD (arXiv 2606.27377): each sample asks its own task's teacher, once, on the student's own path.

With v_s the student and v_m the frozen teacher of task m, one update minimises

    E over samples (task m, condition c), noise z_1, noise level sigma from the query window:
        | v_s(z_sigma, sigma, c) - v_m(z_sigma, sigma, c) |^2,    z_sigma = where v_s itself goes from z_1

and sends no gradient through z_sigma. With `distill.target: displacement` the teacher's velocity gives way to its mean
velocity over the student's next grid interval, taken from z_sigma by small steps (`danceopd.flow.displacement`). The
base class and the loop around it (`danceopd.distill`) are shared with the methods it is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danceopd.flow.rollout import roll_out
from danceopd.methods.base import Distillation, Group, Method, UpdateFigures, match_velocity
from danceopd.methods.queries import QueryWindow
from danceopd.training.learner import Learner


class DanceOPD(Method):
    """Hard routing per sample, an on-policy query, K = 1."""

    def draw_queries(self, window: QueryWindow, count: int, grid: Tensor, generator: torch.Generator) -> Tensor:
        """Before anything rolls out: how far each sample will go, one index on the sampling grid each, (count, 1)."""
        return window.draw(count, grid, generator)[:, None]

    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """One update's part for one group of a mixed batch; see `Method`."""
        # 1. Each sample's query state was drawn from the window, before the rollout.
        stop = group.stop[:, 0]

        # 2. The student walks from noise to that state and no further, without gradient.
        path = setup.path(learner.walker)
        query = roll_out(path, group.noise, group.grid, stop, group.condition, setup.rollout_stride)

        # 3. The batch is mixed: a sample's task tag is its route, and that teacher, and no other, says where to go.
        answer = setup.ask(group, query.state, stop)

        # 4. One forward and backward pass of the student matches it.
        losses, _ = match_velocity(setup, learner, group, query.state, query.sigma, answer.velocity, sync=group.last)

        spent = query.forwards + answer.forwards + len(group.rows) * learner.update_forwards
        figures.add(group.tags, losses, query.sigma, spent)
