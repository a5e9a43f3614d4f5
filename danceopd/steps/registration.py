"""The step that registers the student in MLflow, and the ones that move the champion."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.config.recipe import Recipe
from danceopd.errors import GatesFailed
from danceopd.files import read_json
from danceopd.steps.champion import measure_champion
from danceopd.steps.evaluation import lineage
from danceopd.steps.run import Run
from danceopd.tracking import recording
from danceopd.tracking.journal import FAILED, FINISHED, end_run
from danceopd.workspace import Product, store_of

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from danceopd.registry.register import Registration

log = logging.getLogger(__name__)


def register_student(run: Run, teachers: dict[str, Product], student: Product, evaluation: Product) -> Registration:
    """Register the student in MLflow if its gates hold; the default store lies in the workspace.

    Where the champion's figures cannot be compared with the student's, it is measured anew (`measure_champion`). What
    the workspace's own store has said before is not asked again until it changes.

    Raises:
        UserError: as `registry.register_student` does.
    """
    from danceopd.registry import register, remembered
    from danceopd.tracking import delivery

    uri, workspace, comes_from = run.store, Path(run.workspace), lineage(run, teachers, student)
    asked = {"recipe": run.recipe.model_dump(mode="json"), "lineage": comes_from, "evaluation": evaluation.digest}
    delivery.deliver(workspace, uri)  # so that the version can name what it comes from
    if (known := remembered.recall(workspace, uri, asked)) is not None:
        log.info("%s version %s: as before", run.recipe.register_as.model, known.version)
        return known
    champion = measure_champion(run, student, evaluation)
    done = register.register_student(
        run.recipe, student.folder, evaluation.folder, comes_from, uri, workspace, champion
    )
    end_run(workspace, FINISHED if done.registered else FAILED, recording.by_task(evaluation.facts["scores"]))
    delivery.deliver(workspace, uri)
    if done.registered:
        remembered.keep(workspace, uri, asked, done)
    return done


def require_registered(registration: Registration, evaluation: Product) -> None:
    """Check that a student was registered, be it as challenger only.

    Raises:
        GatesFailed: if it was not, in one line: which gates it fails and by how much.
    """
    from danceopd.evaluation.shortfalls import say_failed_gates

    if not registration.registered:
        lacks = say_failed_gates(read_json(evaluation.folder / "metrics.json")) or registration.reasons
        raise GatesFailed("not registered: " + "; ".join(lacks))


def move_champion(
    recipe: Recipe, action: str, version: str, force: bool, tracking_uri: str | None, workspace: Path
) -> dict:
    """Promote a version of the recipe's model, or roll back.

    Returns:
        The outcome in one line (`said`) and every version as Markdown (`versions`).

    Raises:
        UserError: as `registry.move_champion` does.
    """
    from danceopd.registry import champion
    from danceopd.registry.versions import open_model

    model = open_model(store_of(tracking_uri, workspace), recipe.register_as.model)
    said = champion.say_champion(model.name, *champion.move_champion(model, recipe, action, version, force))
    log.info(said)
    return {"said": said, "versions": model.markdown()}


def registration_facts(registration: Registration) -> dict:
    """A registration as plain data."""
    return asdict(registration)
