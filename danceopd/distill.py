"""On-policy distillation of many frozen teachers into one student (DanceOPD, arXiv 2606.27377).

One update, as in the paper: draw a mixed batch whose tags are its routes; draw each sample's query state; roll the
student out to it without gradient and no further; ask the routed teacher there; match its velocity.

The loop around it is shared with the methods it is compared with (`danceopd.baselines`): they differ in what a
`Method` does with one group of samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from danceopd.backbones.base import Backbone, Condition
from danceopd.data.encoded import EncodedRecords
from danceopd.errors import UserError
from danceopd.fields import VelocityField, routed_velocity
from danceopd.objectives import velocity_matching_loss
from danceopd.processes import share
from danceopd.progress import StepProgress
from danceopd.queries import QueryWindow, WindowSchedule, query_window
from danceopd.recipe import MERGES, DistillRecipe, SelectRecipe, Weight
from danceopd.resume import Checkpoints, resumable
from danceopd.rollout import roll_out
from danceopd.routing import TaskSampler, sample_weights, task_counts, weights_at
from danceopd.training import Learner, new_learner

if TYPE_CHECKING:
    from danceopd.baselines.merges import Merge

log = logging.getLogger(__name__)


@dataclass
class UpdateFigures:
    """What updates measured: loss and query noise levels by task, and the transformer forwards they took.

    A backward pass counts as two forwards, and as three where activations are computed again.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    sigmas: dict[str, list[float]] = field(default_factory=dict)
    forwards: int = 0
    samples: int = 0

    def add(self, tags: list[str], losses: Tensor, sigmas: Tensor, forwards: int) -> None:
        """Add one group: a loss and a noise level a sample (or several a sample, sample by sample)."""
        per_sample = len(losses) // len(tags)
        for position, (loss, sigma) in enumerate(zip(losses.tolist(), sigmas.tolist(), strict=True)):
            tag = tags[position // per_sample]
            self.losses.setdefault(tag, []).append(loss)
            self.sigmas.setdefault(tag, []).append(sigma)
        self.forwards += forwards
        self.samples += len(tags)

    def merge(self, other: UpdateFigures) -> None:
        """Add another's figures to these."""
        for task, losses in other.losses.items():
            self.losses.setdefault(task, []).extend(losses)
            self.sigmas.setdefault(task, []).extend(other.sigmas[task])
        self.forwards += other.forwards
        self.samples += other.samples

    @property
    def forwards_per_sample(self) -> float:
        """Transformer forwards a sample: for this method the rollout, 1 teacher, 3 for the student."""
        return self.forwards / self.samples


@dataclass(frozen=True)
class Group:
    """Samples of one size and sequence length: this process's share of a part of a mixed batch, with its random draws.

    Attributes:
        rows: row numbers in the encoded records.
        tags: their tasks.
        weights: each sample's weight in the loss, (n,) float32; over all groups and processes they sum to 1.
        condition: of the same n samples.
        noise: where each sample's path starts, (n, N, C).
        grid: the sampling grid at the samples' picture size, (steps + 1,).
        stop: indices of the query states on the grid, (n, K), int64 on the CPU, rising along K.
        seeds: one a sample, for methods that draw more along the path; empty for those that do not.
        last: whether no group of this process follows in the update: its last backward pass synchronises.
    """

    rows: list[int]
    tags: list[str]
    weights: Tensor
    condition: Condition
    noise: Tensor
    grid: Tensor
    stop: Tensor
    seeds: list[int]
    last: bool


@dataclass(frozen=True)
class Distillation:
    """All that stays the same from update to update.

    Attributes:
        backbone: the model family and base.
        encoded: training prompts and sources; targets are read only by methods that train on data.
        teachers: frozen fields by name.
        teacher_of: task -> teacher's name, the routing.
        rollout_steps: steps of the sampling grid the student rolls out on.
    """

    backbone: Backbone
    encoded: EncodedRecords
    teachers: dict[str, VelocityField]
    teacher_of: dict[str, str]
    rollout_steps: int

    def grid(self, height: int, width: int) -> Tensor:
        """The sampling grid for a picture size, (rollout_steps + 1,)."""
        return self.backbone.sigmas(self.rollout_steps, height, width)

    def routes(self, tags: list[str]) -> list[str]:
        """The teacher's name of each sample."""
        return [self.teacher_of[tag] for tag in tags]

    def teacher_forwards(self, tags: list[str]) -> int:
        """Forwards it takes to ask each sample's teacher once; a guided one takes two."""
        return sum(self.teachers[route].forwards for route in self.routes(tags))


class Method(Protocol):
    """What one update does with a group of samples.

    Attributes:
        queries: query states drawn a sample (K).
        seeded: whether the group carries a seed a sample.
        needs_targets: whether it trains on target images.
    """

    queries: int
    seeded: bool
    needs_targets: bool

    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """Add the group's gradient to the learner's through `learner.backward`, and what was measured to `figures`."""
        ...


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


class HardRoutedOnPolicy:
    """DanceOPD: one query on the student's own path, the routed teacher alone, |v_student - v_teacher|^2 there."""

    queries = 1
    seeded = False
    needs_targets = False

    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """See `Method`."""
        query = roll_out(learner.field, group.noise, group.grid, group.stop[:, 0], group.condition)
        target = routed_velocity(setup.teachers, setup.routes(group.tags), query.state, query.sigma, group.condition)
        losses, _ = match_velocity(setup, learner, group, query.state, query.sigma, target, sync=group.last)
        spent = query.forwards + setup.teacher_forwards(group.tags) + len(group.rows) * learner.update_forwards
        figures.add(group.tags, losses, query.sigma, spent)


def method_of(spec: DistillRecipe) -> Method | Merge:
    """The method a recipe's `distill.method` names."""
    if spec.method == "danceopd":
        return HardRoutedOnPolicy()
    from danceopd.baselines import BASELINES  # they are made of this module's parts

    return BASELINES[spec.method](spec)


def draw_groups(
    setup: Distillation,
    method: Method,
    learner: Learner,
    rows: list[int],
    tags: list[str],
    weights: dict[str, float],
    window: QueryWindow,
    generator: torch.Generator,
    parts: int = 1,
) -> list[Group]:
    """Make every random draw of a global batch, and give this process its groups.

    Every process draws for the whole batch from its own copy of one generator and then keeps every n-th sample of a
    shape, so that the batch, its routes and its draws are the same however many processes share it.

    Args:
        setup: records and grids.
        method: how many draws a sample needs.
        learner: whose process and device.
        rows: row numbers of the batch.
        tags: their tasks.
        weights: task -> weight in the loss.
        window: where on the grid to ask.
        generator: for noise and query states, on the CPU.
        parts: pieces each shape's samples are split into, so that less lies in memory at once.
    """
    by_sample = sample_weights(tags, weights)
    device = learner.device
    groups: list[Group] = []
    before = 0
    for positions in setup.encoded.shape_groups(rows):
        count = len(positions)
        size = setup.encoded.size(rows[positions[0]])
        grid, shape = setup.grid(*size), setup.backbone.latent_shape(*size)
        stop = window.draw(count * method.queries, grid, generator).view(count, method.queries).sort(dim=1)[0]
        noise = torch.randn(count, *shape, generator=generator)
        seeds = torch.randint(2**62, (count,), generator=generator).tolist() if method.seeded else []
        for part in share(count, learner.processes, parts, before):
            where = [positions[i] for i in part]
            picked = [rows[i] for i in where]
            groups.append(
                Group(
                    rows=picked,
                    tags=[tags[i] for i in where],
                    weights=by_sample[where],
                    condition=setup.encoded.condition(picked, device),
                    noise=noise[part].to(device),
                    grid=grid,
                    stop=stop[part],
                    seeds=[seeds[i] for i in part] if seeds else [],
                    last=False,
                )
            )
        before += count
    if groups:
        groups[-1] = replace(groups[-1], last=True)
    return groups


@dataclass(frozen=True)
class Validation:
    """How a student did on validation records.

    Attributes:
        score: the higher the better; at >= 0 it holds every gate.
        figures: what was measured, for the history.
    """

    score: float
    figures: dict


def distill(
    backbone: Backbone,
    encoded: EncodedRecords,
    teachers: dict[str, VelocityField],
    teacher_of: dict[str, str],
    weights: dict[str, Weight],
    spec: DistillRecipe,
    preview: Callable[[VelocityField, int], None] | None = None,
    checkpoints: Checkpoints | None = None,
    validate: Callable[[VelocityField], Validation] | None = None,
    record: Callable[[dict], None] | None = None,
) -> tuple[VelocityField, list[dict]]:
    """Distill the teachers into one student that starts from the base, or from the teacher `spec.start` names.

    With several processes every one of them calls this with the same arguments and gets the same student.

    Args:
        backbone: the base; its own weights stay as they are.
        encoded: training records of every task (prompts and sources).
        teachers: frozen fields by name.
        teacher_of: task -> teacher's name.
        weights: task -> weight in the loss, perhaps by phases of the training.
        spec: the recipe's section.
        preview: called with the student and the step every `spec.preview_every` steps and at the end.
        checkpoints: where training is saved, and resumed from; None: it is not.
        validate: scores the student every `spec.select.every` steps; needed if the recipe selects.
        record: called with every entry of the history as it is made, and again after an interruption.

    Returns:
        The student's field, frozen, and its history: one entry a logged step with the mean loss by task since the
        last, counts of query noise levels by task, forwards a sample and the gradient norm, and what validated then.
        A merge trains nothing: its one entry is of step 0, with no losses.

    Raises:
        Interrupted: after a save, if SIGTERM came.
        UserError: if there are fewer samples in a batch than processes, or the start is none of the fields.
    """
    method = method_of(spec)
    record = record or (lambda entry: None)
    if spec.method in MERGES:
        student, history = _merged(method, backbone, teachers, teacher_of, spec, preview, validate)
        record(history[0])
        return student, history
    starts = dict.fromkeys(("base", *teachers))
    if spec.start not in starts:
        raise UserError(f"distill.start {spec.start!r}: no such field was given; there are: {', '.join(starts)}")
    learner = new_learner(backbone, "student", spec, teachers.get(spec.start))
    if spec.batch < learner.processes.count:
        raise UserError(f"distill.batch {spec.batch}: {learner.processes.count} processes need a sample each")
    sampler = TaskSampler(encoded.rows_by_task(), spec.seed)
    generator = torch.Generator().manual_seed(spec.seed)
    windows = WindowSchedule(tuple((phase.until, query_window(phase.window)) for phase in spec.phases))
    setup = Distillation(backbone, encoded, teachers, teacher_of, spec.rollout_steps)
    progress = StepProgress("distill", spec.steps, spec.log_every)
    with resumable(checkpoints, spec, learner, sampler, generator) as keeper:
        history: list[dict] = keeper.kept.get("history", [])
        for entry in history:
            record(entry)
        since = UpdateFigures(**keeper.kept.get("since", {}))
        selection = Selection(**keeper.kept.get("selection", {}))
        for step in progress.steps(keeper.start):
            if selection.ended:
                break
            now = weights_at(weights, step, spec.steps)
            rows, tags = sampler.draw(task_counts(now, spec.batch))
            window = windows.at(step, spec.steps)
            groups = draw_groups(setup, method, learner, rows, tags, now, window, generator, spec.accumulate)
            figures = UpdateFigures()
            with learner.precision():
                for group in groups:
                    method.accumulate(setup, learner, group, figures)
            norm = learner.update()
            for part in learner.processes.gather(figures):
                since.merge(part)
            progress.show(step, **{task: sum(v) / len(v) for task, v in since.losses.items()})
            done, last = step + 1, step + 1 == spec.steps
            if spec.select is not None and (done % spec.select.every == 0 or last):
                with learner.shown() as field:
                    better = selection.see(done, learner.processes.gather(validate(field))[0], spec.select)
                if better:
                    learner.keep_best()
            last = last or selection.ended
            if done % spec.log_every == 0 or last:
                history.append(_entry(done, since, norm, selection.news(done)))
                record(history[-1])
                since = UpdateFigures()
            if preview is not None and (last or (spec.preview_every and done % spec.preview_every == 0)):
                with learner.shown() as field:
                    preview(field, done)
            keeper.after(done, last, history=history, since=vars(since), selection=vars(selection))
    return learner.finish(), history


def _merged(
    method: Merge,
    backbone: Backbone,
    teachers: dict[str, VelocityField],
    teacher_of: dict[str, str],
    spec: DistillRecipe,
    preview: Callable[[VelocityField, int], None] | None,
    validate: Callable[[VelocityField], Validation] | None,
) -> tuple[VelocityField, list[dict]]:
    student = method.student(backbone, [teachers[name] for name in sorted(set(teacher_of.values()))])
    selection = Selection()
    if spec.select is not None:
        selection.see(0, validate(student), spec.select)
    if preview is not None:
        preview(student, 0)
    entry = {"step": 0, "loss": {}, "sigma_histogram": {}, "forwards_per_sample": 0.0}
    return student, [entry | selection.news(0)]


@dataclass
class Selection:
    """The best state so far, and whether it is time to end.

    Attributes:
        best: score of the best state; None before the first validation.
        best_step: when that was.
        waited: validations since.
        ended: whether training ends before its last step.
        latest: figures of the latest validation, with its step.
    """

    best: float | None = None
    best_step: int = 0
    waited: int = 0
    ended: bool = False
    latest: dict | None = None

    def see(self, step: int, validation: Validation, spec: SelectRecipe) -> bool:
        """Note a validation; returns whether it is the best so far."""
        better = self.best is None or validation.score > self.best
        if better:
            self.best, self.best_step, self.waited = validation.score, step, 0
        else:
            self.waited += 1
        held = spec.stop_when_held and validation.score >= 0
        self.ended = held or (spec.patience is not None and self.waited >= spec.patience)
        self.latest = {"step": step, "score": validation.score, "figures": validation.figures}
        log.info("validation at step %d: margin %.3g%s", step, validation.score, ", the best so far" if better else "")
        return better

    def news(self, step: int) -> dict:
        """The latest validation, if it is of this step."""
        fresh = self.latest is not None and self.latest["step"] == step
        return {"validation": self.latest, "best_step": self.best_step} if fresh else {}


SIGMA_BINS = 10


def _entry(step: int, figures: UpdateFigures, norm: float, more: dict) -> dict:
    def histogram(sigmas: list[float]) -> list[int]:
        return torch.histc(torch.tensor(sigmas), SIGMA_BINS, 0.0, 1.0).int().tolist()

    return {
        "step": step,
        "loss": {task: sum(v) / len(v) for task, v in sorted(figures.losses.items())},
        "sigma_histogram": {task: histogram(v) for task, v in sorted(figures.sigmas.items())},
        "forwards_per_sample": figures.forwards_per_sample,
        "grad_norm": norm,
    } | more
