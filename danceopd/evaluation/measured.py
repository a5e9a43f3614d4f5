"""What an evaluation measured, as a typed value: read back from its folder, or from a registered version's run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from danceopd.config.recipe import EvaluateRecipe, Recipe
from danceopd.config.sampling import Sampling
from danceopd.errors import UserError
from danceopd.evaluation.names import STUDENT
from danceopd.files import read_json

METRICS, VALUES, REPORT = "metrics.json", "values.json", "report.html"
CONDITIONS = ("held_out", "size", "steps", "seed", "tools")


@dataclass(frozen=True)
class Measured:
    """One field's figures in an evaluation.

    Attributes:
        metrics: the evaluation's `metrics.json`.
        values: its `values.json`, the figures record by record; None where they were not kept.
        field: which of the evaluation's fields this speaks of.
    """

    metrics: Mapping[str, Any]
    values: Mapping[str, Any] | None
    field: str = STUDENT

    @property
    def scores(self) -> Mapping[str, Mapping[str, float | None]]:
        """{task: {metric: mean}} of this field."""
        return self.metrics["scores"][self.field]

    @property
    def by_record(self) -> tuple[Mapping[str, list[str]], Mapping[str, Mapping[str, list]]] | None:
        """Record ids by task and this field's values in their order, or None where they were not kept."""
        return None if self.values is None else (self.values["ids"], self.values[self.field])

    @property
    def gates(self) -> list[dict[str, Any]]:
        """The verdict on every gate of the evaluation's recipe."""
        return self.metrics.get("gates", [])

    @property
    def sampling(self) -> Sampling | None:
        """How the field was drawn; None where that was not noted."""
        known = self.metrics.get("sampling", {}).get(self.field)
        return None if known is None else Sampling.model_validate(known)

    @property
    def own_tasks(self) -> set[str]:
        """The tasks whose gates were judged, benchmarks aside."""
        return {gate["task"] for gate in self.gates} - set(self.metrics.get("benchmarks", {}))

    @property
    def statistics(self) -> dict[str, Any]:
        """How the evaluation's intervals are drawn: `confidence`, `resamples` and `seed`."""
        default = EvaluateRecipe()
        plain = {"confidence": default.confidence, "resamples": default.resamples, "seed": default.seed}
        known = self.metrics.get("statistics", {}) | {"seed": self.metrics.get("seed")}
        return plain | {name: value for name, value in known.items() if value is not None}

    @property
    def conditions(self) -> dict[str, Any]:
        """What two evaluations must share for their figures to be compared; None what an older one did not note."""
        return {name: self.metrics.get(name) for name in CONDITIONS}

    @property
    def canaries(self) -> Mapping[str, Any] | None:
        """What the judge said of its canaries in this evaluation, or None where it was not asked."""
        return self.metrics.get("canaries")

    @property
    def groups(self) -> Mapping[str, list[str]] | None:
        """The group of each record by task (those that share a picture), or None where that was not kept."""
        return None if self.values is None else self.values.get("groups")

    def beside(self, other: Measured, model: str, number: str) -> Measured:
        """This, and a registered version as it was measured in the same way as another field of the evaluation."""
        name = f"{model} version {number}"
        versions = self.metrics.get("versions", {}) | {name: {"model": model, "version": number}}
        metrics = {**self.metrics, "scores": {**self.metrics["scores"], name: other.scores}, "versions": versions}
        values = self.values
        if values is not None and other.by_record is not None:
            values = {**values, name: other.in_order(values["ids"])}
        return replace(self, metrics=metrics, values=values)

    def in_order(self, ids: Mapping[str, list[str]]) -> dict[str, dict[str, list]]:
        """This field's values in the order of these record ids, of the tasks whose records they are."""
        kept, found = self.by_record, {}
        assert kept is not None  # who asks has looked
        ours, values = kept
        for task, wanted in ids.items():
            place = {record: row for row, record in enumerate(ours.get(task, []))}
            if set(wanted) == set(place):
                found[task] = {name: [row[place[i]] for i in wanted] for name, row in values[task].items()}
        return found

    def version(self, model: str, number: str | None) -> Measured | None:
        """A registered version as this evaluation measured it, or None if it was no teacher in that run."""
        wanted = {"model": model, "version": number}
        field = next((name for name, of in self.metrics.get("versions", {}).items() if of == wanted), None)
        return None if field is None else replace(self, field=field)

    def failed_gates(self) -> list[str]:
        """One line per gate that does not hold, with task, metric, figures and interval; empty if all hold."""
        lines = [
            f"{g['task']}.{g['metric']} is {figure(g['value'])}, its gate is {figure(g['limit'])} ({g['rule']})"
            + (f", {self.interval(*g['interval'])}" if g.get("interval") else "")
            + (f": {g['reason']}" if g.get("reason") else "")
            for g in self.gates
            if not g["passed"]
        ]
        return lines if lines or self.metrics["passed"] else ["the evaluation did not pass"]

    def interval(self, low: float, high: float) -> str:
        """An interval in words, with its confidence."""
        return f"{100 * self.statistics['confidence']:g} % interval {figure(low)} to {figure(high)}"


def figure(value: float | None) -> str:
    """A figure in a sentence."""
    return "unknown" if value is None else f"{value:.4g}"


def read_evaluation(folder: Path, recipe: Recipe) -> Measured:
    """The student's figures in an evaluation's folder.

    Raises:
        UserError: if they are missing, or a gate of the recipe was not judged.
    """
    path = Path(folder) / METRICS
    metrics = read_json(path)
    if not isinstance(metrics, dict) or "gates" not in metrics or STUDENT not in metrics.get("scores", {}):
        raise UserError(f"{path}: no scores of a student, or no gates; evaluate the student again")
    judged = {(gate["task"], gate["metric"]) for gate in metrics["gates"]}
    for task, spec in recipe.with_benchmarks().tasks.items():
        for gate in spec.gates:
            if (task, gate.metric) not in judged:
                raise UserError(f"{path}: the recipe's gate on {task}.{gate.metric} was not judged; evaluate again")
    values = Path(folder) / VALUES
    return Measured(metrics, read_json(values) if values.is_file() else None)
