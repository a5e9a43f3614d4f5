"""The plain loop the engine is measured against.

One sample at a time; the student walks the whole grid whatever is queried; every teacher is a full copy of the
transformer with its LoRA merged; the student's transformer is another; each sample's prompt is encoded when its turn
comes. Source latents are taken ready-made. It is given the very draws the engine has (rows, noise, query states), so
both compute the same gradient.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.setting import STUDENT, Setting
from danceopd.backbones.base import Condition
from danceopd.backbones.lora import adapter_parameters, add_lora, plain_copy
from danceopd.methods.base import Group


class PlainLoop:
    """A trainer with the release's habits, two of which can be broken to see what each costs.

    Args:
        setting: whose base, teachers, student's LoRA, records and grid are used.
        cache_prompts: take prompt embeddings ready-made.
        stop_at_query: end the rollout where the teacher is asked.
        like: another loop to share all networks and the optimizer with.
    """

    def __init__(
        self,
        setting: Setting,
        cache_prompts: bool = False,
        stop_at_query: bool = False,
        like: PlainLoop | None = None,
    ):
        self._backbone, self._setting = setting.backbone, setting
        self._cache_prompts, self._stop_at_query = cache_prompts, stop_at_query
        if like is not None:
            self.student, self.teachers, self.optimizer = like.student, like.teachers, like.optimizer
            return
        spec, shared = setting.learner.spec, setting.backbone.transformer
        self.student = copy.deepcopy(setting.bare)
        add_lora(self.student, STUDENT, spec.lora, setting.backbone.lora_targets, spec.seed)
        with torch.no_grad():
            for mine, theirs in zip(self.parameters, adapter_parameters(shared, STUDENT), strict=True):
                mine.copy_(theirs)
        self.teachers = {name: plain_copy(shared, merge=name).eval() for name in setting.distillation.teachers}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=spec.lr, fused=True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The student's LoRA."""
        return adapter_parameters(self.student, STUDENT)

    @property
    def networks(self) -> list[nn.Module]:
        """Every transformer that is held."""
        return [self.student, *self.teachers.values()]

    def update(self, groups: list[Group]) -> int:
        """One optimizer step over a batch; returns how many samples it had."""
        count = self.accumulate(groups)
        nn.utils.clip_grad_norm_(self.parameters, self._setting.learner.spec.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return count

    def accumulate(self, groups: list[Group]) -> int:
        """Add the batch's gradient to the student's, sample by sample."""
        for group in groups:
            for place in range(len(group.rows)):
                loss = self._loss(group, place)
                (loss * group.weights[place]).backward()
        return sum(len(group.rows) for group in groups)

    def _loss(self, group: Group, place: int) -> Tensor:
        condition = self._condition(group, place)
        z, sigma = self._walk(group.noise[place : place + 1], int(group.stop[place]), condition)
        teacher = self.teachers[self._setting.distillation.teacher_of[group.tags[place]]]
        with torch.no_grad():
            target = self._backbone.velocity(teacher, z, sigma, condition)
        velocity = self._backbone.velocity(self.student, z, sigma, condition)
        return (velocity.float() - target.float()).square().mean()

    def _condition(self, group: Group, place: int) -> Condition:
        known = group.condition.rows(torch.tensor([place]))
        if self._cache_prompts:
            return known
        prompt = self._backbone.encode_prompts([self._setting.records[group.rows[place]].prompt])
        return Condition(prompt, known.source, known.height, known.width)

    @torch.no_grad()
    def _walk(self, z: Tensor, stop: int, condition: Condition) -> tuple[Tensor, Tensor]:
        grid = self._setting.grid.to(z)
        query = z
        for step in range(stop if self._stop_at_query else len(grid) - 1):
            velocity = self._backbone.velocity(self.student, z, grid[step].expand(1), condition)
            z = z + (grid[step + 1] - grid[step]) * velocity
            if step + 1 == stop:
                query = z
        return query, grid[stop].expand(1)
