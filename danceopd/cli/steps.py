"""`danceopd finetune|map|distill|evaluate|register`: one step of the chain each, with what it lacks made first."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from danceopd.cli.options import PLAIN_WIDTH, RecipeOption, SetOption, StoreOption, WorkspaceOption, open_recipe
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

    teachers = _teachers(run)
    return teachers, steps.distill_student(run, teachers)


def _teachers(run: Run) -> dict[str, Product]:
    from danceopd import steps

    return {name: steps.finetune_teacher(run, name) for name in run.recipe.teachers}


def map_(
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    levels: Annotated[int, typer.Option(min=2, help="noise levels of the student's path that are asked at")] = 4,
    records: Annotated[int, typer.Option(min=1, help="training records of each task")] = 8,
) -> None:
    """Show where teachers and student disagree before training, and how tasks pull; missing teachers are made first."""
    from rich.console import Console

    from danceopd import steps

    run = steps.open_run(*open_recipe(recipe, overrides, workspace))
    made = steps.map_teachers(run, _teachers(run), levels, records)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    for table in _map_tables(made.facts):
        console.print(table)
    _tell(str(made.folder / "map.png"))


def _map_tables(facts: dict[str, Any]) -> list[Table]:
    """What a map says: teachers against the student, then pairs of tasks."""
    levels = [f"{sigma:.2f}" for sigma in facts["sigmas"]]
    apart = Table("task", "teacher", *levels, title="velocity against the student's, by sigma")
    pulls = Table("tasks", *levels, title="cosine of gradients, by sigma")
    for task, teachers in facts["disagreement"].items():
        for teacher, values in teachers.items():
            own = " (its own)" if teacher == facts["teacher_of"][task] else ""
            apart.add_row(task, f"{teacher}{own}", *(f"{value:.3g}" for value in values))
    for pair, values in facts["conflict"].items():
        pulls.add_row(pair, *(f"{value:+.2f}" for value in values))
    return [apart, pulls]


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
