"""`danceopd pipeline ...`: run the chain here, or compile it for a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from components.image import IMAGE
from danceopd.cli.options import PLAIN_WIDTH, RecipeOption, SetOption, WorkspaceOption
from danceopd.config.load import load_recipe
from danceopd.errors import ExitCode, UserError
from danceopd.tracking.mlflow_store import ENVIRONMENT
from pipelines import submit_cli as server
from pipelines.champion_cli import app as champion_app
from pipelines.one_line import one_line_errors

app = typer.Typer(no_args_is_help=True, help="The whole chain as one Kubeflow pipeline.")
app.add_typer(champion_app, name="champion")
app.command()(server.upload)
app.command()(server.changed)
app.add_typer(server.schedule_app, name="schedule")


@app.command()
def run(
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget earlier products and run every step")] = False,
    if_changed: Annotated[
        bool, typer.Option("--if-changed", help="only if recipe, code or data changed since the champion")
    ] = False,
    data: server.DataOption = None,
    tracking_uri: server.StoreOption = None,
    host: Annotated[str | None, typer.Option(help="run there: address of a Kubeflow Pipelines server")] = None,
    namespace: server.NamespaceOption = None,
    experiment: server.ExperimentOption = None,
    name: Annotated[str | None, typer.Option(help="of the run there; default: recipe and time")] = None,
    package: server.PackageOption = None,
    pipeline: server.PipelineOption = None,
    image: server.ImageOption = None,
    placement: server.PlacementOption = None,
    params: server.ParamOption = [],  # noqa: B006
    service_account: server.AccountOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="show its steps to the end; exit code says how it ended")
    ] = False,
) -> None:
    """Run the chain, here or with --host on a cluster; what is unchanged is not run again.

    Exit code 0: done, started, or nothing to do; 1: a step failed; 2: bad input; 4: every step went well and the
    student fails a gate, so that it was not registered; 75: a server is away, or a run here was interrupted: the same
    command goes on.
    """
    from pipelines.compile import compile_pipeline
    from pipelines.local import run_local
    from pipelines.options import PipelineOptions
    from pipelines.summary import summary_table

    with one_line_errors():
        loaded = load_recipe(recipe, overrides)
        told = server.Submission(
            namespace, experiment, name, package, pipeline, image, placement, service_account, tuple(params), follow
        )
        if data is not None and not if_changed:
            raise UserError("--data: says what --if-changed compares; add that")
        if host is not None:
            if workspace is not None or fresh:
                raise UserError("--workspace, --fresh: only for a run here; with --host use --param workspace=...")
            raise typer.Exit(server.run_on_server(host, loaded, told, data, tracking_uri, if_changed))
        told.refuse_without_host()
        if tracking_uri:
            os.environ[ENVIRONMENT] = tracking_uri  # the steps of a run here take it from there
        place = workspace or Path("runs") / loaded.name
        if if_changed and server.unchanged_here(loaded, place, data, tracking_uri):
            return
        outcome = run_local(loaded, place, fresh)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(summary_table(outcome.metrics, outcome.registration))
    typer.echo(f"model    {loaded.register_as.model}")
    typer.echo(f"report   {outcome.report}")
    typer.echo(f"summary  {outcome.notes / 'summary.md'}")
    typer.echo(f"pipeline {compile_pipeline(place / 'pipeline.yaml', PipelineOptions())}  (the same, for a cluster)")
    if not outcome.registration["registered"]:
        for line in outcome.shortfalls:
            typer.echo(f"danceopd: {line}", err=True)
        raise typer.Exit(ExitCode.NOT_REGISTERED)


@app.command("compile")
def compile_(
    out: Annotated[Path, typer.Option(help="YAML file to write")] = Path("danceopd-pipeline.yaml"),
    image: Annotated[str, typer.Option(help="container image of every step; best with its digest")] = IMAGE,
    placement: Annotated[
        str, typer.Option(help="YAML file, or a shipped one: GPUs, nodes, volume, secrets of the steps; default: CPU")
    ] = "",
    manifests: Annotated[
        bool, typer.Option("--kubernetes-manifests", help="write Pipeline and PipelineVersion objects, for kubectl")
    ] = False,
    namespace: Annotated[str, typer.Option(help="of these objects; default: where they are applied")] = "",
    version: Annotated[str, typer.Option(help="name of the PipelineVersion; default: from its content")] = "",
) -> None:
    """Compile the chain to YAML for a Kubeflow cluster."""
    from pipelines.compile import Manifests, compile_pipeline
    from pipelines.options import PipelineOptions
    from pipelines.placement import load_placement

    with one_line_errors():
        if not manifests and (namespace or version):
            raise UserError("--namespace and --version are the objects' own; add --kubernetes-manifests")
        options = PipelineOptions(image, load_placement(placement))
        objects = Manifests(namespace, version) if manifests else None
        typer.echo(compile_pipeline(out, options, manifests=objects))
    if not options.by_digest:
        typer.echo(f"danceopd: image {image}: a tag can be moved to another image; best name its digest", err=True)
