"""Dense queries: K states of one rollout instead of one."""

from __future__ import annotations

import torch
from torch import Tensor

from danceopd.flow.rollout import states_on_the_way, steps_on_the_way
from danceopd.methods.base import Distillation, Group, Method, UpdateFigures, match_velocity
from danceopd.methods.queries import QueryWindow
from danceopd.training.learner import Learner


class Dense(Method):
    """DanceOPD with one change: K queries per sample on the same path, their losses averaged.

    It is the dense-query ablation of DanceOPD (arXiv 2606.27377, its table over K). The K noise levels are drawn from
    the query window independently. A sample costs the steps before its last query and, K times, 1 teacher and 3
    student forwards. The queries are processed one after the other, so K costs no memory beyond the K states.

    Args:
        queries: K.
    """

    def __init__(self, queries: int):
        self.queries = queries

    def draw_queries(self, window: QueryWindow, count: int, grid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Method`: K states per sample."""
        return window.draw(count * self.queries, grid, generator).view(count, self.queries).sort(dim=1)[0]

    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """See `Method`."""
        path = setup.path(learner.walker)
        stride = setup.rollout_stride
        states = states_on_the_way(path, group.noise, group.grid, group.stop, group.condition, stride)
        sigmas = group.grid[group.stop].to(group.noise)
        losses, asked = [], 0
        for k in range(self.queries):
            state, sigma = states[:, k], sigmas[:, k]
            answer = setup.ask(group, state, group.stop[:, k])
            asked += answer.forwards
            sync = group.last and k == self.queries - 1
            loss, _ = match_velocity(setup, learner, group, state, sigma, answer.velocity, sync, 1 / self.queries)
            losses.append(loss * self.queries)
        learned = self.queries * len(group.rows) * learner.update_forwards
        spent = path.forwards * steps_on_the_way(group.stop, stride) + asked + learned
        figures.add(group.tags, torch.stack(losses, dim=1).flatten(), sigmas.flatten(), spent)
