"""`danceopd finetune|distill|evaluate|register`: one step of the chain each, with what it lacks made first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from danceopd.cli.options import RecipeOption, SetOption, StoreOption, WorkspaceOption, open_recipe
from danceopd.config.recipe import Recipe
from danceopd.errors import UserError


def finetune(
    teacher: Annotated[str, typer.Argument(help="a teacher of the recipe")],
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
) -> None:
    """Fine-tune one teacher and prove it better than the base."""
    from danceopd import steps

    loaded, place = open_recipe(recipe, overrides, workspace)
    base, data = steps.resolve_base(loaded, place), steps.build_data(loaded, place)
    product = steps.finetune_teacher(loaded, teacher, base, data, place)
    _tell(f"{product.folder}  {product.facts['scores']}")


def _tell(text: str) -> None:
    """One line of result; of several processes the first speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)


def _student(loaded: Recipe, place: Path, tracking_uri: str | None = None):
    from danceopd import steps

    base, data = steps.resolve_base(loaded, place), steps.build_data(loaded, place)
    teachers = {n: steps.finetune_teacher(loaded, n, base, data, place, tracking_uri) for n in loaded.teachers}
    return base, data, teachers, steps.distill_student(loaded, base, data, teachers, place)


def distill(recipe: RecipeOption = "world", overrides: SetOption = [], workspace: WorkspaceOption = None) -> None:  # noqa: B006
    """Distill the student; missing teachers are made first."""
    loaded, place = open_recipe(recipe, overrides, workspace)
    *_, student = _student(loaded, place)
    _tell(f"{student.pipeline}  loss {student.facts['loss']}")


def evaluate(recipe: RecipeOption = "world", overrides: SetOption = [], workspace: WorkspaceOption = None) -> None:  # noqa: B006
    """Evaluate base, teachers and student on held-out records; missing products are made first."""
    from danceopd import steps

    loaded, place = open_recipe(recipe, overrides, workspace)
    evaluation = steps.evaluate_student(loaded, *_student(loaded, place), place)
    verdict = "holds all its gates" if evaluation.facts["passed"] else "fails a gate"
    _tell(f"{evaluation.folder / 'report.html'}: the student {verdict}")


def register(
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    tracking_uri: StoreOption = None,
) -> None:
    """Register the student in MLflow if its gates hold; missing products are made first."""
    from danceopd import steps

    loaded, place = open_recipe(recipe, overrides, workspace)
    base, data, teachers, student = _student(loaded, place, tracking_uri)
    evaluation = steps.evaluate_student(loaded, base, data, teachers, student, place)
    lineage = steps.lineage(loaded, base, data, teachers, student)
    result = steps.register_student(loaded, student, evaluation, lineage, tracking_uri, place)
    if not result.registered:
        raise UserError("not registered: " + "; ".join(result.reasons))
    typer.echo(f"{loaded.register_as.model} version {result.version} ({', '.join(result.alias)})")
    for reason in result.reasons:
        typer.echo(reason)
