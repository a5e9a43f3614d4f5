"""`danceopd finetune|distill|evaluate|register`: one step of the chain each, with what it lacks made first."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from danceopd.cli.options import RecipeOption, SetOption, StoreOption, WorkspaceOption, open_recipe
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.steps import Product, Run


def finetune(
    teacher: Annotated[str, typer.Argument(help="a teacher of the recipe")],
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
) -> None:
    """Fine-tune one teacher and prove it better than the base."""
    from danceopd import steps

    loaded, place = open_recipe(recipe, overrides, workspace)
    product = steps.finetune_teacher(steps.open_run(loaded, place), teacher)
    _tell(f"{product.folder}  {product.facts['scores']}")


def _tell(text: str) -> None:
    """One line of result; of several processes the first speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)


def _student(run: Run) -> tuple[dict[str, Product], Product]:
    """The run's teachers and student, made where they are missing."""
    from danceopd import steps

    teachers = {name: steps.finetune_teacher(run, name) for name in run.recipe.teachers}
    return teachers, steps.distill_student(run, teachers)


def distill(recipe: RecipeOption = "world", overrides: SetOption = [], workspace: WorkspaceOption = None) -> None:  # noqa: B006
    """Distill the student; missing teachers are made first."""
    from danceopd import steps

    _, student = _student(steps.open_run(*open_recipe(recipe, overrides, workspace)))
    _tell(f"{student.pipeline}  loss {student.facts['loss']}")


def evaluate(recipe: RecipeOption = "world", overrides: SetOption = [], workspace: WorkspaceOption = None) -> None:  # noqa: B006
    """Evaluate base, teachers and student on held-out records; missing products are made first."""
    from danceopd import steps

    run = steps.open_run(*open_recipe(recipe, overrides, workspace))
    evaluation = steps.evaluate_student(run, *_student(run))
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

    run = steps.open_run(*open_recipe(recipe, overrides, workspace), tracking_uri)
    teachers, student = _student(run)
    evaluation = steps.evaluate_student(run, teachers, student)
    result = steps.register_student(run, teachers, student, evaluation)
    if not result.registered:
        raise UserError("not registered: " + "; ".join(result.reasons))
    typer.echo(f"{run.recipe.register_as.model} version {result.version} ({', '.join(result.alias)})")
    for reason in result.reasons:
        typer.echo(reason)
