"""`danceopd recipe check`: what a recipe will load and take, before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from danceopd.cli.options import SetOption, WorkspaceOption, open_recipe
from danceopd.config.recipe import MERGES, Recipe
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.preflight.outlook import Outlook

recipe_app = typer.Typer(no_args_is_help=True, help="Recipes.")


@recipe_app.callback()
def _recipes() -> None:
    """Recipes."""


@recipe_app.command("check")
def check(
    recipe: Annotated[str, typer.Argument(help="name of a shipped recipe, or a YAML file")],
    overrides: SetOption = [],  # noqa: B006
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that train together")] = 1,
    tflops: Annotated[float, typer.Option(min=0.01, help="operations per second of one GPU as used, in 10^12")] = 300.0,
    workspace: WorkspaceOption = None,
) -> None:
    """Say what a recipe loads, the memory of each GPU, the forwards of an update, and about how long it takes."""
    from danceopd.preflight.at_start import check_start
    from danceopd.preflight.findings import settle
    from danceopd.preflight.outlook import look_ahead, what_is_there
    from danceopd.tracking.mlflow_store import default_tracking_uri

    loaded, place = open_recipe(recipe, overrides, workspace)
    settle(check_start(loaded, None, default_tracking_uri(place)))
    console, rows = Console(), what_is_there(loaded)
    table = Table("loads", "from", "")
    for what, source, lacking in rows:
        table.add_row(what, source, lacking or "")
    console.print(table)
    if loaded.distill.method in MERGES:
        console.print(f"{loaded.distill.method} trains nothing.")
    else:
        ahead = look_ahead(loaded, place, gpus)
        settle(ahead.findings)
        _tell(console, loaded, ahead, gpus, tflops)
    wrong = [f"{what}: {source}: {why}" for what, source, why in rows if why]
    if wrong:
        raise UserError("; ".join(wrong))


def _tell(console: Console, recipe: Recipe, ahead: Outlook, gpus: int, tflops: float) -> None:
    from danceopd.preflight.memory import say_size

    spec = recipe.distill
    update = ahead.forwards * spec.batch
    seconds = spec.steps * update * ahead.operations / (gpus * tflops * 1e12)
    table = Table("takes", "about")
    table.add_row(
        "transformer",
        f"{_large(ahead.parameters)} weights, "
        f"{ahead.tokens[0]} picture and {ahead.tokens[1]} prompt tokens per sample at most",
    )
    table.add_row(
        "memory per GPU",
        f"{say_size(ahead.held + ahead.training.total)}: frozen weights "
        f"{say_size(ahead.held)}, training {ahead.training}",
    )
    if ahead.other is not None:
        mine, other = say_size(ahead.held + ahead.training.total), say_size(ahead.other)
        whole, shared = (other, mine) if spec.parallel == "shard" else (mine, other)
        table.add_row(
            f"of {gpus} GPUs",
            f"each {whole} with parallel: replicate, {shared} with shard; replicate is faster where it fits",
        )
    table.add_row(
        "forwards",
        f"{ahead.forwards:.1f} per sample, {update:,.0f} per update of {spec.batch}, "
        f"{update * spec.steps:,.0f} in {spec.steps:,} updates",
    )
    table.add_row("one forward", f"{_large(ahead.operations)} operations")
    table.add_row(
        "time",
        f"{_duration(seconds)} on {gpus} GPU{'s' * (gpus > 1)} that reach {tflops:g} x 10^12 a "
        "second (--tflops), without encoding, fine-tuned teachers and evaluation",
    )
    console.print(table)
    table = Table("phase", "memory per GPU", "disk")
    for phase in ahead.phases:
        disk = "grows with the data" if phase.disk is None else say_size(phase.disk) if phase.disk else ""
        table.add_row(phase.name, say_size(phase.memory) if phase.memory else "", disk)
    console.print(table)


def _large(number: float) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,.0f}"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(seconds / 60, 0.1):.1f} minutes"
