"""What decides an evaluation's figures besides the field that is measured: two that share it can be compared.

What a field was trained on is no part of it. A student is drawn without guidance, whatever its teachers were given, so
guidance is none either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

from danceopd.config.recipe import EvaluateRecipe, Recipe
from danceopd.data.records import Record, content_hash
from danceopd.data.splits import group_records
from danceopd.evaluation.judge import JUDGED
from danceopd.evaluation.metrics import metric
from danceopd.evaluation.metrics.tools import lacks, weights_of
from danceopd.evaluation.names import JUDGE
from danceopd.files import content_key


def note_conditions(
    recipe: Recipe, records: Mapping[str, list[Record]], skipped: Container[str] = ()
) -> dict[str, Any]:
    """The conditions of an evaluation as `metrics.json` keeps them.

    Args:
        recipe: its picture size and its `evaluate` section; its tasks name the metrics.
        records: the held-out records of every task, as they are drawn.
        skipped: metrics that are not measured.
    """
    spec = recipe.evaluate
    names = [name for task in recipe.tasks.values() for name in task.metrics if name not in skipped]
    return {
        "held_out": {task: hash_records(found) for task, found in records.items()},
        "size": [recipe.model.height, recipe.model.width],
        "steps": spec.steps,
        "seed": spec.seed,
        "tools": tools_of(spec, names),
    }


def tools_of(spec: EvaluateRecipe, metrics: Iterable[str]) -> dict[str, str | None]:
    """What metrics look with, by content: the networks' weights, the judge's model and questions; None: not there."""

    def identity(tool: str) -> str | None:
        if tool == JUDGE:
            return content_key(spec.judge.model, spec.judge.parameters, JUDGED) if spec.judge is not None else None
        return None if lacks(tool, spec) else weights_of(tool, spec)

    return {tool: identity(tool) for tool in sorted({tool for name in metrics for tool in metric(name).tools})}


def hash_records(records: list[Record]) -> str:
    """SHA-256 of what is drawn and scored of records; the split they lie in is no part of it."""
    return content_hash(replace(record, split="") for record in records)


def groups_of(records: list[Record]) -> list[str]:
    """The name of each record's group: those that share a picture."""

    def name(data: bytes | None) -> str | None:
        return None if data is None else hashlib.sha256(data).hexdigest()[:16]

    return group_records([record.id for record in records], [(name(r.source), name(r.target)) for r in records])
