"""On-policy distillation of many frozen teachers into one student (DanceOPD, arXiv 2606.27377).

One update, as in the paper: draw a mixed batch whose tags are its routes; draw each sample's query state; roll the
student out to it without gradient and no further; ask the routed teacher there; match its velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danceopd.backbones.base import Backbone
from danceopd.data.encoded import EncodedRecords
from danceopd.fields import VelocityField, routed_velocity
from danceopd.objectives import velocity_matching_loss
from danceopd.progress import StepProgress
from danceopd.queries import QueryWindow, WindowSchedule, query_window
from danceopd.recipe import DistillRecipe
from danceopd.resume import Checkpoints, resumable
from danceopd.rollout import roll_out
from danceopd.routing import TaskSampler, sample_weights
from danceopd.training import Learner, batch_noise, new_learner


@dataclass
class UpdateFigures:
    """What one update measured: loss and query noise levels by task, forwards spent a sample."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    sigmas: dict[str, list[float]] = field(default_factory=dict)
    rollout_forwards: int = 0
    samples: int = 0

    def add(self, tags: list[str], losses: Tensor, sigmas: Tensor, forwards: int) -> None:
        for tag, loss, sigma in zip(tags, losses.tolist(), sigmas.tolist(), strict=True):
            self.losses.setdefault(tag, []).append(loss)
            self.sigmas.setdefault(tag, []).append(sigma)
        self.rollout_forwards += forwards
        self.samples += len(tags)

    @property
    def forwards_per_sample(self) -> float:
        """Transformer forwards a sample: the rollout, 1 teacher, 3 for the student's forward and backward."""
        return self.rollout_forwards / self.samples + 4


@dataclass(frozen=True)
class Distillation:
    """All that stays the same from update to update.

    Attributes:
        backbone: the model family and base.
        encoded: training prompts and sources; targets are never read.
        teachers: frozen fields by name.
        teacher_of: task -> teacher's name, the routing.
        weights: task -> weight in the loss.
        grid: the sampling grid the student rolls out on, (steps + 1,).
    """

    backbone: Backbone
    encoded: EncodedRecords
    teachers: dict[str, VelocityField]
    teacher_of: dict[str, str]
    weights: dict[str, float]
    grid: Tensor

    def update(
        self, learner: Learner, rows: list[int], tags: list[str], window: QueryWindow, generator: torch.Generator
    ) -> UpdateFigures:
        """Rollout, query, loss and gradient of one mixed batch (no optimizer step).

        Args:
            learner: the student.
            rows: row numbers of the batch in `encoded`.
            tags: their tasks.
            window: where on the grid to ask.
            generator: for noise and query states.
        """
        figures = UpdateFigures()
        weights = sample_weights(tags, self.weights)
        device = learner.accelerator.device
        shape = self.backbone.latent_shape(self.encoded.height, self.encoded.width)
        for group in self.encoded.shape_groups(rows):
            group_tags = [tags[i] for i in group]
            condition = self.encoded.condition([rows[i] for i in group], device)
            stop = window.draw(len(group), self.grid, generator)
            noise = batch_noise(len(group), shape, generator, condition.prompt)
            query = roll_out(learner.field, noise, self.grid, stop, condition)
            routes = [self.teacher_of[tag] for tag in group_tags]
            target = routed_velocity(self.teachers, routes, query.state, query.sigma, condition)
            with learner.field.active():
                velocity = self.backbone.velocity(learner.field.network, query.state, query.sigma, condition)
                losses = velocity_matching_loss(velocity, target)
                learner.accelerator.backward((losses * weights[group].to(losses)).sum())
            figures.add(group_tags, losses.detach(), query.sigma, query.forwards)
        return figures


def distill(
    backbone: Backbone,
    encoded: EncodedRecords,
    teachers: dict[str, VelocityField],
    teacher_of: dict[str, str],
    weights: dict[str, float],
    spec: DistillRecipe,
    preview: Callable[[VelocityField, int], None] | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[VelocityField, list[dict]]:
    """Distill the teachers into one student that starts from the base, or from the teacher `spec.start` names.

    Args:
        backbone: the base; its own weights stay as they are.
        encoded: training records of every task (prompts and sources).
        teachers: frozen fields by name.
        teacher_of: task -> teacher's name.
        weights: task -> weight in the loss.
        spec: the recipe's section.
        preview: called with the student and the step every `spec.preview_every` steps and at the end.
        checkpoints: where training is saved, and resumed from; None: it is not.

    Returns:
        The student's field, frozen, and its history: one entry a logged step with the mean loss by task since the
        last, counts of query noise levels by task, forwards a sample and the gradient norm.

    Raises:
        Interrupted: after a save, if SIGTERM came.
    """
    learner = new_learner(backbone, "student", spec, teachers.get(spec.start))
    sampler = TaskSampler(encoded.rows_by_task(), weights, spec.batch, spec.seed)
    generator = torch.Generator().manual_seed(spec.seed)
    grid = backbone.sigmas(spec.rollout_steps, encoded.height, encoded.width)
    windows = WindowSchedule(tuple((phase.until, query_window(phase.window)) for phase in spec.phases))
    setup = Distillation(backbone, encoded, teachers, teacher_of, weights, grid)
    progress = StepProgress("distill", spec.steps, spec.log_every)
    with resumable(checkpoints, spec, learner, sampler, generator) as keeper:
        history: list[dict] = keeper.kept.get("history", [])
        since = UpdateFigures(**keeper.kept.get("since", {}))
        for step in progress.steps(keeper.start):
            rows, tags = sampler.draw()
            figures = setup.update(learner, rows, tags, windows.at(step, spec.steps), generator)
            norm = learner.update()
            _merge(since, figures)
            progress.show(step, **{task: sum(v) / len(v) for task, v in since.losses.items()})
            if (step + 1) % spec.log_every == 0 or step + 1 == spec.steps:
                history.append(_entry(step + 1, since, norm))
                since = UpdateFigures()
            last = step + 1 == spec.steps
            if preview is not None and (last or (spec.preview_every and (step + 1) % spec.preview_every == 0)):
                preview(learner.field, step + 1)
            keeper.after(step + 1, history=history, since=vars(since))
    learner.field.network.requires_grad_(False).eval()
    return learner.field, history


def _merge(into: UpdateFigures, figures: UpdateFigures) -> None:
    for task, losses in figures.losses.items():
        into.losses.setdefault(task, []).extend(losses)
        into.sigmas.setdefault(task, []).extend(figures.sigmas[task])
    into.rollout_forwards += figures.rollout_forwards
    into.samples += figures.samples


SIGMA_BINS = 10


def _entry(step: int, figures: UpdateFigures, norm: float) -> dict:
    def histogram(sigmas: list[float]) -> list[int]:
        return torch.histc(torch.tensor(sigmas), SIGMA_BINS, 0.0, 1.0).int().tolist()

    return {
        "step": step,
        "loss": {task: sum(v) / len(v) for task, v in sorted(figures.losses.items())},
        "sigma_histogram": {task: histogram(v) for task, v in sorted(figures.sigmas.items())},
        "forwards_per_sample": figures.forwards_per_sample,
        "grad_norm": norm,
    }
