"""`danceopd registry ...`: which students there are, how they compare, and which of them serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from danceopd.cli.options import RecipeOption, SetOption, StoreOption, WorkspaceOption, open_recipe

if TYPE_CHECKING:
    from danceopd.config.recipe import Recipe
    from danceopd.registry.versions import RegisteredModel

registry_app = typer.Typer(no_args_is_help=True, help="The registered students of a recipe, and which of them serves.")
VersionArgument = Annotated[str, typer.Argument(help="a version's number, or challenger, champion, previous")]


def _registry(
    recipe: str, overrides: list[str], workspace: Path | None, tracking_uri: str | None
) -> tuple[Recipe, RegisteredModel]:
    from danceopd.registry.versions import open_model
    from danceopd.tracking.mlflow_store import default_tracking_uri

    loaded, place = open_recipe(recipe, overrides, workspace)
    return loaded, open_model(tracking_uri or default_tracking_uri(place), loaded.register_as.model)


@registry_app.command("list")
def registry_list(
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    tracking_uri: StoreOption = None,
) -> None:
    """Every version with its aliases, and why it became champion or did not."""
    from datetime import UTC, datetime

    _, model = _registry(recipe, overrides, workspace, tracking_uri)
    table = Table("version", "aliases", "registered (UTC)", "student", "decision", title=model.name)
    for line in model.lines():
        when = datetime.fromtimestamp(line.created / 1000, UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(line.version, ", ".join(line.aliases), when, line.tags.get("student", "")[:12], line.decision)
    Console().print(table)


@registry_app.command("compare")
def registry_compare(
    first: VersionArgument = "challenger",
    second: VersionArgument = "champion",
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    tracking_uri: StoreOption = None,
) -> None:
    """Two versions' figures side by side: difference, its interval over records, verdict."""
    from danceopd.registry import champion

    loaded, model = _registry(recipe, overrides, workspace, tracking_uri)
    found = champion.compare_versions(model, loaded, first, second)
    heads = ("task", "metric", f"version {found.ours}", f"version {found.theirs}", "difference", "interval", "verdict")
    table = Table(*heads, title=model.name)
    for task, name, ours, theirs in found.scores:
        values = ["-" if value is None else f"{value:.4g}" for value in (ours, theirs)]
        pair = found.table.get(task, {}).get(name)
        more = ["-"] * 3
        if pair is not None:
            sure = "" if pair["sure"] else ", not sure"
            interval = f"{pair['low']:+.3g} to {pair['high']:+.3g}"
            more = [f"{pair['difference']:+.3g}", interval, pair["verdict"] + sure]
        table.add_row(task, name, *values, *more)
    Console().print(table)
    if found.unlike:
        typer.echo(f"measured otherwise ({', '.join(found.unlike)}): the figures cannot be compared")


@registry_app.command("promote")
def registry_promote(
    version: VersionArgument = "challenger",
    force: Annotated[bool, typer.Option("--force", help="though it is worse than the champion")] = False,
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    tracking_uri: StoreOption = None,
) -> None:
    """Make a version the champion; the champion before it is called previous."""
    from danceopd.registry import champion

    loaded, model = _registry(recipe, overrides, workspace, tracking_uri)
    moved = champion.promote_checked(model, loaded, version, force)
    typer.echo(champion.say_champion(model.name, *moved))


@registry_app.command("rollback")
def registry_rollback(
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    tracking_uri: StoreOption = None,
) -> None:
    """Make the previous champion champion again; a second rollback undoes the first."""
    from danceopd.registry import champion

    _, model = _registry(recipe, overrides, workspace, tracking_uri)
    typer.echo(champion.say_champion(model.name, *model.rollback()))
