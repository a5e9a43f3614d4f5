"""Options that many commands share, and the recipe they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from danceopd.config.load import load_recipe
from danceopd.config.recipe import Recipe
from danceopd.files import at_home

PLAIN_WIDTH = 110  # of a table that goes to a file

RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="name of a shipped recipe, or a YAML file")]
SetOption = Annotated[list[str], typer.Option("--set", help="override: key.sub=value, repeatable")]
StoreOption = Annotated[str | None, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow server")]
WorkspaceOption = Annotated[Path | None, typer.Option(help="where products go; default: runs/<recipe name>")]


def open_recipe(recipe: str, overrides: list[str], workspace: Path | None) -> tuple[Recipe, Path]:
    """The recipe, and the workspace that is named or its own."""
    loaded = load_recipe(recipe, overrides)
    return loaded, at_home(workspace or Path("runs") / loaded.name)
