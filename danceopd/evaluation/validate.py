"""Validation while the student trains: how far it is from what its gates allow."""

from __future__ import annotations

from pathlib import Path

from danceopd.config.recipe import Gate, Recipe
from danceopd.data.encoded import EncodedRecords
from danceopd.data.records import Record
from danceopd.errors import UserError
from danceopd.evaluation.gates import gate_allowance
from danceopd.evaluation.metrics.tools import Tools
from danceopd.evaluation.samplings import Samplings
from danceopd.evaluation.scoring import score_means, skipped_metrics
from danceopd.flow.fields import Field
from danceopd.training.processes import ALONE, Processes
from danceopd.training.selection import Validation


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
        cache: folder for the judge's answers, or None.
        samplings: how each field is drawn; default: as the recipe says.
        processes: those that draw together; every one asks about the same fields, and gets the same answer.

    Raises:
        UserError: if a gate is on a metric that cannot be measured on this machine.
    """

    def __init__(
        self,
        recipe: Recipe,
        teachers: dict[str, Field],
        sets: dict[str, tuple[list[Record], EncodedRecords]],
        cache: Path | None = None,
        samplings: Samplings | None = None,
        processes: Processes = ALONE,
    ):
        self._samplings, self._processes = samplings, processes
        self._recipe, self._teachers, self._sets = recipe, teachers, sets
        self._taught: dict[str, dict[str, float]] = {}
        self._tools = Tools(recipe.evaluate, cache=cache)
        gated = [(task, gate.metric) for task, spec in recipe.tasks.items() for gate in spec.gates]
        skipped = skipped_metrics({name: None for _, name in gated}, self._tools)
        for task, name in gated:
            if name in skipped:
                raise UserError(
                    f"distill.select: {task} has a gate on {name}, which cannot be measured here: "
                    f"{skipped[name]}; mend that, or remove select"
                )

    def _means(self, name: str, field: Field, task: str) -> dict[str, float]:
        records, encoded = self._sets[task]
        known = self._samplings or Samplings(self._recipe, lambda: field.backbone.encode_prompts([""])[0])
        field, spec = known.drawn(name, field)
        metrics = self._recipe.tasks[task].metrics
        return score_means(field, encoded, records, metrics, spec, self._tools, self._processes)

    def __call__(self, student: Field) -> Validation:
        margins, figures = [], {}
        for task, spec in self._recipe.tasks.items():
            if task not in self._taught:
                self._taught[task] = self._means(spec.teacher, self._teachers[spec.teacher], task)
            figures[task] = self._means("student", student, task)
            taught = self._taught[task]
            margins += [gate_margin(gate, figures[task][gate.metric], taught[gate.metric]) for gate in spec.gates]
        return Validation(min(margins), figures)
