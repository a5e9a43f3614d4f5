"""What each step writes into its journal: settings, data, curves, sample grids, models, the machine's load."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from danceopd.config.recipe import Recipe
from danceopd.tracking.journal import DatasetUse, Journal, ending, open_journal
from danceopd.tracking.system import SystemWatch

TRAINING, EVALUATION = "training", "evaluation"


def begin(
    recipe: Recipe,
    workspace: Path,
    product: str,
    title: str,
    params: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    context: str = TRAINING,
) -> Journal:
    """Open a step's journal and say what it is about.

    Args:
        recipe: names experiment and dataset.
        workspace: folder all steps share.
        product: name of the journal.
        title: of the run in lists.
        params: settings that decide this step.
        data: facts of the dataset it reads, or None.
        context: what it reads it for, training or evaluation.
    """
    journal = open_journal(workspace, product)
    journal.start(title, recipe.register_as.experiment, params, {"recipe": recipe.digest(), "recipe_name": recipe.name})
    if data is not None:
        source = {name: data[name] for name in ("dvc", "git") if data.get(name)} or {
            "folder": str(data["dataset"]).removeprefix("../../")
        }
        journal.dataset(DatasetUse(recipe.name, data["content"], source, context, data["counts"]))
    return journal


def entry(journal: Journal, name: str, found: Mapping[str, Any]) -> None:
    """One entry of a training history: figures by step, and a validated state as a model with its scores."""
    step = found["step"]
    values = _losses("loss", found["loss"]) | {name: found.get(name) for name in ("grad_norm", "forwards_per_sample")}
    journal.points(step, values)
    if validated := found.get("validation"):
        state = f"{journal.folder.name if journal.folder else ''}-step-{step}"
        journal.model(f"{name}-step-{step}", state, step, {"best_step": found["best_step"]})
        scores = {f"validation/{key}": value for key, value in by_task(validated["figures"]).items()}
        journal.points(step, {"validation/margin": validated["score"]} | scores, model=state)


def _losses(name: str, loss: float | Mapping[str, float]) -> dict[str, float | None]:
    """One loss, or one per task."""
    return {f"{name}/{task}": v for task, v in loss.items()} if isinstance(loss, Mapping) else {name: loss}


def model_made(journal: Journal, name: str, folder: Path, digest: str, facts: Mapping[str, Any]) -> None:
    """A teacher or student that is finished, with what was measured of it."""
    step = facts.get("steps", 0)
    journal.model(name, digest, step, {"folder": "/".join(folder.parts[-2:]), "kind": facts.get("kind", "student")})
    scores = {
        f"{who}/{task}/{key}": value
        for task, row in facts.get("scores", {}).items()
        for who, of in row.items()
        for key, value in of.items()
    }
    journal.points(step, scores | _losses("final_loss", facts.get("loss", {})), model=digest)


def evaluated(journal: Journal, metrics: Mapping[str, Any], folder: Path, student: str) -> None:
    """An evaluation: the student's figures as its model's, those of the others beside them, and the report."""
    journal.uses(student)
    for field, tasks in metrics["scores"].items():
        values = by_task(tasks)
        if field == "student":
            journal.points(0, values, model=student)
        else:
            journal.points(0, {f"{field}/{name}": value for name, value in values.items()})
    for name in ("report.html", "report.md", "metrics.json"):
        if (folder / name).is_file():
            journal.file(folder / name, EVALUATION)


def by_task(scores: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """A field's scores as {task/metric: value}."""
    return {f"{task}/{name}": value for task, row in scores.items() for name, value in row.items()}


@contextmanager
def recorded(workspace: Path, product: str) -> Iterator[None]:
    """Note how a step ended and, if it takes a while, what it did to the machine."""
    with ending(open_journal(workspace, product)), SystemWatch(open_journal(workspace, product)):
        yield


def recorder(journal: Journal, name: str) -> Callable[[dict], None]:
    """What takes a training's history down, entry by entry."""
    return functools.partial(entry, journal, name)
