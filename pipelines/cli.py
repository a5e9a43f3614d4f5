"""`danceopd pipeline ...`: run the chain here, or compile it for a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from components.image import IMAGE
from danceopd.recipe import load_recipe
from pipelines.champion_cli import app as champion_app
from pipelines.one_line import one_line_errors

STEP_FAILED = 1
PLAIN_WIDTH = 110  # of a table that goes to a file

app = typer.Typer(no_args_is_help=True, help="The whole chain as one Kubeflow pipeline.")
app.add_typer(champion_app, name="champion")


@app.command()
def run(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="name of a shipped recipe, or a YAML file")] = "world",
    overrides: Annotated[list[str], typer.Option("--set", help="override: key.sub=value, repeatable")] = [],  # noqa: B006
    workspace: Annotated[Path | None, typer.Option(help="where products go; default: runs/<recipe name>")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget earlier products and run every step")] = False,
) -> None:
    """Run the chain here, from data to a registered student; what is unchanged is not run again."""
    from pipelines.compile import compile_pipeline
    from pipelines.local import StepFailed, run_local
    from pipelines.options import PipelineOptions
    from pipelines.summary import summary_table

    with one_line_errors():
        loaded = load_recipe(recipe, overrides)
        place = workspace or Path("runs") / loaded.name
        try:
            outcome = run_local(loaded, place, fresh)
        except StepFailed as error:
            typer.echo("\n".join(f"danceopd: {line}" for line in str(error).splitlines()), err=True)
            raise typer.Exit(STEP_FAILED) from error
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(summary_table(outcome.metrics, outcome.registration))
    typer.echo(f"model    {loaded.register_as.model}")
    typer.echo(f"report   {outcome.report}")
    typer.echo(f"summary  {outcome.notes / 'summary.md'}")
    typer.echo(f"pipeline {compile_pipeline(place / 'pipeline.yaml', PipelineOptions())}  (the same, for a cluster)")


@app.command("compile")
def compile_(
    out: Annotated[Path, typer.Option(help="YAML file to write")] = Path("danceopd-pipeline.yaml"),
    image: Annotated[str, typer.Option(help="container image of every step; best with its digest")] = IMAGE,
    gpu: Annotated[str | None, typer.Option(help="accelerator resource, for example nvidia.com/gpu")] = None,
    gpu_count: Annotated[int, typer.Option(help="accelerators of each step that trains or draws")] = 1,
    claim: Annotated[str, typer.Option(help="persistent volume claim that holds the workspace")] = "danceopd-workspace",
) -> None:
    """Compile the chain to YAML for a Kubeflow cluster."""
    from pipelines.compile import compile_pipeline
    from pipelines.options import PipelineOptions

    with one_line_errors():
        options = PipelineOptions(image=image, gpu=gpu, gpu_count=gpu_count, workspace_claim=claim)
        typer.echo(compile_pipeline(out, options))
