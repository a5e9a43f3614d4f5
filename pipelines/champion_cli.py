"""`danceopd pipeline champion ...`: promote or roll back as a pipeline's step, here or compiled for a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from components.image import IMAGE
from danceopd.cli.options import RecipeOption, SetOption
from danceopd.config.load import load_recipe
from pipelines.one_line import one_line_errors

WorkspaceOption = Annotated[Path | None, typer.Option(help="where the store lies; default: runs/<recipe name>")]

app = typer.Typer(no_args_is_help=True, help="The pipeline that promotes a registered version, or rolls back.")


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="number or alias")] = "challenger",
    force: Annotated[bool, typer.Option("--force", help="though it is worse than the champion")] = False,
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006 (typer's way)
    workspace: WorkspaceOption = None,
) -> None:
    """Make a version the champion if it holds its gates and is no worse."""
    _run(recipe, overrides, workspace, "promote", version=version, force=force)


@app.command()
def rollback(recipe: RecipeOption = "world", overrides: SetOption = [], workspace: WorkspaceOption = None) -> None:  # noqa: B006
    """Make the previous champion champion again."""
    _run(recipe, overrides, workspace, "rollback")


def _run(recipe: str, overrides: list[str], workspace: Path | None, action: str, **more: Any) -> None:
    from pipelines.champion import run_champion

    with one_line_errors():
        loaded = load_recipe(recipe, overrides)
        typer.echo(run_champion(loaded, workspace or Path("runs") / loaded.name, action, **more))


@app.command("compile")
def compile_(
    out: Annotated[Path, typer.Option(help="YAML file to write")] = Path("danceopd-champion.yaml"),
    image: Annotated[str, typer.Option(help="container image of the step; best with its digest")] = IMAGE,
    placement: Annotated[
        str, typer.Option(help="YAML file, or a shipped one: volume, secrets of the step; default: the volume alone")
    ] = "",
) -> None:
    """Compile the pipeline to YAML for a Kubeflow cluster."""
    from pipelines.champion import build_champion_pipeline
    from pipelines.compile import compile_pipeline
    from pipelines.options import PipelineOptions
    from pipelines.placement import load_placement

    with one_line_errors():
        options = PipelineOptions(image, load_placement(placement))
        typer.echo(compile_pipeline(out, options, build_champion_pipeline))
