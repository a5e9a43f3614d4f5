"""Before training: where teachers and student disagree, and where tasks pull the student apart.

Both are looked at where the student will ask: on its own paths, at several noise levels of the sampling grid. The
disagreement of two fields is the root mean square of the difference of their velocities there, as a share of the
student's. How tasks pull is the cosine between their gradients of the velocity-matching loss (arXiv 2606.27377), each
at its own task's states: near 1 they teach the same, below 0 what one learns the other unlearns.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.flow.losses import velocity_matching_loss
from danceopd.flow.rollout import states_on_the_way
from danceopd.flow.sampling import seeded_noise
from danceopd.methods.base import Distillation
from danceopd.preflight.memory import samples_at_once
from danceopd.training.learner import Learner


@dataclass(frozen=True)
class TeacherMap:
    """What K noise levels of the student's own paths showed.

    Attributes:
        sigmas: the noise levels, (K,), falling.
        disagreement: task -> teacher -> (K,): that teacher's velocity against the student's, at that task's states.
        teacher_of: task -> its own teacher.
        pull: task -> (K,): size of its gradient.
        conflict: "task / task" -> (K,): cosine between their gradients; 0 where one has none.
        records: how many of each task were asked about.
    """

    sigmas: list[float]
    disagreement: dict[str, dict[str, list[float]]]
    teacher_of: dict[str, str]
    pull: dict[str, list[float]]
    conflict: dict[str, list[float]]
    records: int


def map_teachers(setup: Distillation, learner: Learner, levels: int = 4, records: int = 8, seed: int = 0) -> TeacherMap:
    """Ask every teacher at the student's own states, and take each task's gradient there; nothing is trained.

    Memory: one gradient per task, in float32 on the CPU, beside what an update takes: it asks as many at once.

    Args:
        setup: teachers, records and the sampling grid.
        learner: the student as it starts.
        levels: noise levels K, spread over the grid from pure noise to its last step.
        records: of each task, spread over its own, all of one size; fewer if there are fewer.
        seed: of the noise.

    Raises:
        ValueError: for more levels than the grid has steps, or several processes.
    """
    if levels > setup.rollout_steps:
        raise ValueError(f"{levels} noise levels of a grid of {setup.rollout_steps} steps")
    if learner.processes.count > 1:
        raise ValueError("a map is made by one process")
    places = torch.linspace(0, setup.rollout_steps - 1, levels).round().long()
    asked = {task: _states(setup, learner, task, places, records, seed) for task in setup.teacher_of}
    disagreement = {task: _disagreement(setup, learner, *states) for task, states in asked.items()}
    pulls: dict[str, list[float]] = {task: [] for task in asked}
    conflict: dict[str, list[float]] = {f"{a} / {b}": [] for a, b in itertools.combinations(asked, 2)}
    for level in range(levels):
        gradients = {task: _gradient(setup, learner, task, level, *states) for task, states in asked.items()}
        for task, gradient in gradients.items():
            pulls[task].append(float(gradient.norm()))
        for a, b in itertools.combinations(asked, 2):
            conflict[f"{a} / {b}"].append(float(torch.cosine_similarity(gradients[a], gradients[b], dim=0)))
    _, sigmas, _ = next(iter(asked.values()))
    return TeacherMap(sigmas.tolist(), disagreement, setup.teacher_of, pulls, conflict, records)


def _states(
    setup: Distillation, learner: Learner, task: str, places: Tensor, records: int, seed: int
) -> tuple[Tensor, Tensor, Condition]:
    """The student's states at some places of the grid, (B, K, N, C), their noise levels (K,), and the conditions."""
    rows = setup.encoded.rows_by_task()[task]
    groups = setup.encoded.shape_groups(rows)
    group = max(groups, key=len)
    picked = [rows[group[i * len(group) // min(records, len(group))]] for i in range(min(records, len(group)))]
    condition = setup.encoded.condition(picked, learner.device)
    size = setup.encoded.size(picked[0])
    noise = seeded_noise([seed + i for i in range(len(picked))], setup.backbone.latent_shape(*size), learner.device)
    grid = setup.grid(*size)
    found = []
    for part in _parts(learner, len(picked)):
        own = condition.rows(part), places.expand(len(part), -1)
        with learner.precision():
            found.append(states_on_the_way(setup.path(learner.field), noise[part], grid, own[1], own[0]))
    return torch.cat(found), grid[places], condition


def _parts(learner: Learner, count: int) -> Sequence[Tensor]:
    """So many samples in parts, each of as many as an update asks at once."""
    return torch.arange(count, device=learner.device).split(samples_at_once(learner.spec, 1))


@torch.no_grad()
def _disagreement(
    setup: Distillation, learner: Learner, states: Tensor, sigmas: Tensor, condition: Condition
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in setup.teachers}
    for level, sigma in enumerate(sigmas):
        apart, size = dict.fromkeys(found, 0.0), 0.0
        for part in _parts(learner, len(states)):
            z, own = states[part, level], condition.rows(part)
            at = sigma.expand(len(z)).to(z)
            with learner.precision():
                mine = learner.field(z, at, own).float()
                size += float(mine.square().sum())
                for name, teacher in setup.teachers.items():
                    apart[name] += float((teacher(z, at, own).float() - mine).square().sum())
        for name, squares in apart.items():
            found[name].append(math.sqrt(squares / max(size, 1e-24)))
    return found


def _gradient(
    setup: Distillation, learner: Learner, task: str, level: int, states: Tensor, sigmas: Tensor, condition: Condition
) -> Tensor:
    """A task's gradient at one noise level, all weights in a row, float32 on the CPU."""
    teacher = setup.teachers[setup.teacher_of[task]]
    for part in _parts(learner, len(states)):
        z, own = states[part, level], condition.rows(part)
        at = sigmas[level].expand(len(z)).to(z)
        with learner.precision():
            with torch.no_grad():
                wanted = teacher(z, at, own).to(z)
            with learner.field.active():
                velocity = setup.backbone.velocity(learner.field.network, z, at, own)
                learner.backward(velocity_matching_loss(velocity, wanted).sum() / len(states))
    gradient = torch.cat([_flat(p) for p in learner.parameters])
    learner.optimizer.zero_grad(set_to_none=True)
    return gradient


def _flat(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return (torch.zeros_like(parameter) if gradient is None else gradient).detach().float().flatten().cpu()


# ---------------------------------------------------------------------------------------------------------------- plots


def plot_map(found: TeacherMap) -> bytes:
    """A PNG: a panel per task with every teacher's disagreement, its own drawn full, and one with the cosines."""
    tasks = list(found.disagreement)
    figure = Figure(figsize=(3.2 * (len(tasks) + 1), 3.2), layout="constrained")
    panels = figure.subplots(1, len(tasks) + 1)
    for axes, task in zip(panels, tasks, strict=False):
        for teacher, values in found.disagreement[task].items():
            own = teacher == found.teacher_of[task]
            label = f"{teacher} (its own)" if own else teacher
            axes.plot(found.sigmas, values, marker="o", linestyle="-" if own else ":", label=label)
        axes.set(title=task, xlabel="sigma (1 = noise)", ylabel="velocity against the student's", ylim=(0, None))
    for pair, values in found.conflict.items():
        panels[-1].plot(found.sigmas, values, marker="o", label=pair)
    panels[-1].axhline(0, color="0.7", linewidth=0.8)
    panels[-1].set(title="how tasks pull", xlabel="sigma (1 = noise)", ylabel="cosine of gradients", ylim=(-1.05, 1.05))
    for axes in panels:
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
