"""How far the student's path from noise to picture leaves its teacher's, and what fewer sampling steps cost.

Both start from the same noise and follow the sampling grid by Euler steps. The drift at a noise level is the root mean
square distance of the two states there. The velocity error is taken at the student's own states, where it will be
asked in use (arXiv 2606.27377 distils on-policy for this reason): root mean square of its velocity minus the
teacher's, as a share of the teacher's. Where the teacher is drawn in more steps than the student, it goes from state to
state by small steps of its own, and its velocity is its mean velocity over the interval. Units are those of the
latents, whose noise has root mean square 1.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from danceopd.data.encoded import EncodedRecords
from danceopd.flow.displacement import SmallSteps, average_velocity
from danceopd.flow.fields import Field
from danceopd.flow.sampling import seeded_noise

STUDENT, TEACHER = "student", "teacher"
_SIDES: dict[str, dict[str, Any]] = {
    STUDENT: {"linestyle": "-", "marker": "o"},
    TEACHER: {"linestyle": "--", "marker": "s", "color": "0.45"},
    "base": {"linestyle": ":", "marker": "^", "color": "0.7"},  # where it is not the teacher itself
}


@dataclass(frozen=True)
class PathDrift:
    """Two paths over one sampling grid of S steps, averaged over the records.

    Attributes:
        sigmas: noise levels of the states, (S + 1,), falling to 0.
        drift: distance of the two paths' states there; 0 at the noise they share.
        velocity_error: (S,), at the student's states before each step; a share of the teacher's velocity.
        forwards: samples that went through a network for this.
    """

    sigmas: list[float]
    drift: list[float]
    velocity_error: list[float]
    forwards: int


def _mean_square(difference: Tensor) -> Tensor:
    return difference.float().square().mean(dim=(1, 2)).cpu()


@torch.no_grad()
def path_drift(
    student: Field,
    teacher: Field,
    encoded: EncodedRecords,
    seeds: Sequence[int],
    steps: int,
    batch: int,
    small: int = 1,
) -> PathDrift:
    """Follow both paths from the same noise, the teacher's by more steps where it is drawn in more.

    Args:
        student: the field whose path is judged.
        teacher: the field it should follow.
        encoded: N records of one task.
        seeds: N noise seeds.
        steps: Euler steps of the family's own sampling grid.
        batch: samples per forward pass.
        small: the teacher's own Euler steps within each of these; its velocity there is then its mean velocity.
    """
    backbone, how = student.backbone, SmallSteps(small)
    grid = backbone.sigmas(steps, encoded.height, encoded.width)
    levels = how.levels(grid, backbone.sigmas(steps * small, encoded.height, encoded.width))
    apart, errors = torch.zeros(steps + 1), torch.zeros(steps)
    device = next(backbone.transformer.parameters()).device
    shape = backbone.latent_shape(encoded.height, encoded.width)
    groups = encoded.shape_groups(list(range(len(seeds))))
    for rows in (group[start : start + batch] for group in groups for start in range(0, len(group), batch)):
        condition = encoded.condition(rows, device)
        part = [seeds[row] for row in rows]
        ours = seeded_noise(part, shape, device)
        theirs = ours.clone()
        with student.resident(), teacher.resident():
            for step in range(steps):
                inside = levels[step].expand(len(part), -1).to(ours)
                mine = student(ours, inside[:, 0], condition).to(ours)
                wanted = average_velocity(teacher, ours, inside, condition, how)
                errors[step] += (_mean_square(mine - wanted).sqrt() / _mean_square(wanted).sqrt()).sum()
                delta = (grid[step + 1] - grid[step]).to(ours)
                theirs += delta * (wanted if step == 0 else average_velocity(teacher, theirs, inside, condition, how))
                ours += delta * mine
                apart[step + 1] += _mean_square(ours - theirs).sqrt().sum()
    count = len(seeds)
    passes = steps * student.forwards + (2 * steps - 1) * small * teacher.forwards  # at the noise both ask in one place
    return PathDrift(grid.tolist(), (apart / count).tolist(), (errors / count).tolist(), count * passes)


# ---------------------------------------------------------------------------------------------------------------- plots


def plot_paths(drift: dict[str, dict]) -> dict[str, bytes]:
    """PNGs of `metrics.json`'s drift section, by name: `drift`, `velocity_error`, and one `steps-<task>` per task."""
    plots = {}
    for key, label in (("drift", "distance from the teacher's path"), ("velocity_error", "velocity error (share)")):
        figure, axes = _sheet()
        for task, facts in drift.items():
            axes.plot(facts["sigmas"][: len(facts[key])], facts[key], marker="o", markersize=3.5, label=task)
        axes.set(xlabel="sigma (1 = noise, 0 = picture)", ylabel=label, xlim=(1.02, -0.02))
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        plots[key] = _png(figure)
    for task, facts in drift.items():
        figure, axes = _sheet()
        for side, style in _SIDES.items():
            points = [(int(n), figures.get(side)) for n, figures in facts["by_steps"].items()]
            if all(value is None for _, value in points):
                continue
            known = sorted((n, value) for n, value in points if value is not None)
            axes.plot([n for n, _ in known], [v for _, v in known], label=side, markersize=4, **style)
        counts = sorted(map(int, facts["by_steps"]))
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, labels=list(map(str, counts)))
        unit = f" ({facts['unit']})" if facts["unit"] == "dB" else ""
        axes.set(title=task, xlabel="sampling steps", ylabel=facts["metric"] + unit)
        if facts["unit"] == "rate":
            axes.set_ylim(-0.03, 1.03)
        axes.legend(frameon=False)
        plots[f"steps-{task}"] = _png(figure)
    return plots


def _sheet() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.2, 3), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
