"""Validation while the student trains: how far it is from what its gates allow."""

from __future__ import annotations

from danceopd.data.encoded import EncodedRecords
from danceopd.data.records import Record
from danceopd.distill import Validation
from danceopd.evaluation.evaluate import gate_allowance, score_records
from danceopd.fields import Field
from danceopd.recipe import Gate, Recipe


def gate_margin(gate: Gate, value: float, teacher: float) -> float:
    """How far a value lies above its gate's limit, as a share of what the gate allows below the teacher's value."""
    allowed = gate_allowance(gate, teacher)
    return (value - teacher + allowed) / (allowed or 1.0)


class GateValidator:
    """Scores a student on validation records by the smallest margin over all gates of the recipe.

    Args:
        recipe: tasks, metrics, gates, and how pictures are drawn.
        teachers: frozen fields by name; each is scored once, at the first call.
        sets: task -> its validation records, plain and encoded.
    """

    def __init__(
        self, recipe: Recipe, teachers: dict[str, Field], sets: dict[str, tuple[list[Record], EncodedRecords]]
    ):
        self._recipe, self._teachers, self._sets = recipe, teachers, sets
        self._taught: dict[str, dict[str, float]] = {}

    def _means(self, field: Field, task: str) -> dict[str, float]:
        records, encoded = self._sets[task]
        return score_records(field, encoded, records, self._recipe.tasks[task].metrics, self._recipe.evaluate).means

    def __call__(self, student: Field) -> Validation:
        margins, figures = [], {}
        for task, spec in self._recipe.tasks.items():
            if task not in self._taught:
                self._taught[task] = self._means(self._teachers[spec.teacher], task)
            figures[task] = self._means(student, task)
            taught = self._taught[task]
            margins += [gate_margin(gate, figures[task][gate.metric], taught[gate.metric]) for gate in spec.gates]
        return Validation(min(margins), figures)
