"""What can be known before anything is trained: one list, for `recipe check`, the pipeline's first step, every run.

What a recipe alone tells (names, ranges, a batch below the number of tasks) is refused when it is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from danceopd.config.recipe import BaseTeacher, ChampionTeacher, Recipe
from danceopd.preflight.findings import Finding

_SQLITE = "sqlite:///"
Counts = Mapping[str, Mapping[str, int]]


def check_start(recipe: Recipe, counts: Counts | None, store: str) -> list[Finding]:
    """Everything that would end a run after its training and can be told before it.

    Args:
        recipe: the run.
        counts: the dataset's records by task and split; None: not known, unless the recipe generates them.
        store: address of the MLflow store.
    """
    if counts is None and recipe.data.world is not None:
        counts = {task: {str(split): size for split, size in of.items()} for task, of in recipe.data.world.items()}
    return ([] if counts is None else check_splits(recipe, counts)) + check_store(store)


def check_splits(recipe: Recipe, counts: Counts) -> list[Finding]:
    """Tasks without records in a split that the run reads: to train, to prove teachers and select by, to evaluate."""
    wanted = {recipe.evaluate.split: "the run is evaluated (evaluate.split)"}
    if recipe.distill.select is not None:
        wanted["val"] = "the student is selected (distill.select)"
    if any(not isinstance(teacher, BaseTeacher | ChampionTeacher) for teacher in recipe.teachers.values()):
        wanted.setdefault("val", "")
    found = []
    for split, why in wanted.items():
        for task, spec in recipe.tasks.items():
            teacher = recipe.teachers[spec.teacher]
            if not why and isinstance(teacher, BaseTeacher | ChampionTeacher):
                continue
            if not counts.get(task, {}).get(split):
                told = why or f"teacher {spec.teacher!r} is measured against the base"
                text = f"task {task!r}: no records in split {split!r}, on which {told}; add some before it trains"
                found.append(Finding("error", "splits", text))
    return found


def check_store(store: str) -> list[Finding]:
    """Whether an MLflow store in a file can be written; a server that is away costs no run anything."""
    if not store.startswith(_SQLITE):
        return []
    path = Path(store.removeprefix(_SQLITE))
    place = next((parent for parent in path.parents if parent.exists()), Path("/"))
    if path.is_dir() or not place.is_dir():
        why = "is a folder" if path.is_dir() else f"lies below {place}, which is a file"
    elif not os.access(path if path.exists() else place, os.W_OK):
        why = "cannot be written"
    else:
        return []
    text = f"MLflow store {path}: {why}; name another (--workspace, --tracking-uri or MLFLOW_TRACKING_URI)"
    return [Finding("error", "store", text)]
