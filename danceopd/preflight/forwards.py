"""What a method spends: the transformer forwards per sample of a recipe, counted by running its own code.

How far the student rolls out depends on the window, the grid and the method, and on no weight. So the very updates are
run on a network of one number, and their count is what the real ones will take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from danceopd.backbones.base import Backbone, Condition
from danceopd.config.recipe import MERGES, Recipe
from danceopd.data.encoded import EncodedRecords
from danceopd.data.sampler import TaskSampler
from danceopd.flow.fields import Field, VelocityField
from danceopd.flow.guidance import GuidedField
from danceopd.methods.base import UpdateFigures
from danceopd.methods.groups import draw_groups
from danceopd.methods.queries import WindowSchedule, query_window
from danceopd.methods.routing import task_counts, weights_at
from danceopd.methods.table import method_of, setup_of
from danceopd.training.learner import Learner
from danceopd.training.processes import Processes

UPDATES, SAMPLES = 64, 128  # drawn for a count: its relative error is below 1 %


class _OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class _Weightless:
    """A model family with the real one's grid whose latents are one number and whose velocity is free."""

    def __init__(self, real: Backbone):
        self._real = real
        self.transformer = _OneNumber()

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        return 1, 1

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        return self._real.sigmas(steps, height, width)

    def new_transformer(self) -> nn.Module:
        return _OneNumber()

    def velocity(self, transformer: nn.Module, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return z * transformer.get_parameter("scale")

    def without_prompt(self, condition: Condition, empty: Tensor) -> Condition:
        return condition

    def guide(self, without: Tensor, prompted: Tensor, scale: float) -> Tensor:
        return prompted


def expected_forwards(
    recipe: Recipe, backbone: Backbone, encoded: EncodedRecords, fields: Mapping[str, Field]
) -> float:
    """Mean transformer forwards per sample over the recipe's training, schedules of windows and weights included.

    A merge trains nothing and takes none.

    Args:
        recipe: its `distill` and `tasks` decide.
        backbone: the real base, for its sampling grid.
        encoded: the training records, with targets if the method trains on them.
        fields: the teachers, for which of them are guided.
    """
    spec = recipe.distill
    if spec.method in MERGES:
        return 0.0
    method = method_of(spec)
    free, encoded = cast(Backbone, _Weightless(backbone)), encoded.thin()  # an update asks nothing else of it
    student = VelocityField("student", free, free.new_transformer())
    optimizer = torch.optim.SGD(student.network.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    alone = Processes(0, 1, torch.device("cpu"))
    learner = Learner(student, alone, list(student.network.parameters()), optimizer, schedule, spec)
    teacher_of = {task: of.teacher for task, of in recipe.tasks.items()}
    empty = torch.zeros(1, 1)
    teachers: dict[str, Field] = {}
    for name in set(teacher_of.values()):
        plain = VelocityField(name, free, free.new_transformer())
        teachers[name] = GuidedField(plain, 2.0, empty) if isinstance(fields[name], GuidedField) else plain
    setup = setup_of(spec, free, encoded, teachers, teacher_of, empty)
    windows = WindowSchedule(tuple((phase.until, query_window(phase.window)) for phase in spec.phases))
    weights = {task: of.weight for task, of in recipe.tasks.items()}
    sampler, generator = TaskSampler(encoded.rows_by_task(), 0), torch.Generator().manual_seed(0)
    figures = UpdateFigures()
    for step in range(UPDATES):
        now, window = weights_at(weights, step, UPDATES), windows.at(step, UPDATES)
        rows, tags = sampler.draw(task_counts(now, max(spec.batch, SAMPLES)))
        for group in draw_groups(setup, method, learner, rows, tags, now, window, generator):
            method.accumulate(setup, learner, group, figures)
    return figures.forwards_per_sample
