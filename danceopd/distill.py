"""On-policy distillation of many frozen teachers into one student: the loop that every method shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from danceopd.backbones.base import Backbone
from danceopd.config.recipe import MERGES, DistillRecipe, Weight
from danceopd.data.encoded import EncodedRecords
from danceopd.data.sampler import TaskSampler
from danceopd.errors import UserError
from danceopd.flow.fields import Field, VelocityField
from danceopd.methods.base import UpdateFigures
from danceopd.methods.drift_gate import DriftGate
from danceopd.methods.groups import draw_groups
from danceopd.methods.merges import merge
from danceopd.methods.queries import WindowSchedule, query_window
from danceopd.methods.routing import task_counts, weights_at
from danceopd.methods.table import merge_rule_of, method_of, setup_of
from danceopd.training.checkpoints import Checkpoints, resumable
from danceopd.training.finite import FiniteGuard, not_finite
from danceopd.training.fsdp import share_out
from danceopd.training.learner import new_learner
from danceopd.training.processes import this_process
from danceopd.training.progress import StepProgress
from danceopd.training.selection import Selection, Validation

STUDENT = "student"  # its field's name, and its adapter's
SIGMA_BINS = 10  # of the histogram of query noise levels


def distill(
    backbone: Backbone,
    encoded: EncodedRecords,
    teachers: Mapping[str, Field],
    teacher_of: dict[str, str],
    weights: dict[str, Weight],
    spec: DistillRecipe,
    preview: Callable[[VelocityField, int], None] | None = None,
    checkpoints: Checkpoints | None = None,
    validate: Callable[[VelocityField], Validation] | None = None,
    record: Callable[[dict], None] | None = None,
    empty: Tensor | None = None,
) -> tuple[VelocityField, list[dict]]:
    """Distill the teachers into one student that starts from the base, or from the teacher `spec.start` names.

    With several processes every one of them calls this with the same arguments and gets the same student. With
    `parallel: shard` base, teachers and student are shared out among them in place, and the student stays so.

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
        empty: embedding of the empty prompt, (L, D); default: encoded now, if guidance or dropped prompts need it.

    Returns:
        The student's field, frozen, and its history: one entry per logged step with the mean loss by task since the
        last, counts of query noise levels by task, forwards per sample and the gradient norm, and what validated then.
        A merge trains nothing: its one entry is of step 0, with no losses.

    Raises:
        Interrupted: after a save, if SIGTERM came.
        UserError: if there are fewer samples in a batch than processes, the start is none of the fields, or a loss,
            the gradient or a weight is not a finite number.
    """
    record = record or (lambda entry: None)
    if spec.method in MERGES:
        merged = _merged(backbone, teachers, teacher_of, spec, preview, validate)
        record(merged[1][0])
        return merged
    method = method_of(spec)
    starts = dict.fromkeys(("base", *teachers))
    if spec.start not in starts:
        raise UserError(f"distill.start {spec.start!r}: no such field was given; there are: {', '.join(starts)}")
    share_out(backbone, teachers.values(), spec, STUDENT, this_process())
    learner = new_learner(backbone, STUDENT, spec, teachers.get(spec.start))
    if spec.batch < learner.processes.count:
        raise UserError(f"distill.batch {spec.batch}: {learner.processes.count} processes need a sample each")
    sampler = TaskSampler(encoded.rows_by_task(), spec.seed)
    generator = torch.Generator().manual_seed(spec.seed)
    windows = WindowSchedule(tuple((phase.until, query_window(phase.window)) for phase in spec.phases))
    setup = setup_of(spec, backbone, encoded, teachers, teacher_of, empty)
    progress = StepProgress("distill", spec.steps, spec.log_every)
    with resumable(checkpoints, spec, learner, sampler, generator) as keeper:
        history: list[dict] = keeper.kept.get("history", [])
        for entry in history:
            record(entry)
        since = UpdateFigures(**keeper.kept.get("since", {}))
        selection = Selection(**keeper.kept.get("selection", {}))
        guard = FiniteGuard(learner.section, spec, encoded, keeper.kept.get("skipped", 0))
        gate = DriftGate(spec, learner, keeper.kept.get("own_rollout", False))
        for step in progress.steps(keeper.start):
            if selection.ended:
                break
            now = weights_at(weights, step, spec.steps)
            rows, tags = sampler.draw(task_counts(now, spec.batch))
            window = windows.at(step, spec.steps)
            groups = draw_groups(setup, method, learner, rows, tags, now, window, generator, spec.accumulate)
            figures, bad = UpdateFigures(), []
            with learner.precision():
                for group in groups:
                    part = UpdateFigures()
                    method.accumulate(setup, learner, group, part)
                    bad += not_finite(part.losses, group.rows, group.tags)
                    figures.merge(part)
            gate.look(setup, groups, step + 1)
            norm = learner.update()
            found = learner.processes.gather((figures, bad))
            good = guard.good(step, norm, [row for _, of in found for row in of], rows)
            for part, _ in found:
                since.merge(part if good else part.spent())
            progress.show(step, **{task: sum(v) / len(v) for task, v in since.losses.items()})
            done, last = step + 1, step + 1 == spec.steps
            if spec.select is not None and (done % spec.select.every == 0 or last):
                assert validate is not None, "a recipe that selects needs `validate`"
                with learner.shown() as field:
                    better = selection.see(done, learner.processes.gather(validate(field))[0], spec.select)
                if better:
                    learner.keep_best()
            last = last or selection.ended
            if done % spec.log_every == 0 or last:
                history.append(_entry(done, since, norm, selection.news(done) | gate.news()))
                record(history[-1])
                since = UpdateFigures()
            if preview is not None and (last or (spec.preview_every and done % spec.preview_every == 0)):
                with learner.shown() as field:
                    preview(field, done)
            state = {"since": vars(since), "selection": vars(selection), "skipped": guard.skipped}
            keeper.after(done, last, history=history, own_rollout=gate.closed, **state)
    learner.check_finite()
    return learner.finish(), history


def _merged(
    backbone: Backbone,
    teachers: Mapping[str, Field],
    teacher_of: dict[str, str],
    spec: DistillRecipe,
    preview: Callable[[VelocityField, int], None] | None,
    validate: Callable[[VelocityField], Validation] | None,
) -> tuple[VelocityField, list[dict]]:
    routed = [teachers[name] for name in sorted(set(teacher_of.values()))]
    student = merge(backbone, routed, merge_rule_of(spec))
    selection = Selection()
    if spec.select is not None:
        assert validate is not None, "a recipe that selects needs `validate`"
        selection.see(0, validate(student), spec.select)
    if preview is not None:
        preview(student, 0)
    entry = {"step": 0, "loss": {}, "sigma_histogram": {}, "forwards_per_sample": 0.0}
    return student, [entry | selection.news(0)]


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
