"""What can be known before the first step of a distillation: findings with figures, not a run that fails at night.

Every check returns findings; `settle` logs the notes and warnings and raises the errors together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from danceopd.backbones import open_outline
from danceopd.backbones.base import Backbone, Condition
from danceopd.config.recipe import MERGES, ROLL_OUT, BaseTeacher, ChampionTeacher, Recipe
from danceopd.data.encoded import EncodedRecords
from danceopd.flow.fields import Field, VelocityField
from danceopd.flow.guidance import GuidedField
from danceopd.flow.rollout import stride_drift
from danceopd.preflight.compatibility import check_pipeline
from danceopd.preflight.findings import Finding
from danceopd.preflight.memory import available_memory, check_memory, estimate_memory, largest_shapes, samples_at_once
from danceopd.preflight.sampling import check_few_step_teachers, check_sampling

SAME = 1e-3  # two fields are one where their velocities differ by less, relative to the velocity (root mean square)


PROBES = 2  # training records per task


SIGMAS = (0.9, 0.6, 0.3)


def check_records(recipe: Recipe, counts: Mapping[str, Mapping[str, int]], encoded: EncodedRecords) -> list[Finding]:
    """Tasks that nobody knows or that have no records, and records without the source image their task needs.

    Args:
        recipe: its tasks.
        counts: the dataset's records by task and split, of all tasks there are in it.
        encoded: the training records of the recipe's tasks.
    """
    found = []
    unknown = {task: sum(splits.values()) for task, splits in counts.items() if task not in recipe.tasks}
    if any(unknown.values()):
        text = ", ".join(f"{task} ({count})" for task, count in sorted(unknown.items()) if count)
        found.append(
            Finding(
                "error",
                "tasks",
                f"records of unknown task(s) {text}; the recipe's tasks are: {', '.join(recipe.tasks)}",
            )
        )
    total = Counter(encoded.tasks)
    lacking = sorted(set(recipe.tasks) - set(total))
    if lacking:
        text = f"no training records for task(s) {', '.join(lacking)}; the dataset has none in 'train'"
        found.append(Finding("error", "records", text))
    bare = Counter(task for task, row in zip(encoded.tasks, encoded.source_row.tolist(), strict=True) if row < 0)
    for task, spec in recipe.tasks.items():
        if spec.needs_source and bare[task]:
            text = (
                f"task {task!r} edits a source image, and {bare[task]} of its {total[task]} training records have "
                f"none; add the images, or set tasks.{task}.needs_source: false"
            )
            found.append(Finding("error", "sources", text))
    return found


@torch.no_grad()
def probe_states(field: Field, condition: Condition, at_once: int, seed: int = 0) -> tuple[Tensor, Tensor, Condition]:
    """States such as a student meets: noise, and one jump of a field from noise to a picture, noised again.

    Args:
        field: whose picture it is.
        condition: real training conditions, of B samples.
        at_once: so many samples pass through the field together.
        seed: of the noise.

    Returns:
        States (S * B, N, C), their noise levels (S * B,), and the conditions repeated, S = len(SIGMAS) + 1.
    """
    count = len(condition)
    shape = field.backbone.latent_shape(condition.height, condition.width)
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(condition.prompt)
    clean = noise - _ask(field, noise, torch.ones(count).to(noise), condition, at_once).to(noise)
    states = [noise, *(torch.lerp(clean, noise, sigma) for sigma in SIGMAS)]
    levels = torch.tensor([1.0, *SIGMAS]).repeat_interleave(count).to(noise)
    index = torch.arange(count, device=noise.device).repeat(len(states))
    return torch.cat(states), levels, condition.rows(index)


def _ask(field: Field, state: Tensor, sigma: Tensor, condition: Condition, at_once: int) -> Tensor:
    parts = torch.arange(len(state), device=state.device).split(at_once)
    return torch.cat([field(state[part], sigma[part], condition.rows(part)) for part in parts])


@torch.no_grad()
def relative_difference(field: Field, other: Field, condition: Condition, at_once: int) -> float:
    """|v_field - v_other| / |v_other|, root mean squares over probe states of the other field."""
    state, sigma, repeated = probe_states(other, condition, at_once)
    theirs = _ask(other, state, sigma, repeated, at_once).float()
    ours = _ask(field, state, sigma, repeated, at_once).float()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def _on_purpose(recipe: Recipe, teacher: str) -> bool:
    """Whether the recipe itself says that a teacher is the student's start."""
    start, spec = recipe.distill.start, recipe.teachers[teacher]
    starts_as_base = start == "base" or isinstance(recipe.teachers[start], BaseTeacher)
    return spec.guidance is None and (teacher == start or (starts_as_base and isinstance(spec, BaseTeacher)))


def check_teachers_differ(
    recipe: Recipe, backbone: Backbone, fields: Mapping[str, Field], encoded: EncodedRecords, processes: int = 1
) -> list[Finding]:
    """Tasks whose teacher is what the student is before its first step; as many samples at once as in training."""
    device = next(backbone.transformer.parameters()).device
    start, at_once = recipe.distill.start, samples_at_once(recipe.distill, processes)
    student = _starting_field(recipe, backbone, fields)
    found = []
    for task, picked in _probed(recipe, encoded).items():
        spec = recipe.tasks[task]
        teacher = fields[spec.teacher]
        with teacher.resident(), student.resident():
            difference = relative_difference(teacher, student, encoded.condition(picked, device), at_once)
        figures = f"relative velocity difference {difference:.2g} on {len(picked)} training conditions"
        if difference >= SAME:
            text = f"task {task!r}: teacher {spec.teacher!r} and the student differ, {figures}"
            found.append(Finding("note", "teacher equals student", text))
        elif _on_purpose(recipe, spec.teacher):
            text = (
                f"task {task!r}: the student starts as its teacher {spec.teacher!r} ({figures}); "
                "this task keeps what is there"
            )
            found.append(Finding("note", "teacher equals student", text))
        else:
            text = (
                f"task {task!r}: teacher {spec.teacher!r} is the same field as the student's start, {start!r} "
                f"({figures}): nothing to learn; check its weights, or let {start!r} teach this task"
            )
            found.append(Finding("error", "teacher equals student", text))
    return found


