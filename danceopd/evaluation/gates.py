"""Gates: what a student must keep of its teachers, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from danceopd.config.recipe import Gate, Recipe
from danceopd.evaluation.metrics import metric
from danceopd.evaluation.names import STUDENT
from danceopd.evaluation.scoring import finite, paid

Scores = dict[str, dict[str, dict[str, float | None]]]


_ROUNDING = 1e-9  # a limit such as 0.95 * 0.8 may land above a mean that equals it


def score_of(scores: Scores, field: str, task: str, name: str) -> float | None:
    return finite(scores.get(field, {}).get(task, {}).get(name))


def retention(recipe: Recipe, scores: Scores) -> dict[str, dict[str, dict[str, float | None]]]:
    """The student beside each task's own teacher: both values, ratio and difference; None where undefined."""
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, spec in recipe.tasks.items():
        for name in spec.metrics:
            teacher, student = score_of(scores, spec.teacher, task, name), score_of(scores, STUDENT, task, name)
            table.setdefault(task, {})[name] = _beside(name, teacher, student)
    return table


def _beside(name: str, teacher: float | None, student: float | None) -> dict[str, float | None]:
    ratio, difference = None, None
    if teacher is not None and student is not None:
        difference = student - teacher
        if teacher != 0 and metric(name).unit != "distance":
            ratio = student / teacher
    return {"teacher": teacher, "student": student, "ratio": ratio, "difference": difference}


def gate_limit(gate: Gate, teacher: float) -> float:
    """The least value, in the metric's unit, with which a student holds a gate."""
    return teacher - gate_allowance(gate, teacher)


def gate_allowance(gate: Gate, teacher: float) -> float:
    """How far below its teacher a student may lie and hold the gate, in the metric's unit.

    A share is one of the value's size: of a teacher at -2, `retain: 0.9` allows -2.2, as of one at 2 it allows 1.8.
    """
    if gate.max_drop is not None:
        return gate.max_drop
    assert gate.retain is not None  # a gate has one of the two
    return (1 - gate.retain) * abs(teacher)


def judge(recipe: Recipe, scores: Scores, skipped: Mapping[str, str] = MappingProxyType({})) -> list[dict]:
    """Every gate of the recipe with its limit, the student's value and whether it holds; a `reason` where it has none.

    A value that is missing or not finite, the student's or the teacher's, never holds.
    """
    verdicts = []
    for task, spec in recipe.tasks.items():
        for gate in spec.gates:
            teacher = score_of(scores, spec.teacher, task, gate.metric)
            student = score_of(scores, STUDENT, task, gate.metric)
            limit = None if teacher is None else gate_limit(gate, teacher)
            rule = f"retain {gate.retain}" if gate.retain is not None else f"max_drop {gate.max_drop}"
            held = student is not None and limit is not None and student >= limit - _ROUNDING
            reason = skipped.get(gate.metric)
            if reason is None and (student is None or teacher is None) and paid(gate.metric):
                reason = "the judge gave no readable answer on some pictures"
            verdicts.append(
                {
                    "task": task,
                    "metric": gate.metric,
                    "rule": rule,
                    "limit": limit,
                    "value": student,
                    "passed": held,
                    "reason": reason,
                }
            )
    return verdicts