def check_stride(
    recipe: Recipe, backbone: Backbone, fields: Mapping[str, Field], encoded: EncodedRecords, processes: int = 1
) -> list[Finding]:
    """How far the student's start comes from its path where it takes the path in strides; samples as in training."""
    stride, steps = recipe.distill.rollout_stride, recipe.distill.rollout_steps
    if stride == 1 or recipe.distill.method not in ROLL_OUT:
        return []
    device = next(backbone.transformer.parameters()).device
    student = _starting_field(recipe, backbone, fields)
    found = []
    for task, picked in _probed(recipe, encoded).items():
        condition = encoded.condition(picked, device)
        size = condition.height, condition.width
        shape = (len(picked), *backbone.latent_shape(*size))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(condition.prompt)
        grid, last, drift = backbone.sigmas(steps, *size), torch.full((len(picked),), steps - 1), 0.0
        parts = torch.arange(len(picked), device=noise.device).split(samples_at_once(recipe.distill, processes))
        with student.resident():
            for part in parts:
                own, stop = condition.rows(part), last[: len(part)]
                drift += stride_drift(student, noise[part], grid, stop, own, stride) * len(part) / len(picked)
        text = (
            f"task {task!r}: in strides of {stride} the student's start comes to its path's last query {drift:.2g} of "
            f"the way from where single steps lead ({len(picked)} training conditions)"
        )
        found.append(Finding("note", "rollout stride", text))
    return found


def _probed(recipe: Recipe, encoded: EncodedRecords) -> dict[str, list[int]]:
    """A few training records of one size, of each task that has any."""
    rows_of = encoded.rows_by_task()
    groups = {task: encoded.shape_groups(rows_of.get(task, [])) for task in recipe.tasks}
    return {task: [rows_of[task][at] for at in found[-1][:PROBES]] for task, found in groups.items() if found}


def _starting_field(recipe: Recipe, backbone: Backbone, fields: Mapping[str, Field]) -> Field:
    """What the student is before its first step: the base, or a teacher's weights (without its guidance)."""
    field = fields.get(recipe.distill.start)
    if field is None:
        return VelocityField("base", backbone, backbone.transformer)
    return field.field if isinstance(field, GuidedField) else field


def check_proofs(recipe: Recipe, facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Teachers that are no better than the base on a task they serve, by the figures of their own products.

    Args:
        recipe: tasks, their teachers and metrics.
        facts: of each teacher's product, by name.
    """
    found = []
    for task, spec in recipe.tasks.items():
        teacher = recipe.teachers[spec.teacher]
        if isinstance(teacher, BaseTeacher) and teacher.guidance is None:
            continue
        if isinstance(teacher, ChampionTeacher):  # it holds the task as it is, and was judged when it was registered
            continue
        scores = facts[spec.teacher].get("scores", {}).get(task, {})
        metric = next((name for name in spec.metrics if name in scores.get("teacher", {})), spec.metrics[0])
        mine, base = (scores.get(who, {}).get(metric) for who in ("teacher", "base"))
        if mine is None or base is None:
            text = f"task {task!r}: teacher {spec.teacher!r} has no figures of {metric}; finetune it again to prove it"
            found.append(Finding("warning", "teacher no better", text))
            continue
        figures = f"{metric} {mine:.4g}, the base {base:.4g}"
        if mine > base:
            found.append(Finding("note", "teacher no better", f"task {task!r}: teacher {spec.teacher!r}: {figures}"))
        else:
            text = f"task {task!r}: teacher {spec.teacher!r} is no better than the base ({figures}); train it longer"
            # Without gates the metric is there to be looked at.
            level: Literal["error", "warning"] = "error" if spec.gates else "warning"
            found.append(Finding(level, "teacher no better", text))
    return found


def preflight(
    recipe: Recipe,
    backbone: Backbone,
    base: Path,
    fields: Mapping[str, Field],
    facts: Mapping[str, Mapping[str, Any]],
    encoded: EncodedRecords,
    counts: Mapping[str, Mapping[str, int]],
    processes: int = 1,
) -> list[Finding]:
    """Every check, before the first step of a distillation. A merge trains nothing and needs no memory for it.

    Args:
        recipe: the run.
        backbone: the base, loaded.
        base: its pipeline folder.
        fields: the teachers, loaded, by name.
        facts: of the teachers' products, by name.
        encoded: training records of the recipe's tasks.
        counts: the dataset's records by task and split.
        processes: how many train together.
    """
    found = check_records(recipe, counts, encoded) + check_proofs(recipe, facts)
    for name in fields:
        path = getattr(recipe.teachers[name], "path", None)
        if path is not None:
            found += check_pipeline(name, Path(path), base)
    found += check_teachers_differ(recipe, backbone, fields, encoded, processes)
    found += check_stride(recipe, backbone, fields, encoded, processes)
    found += check_sampling(recipe, backbone) + check_few_step_teachers(recipe, facts)
    if recipe.distill.method in MERGES:
        return found
    shapes = largest_shapes(encoded, samples_at_once(recipe.distill, processes))
    estimate = estimate_memory(recipe, open_outline(base, recipe.model), shapes, processes)
    return found + check_memory(estimate, available_memory(next(backbone.transformer.parameters()).device))
