"""`danceopd cluster check`: what is there and what is missing, before the first run."""

from __future__ import annotations

from typing import Annotated

import typer

from danceopd.errors import ExitCode
from pipelines.cluster.cli import ContextOption, unreachable_is_again
from pipelines.one_line import one_line_errors

app = typer.Typer(no_args_is_help=True, help="The cluster that runs and jobs go to.")


@app.callback()
def _group() -> None:
    """A command of its own name below `cluster`."""


@app.command()
def check(
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="where steps and jobs run: kubeflow, a profile's, danceopd")
    ] = None,
    context: ContextOption = None,
    claim: Annotated[str, typer.Option(help="persistent volume claim with the workspace")] = "danceopd-workspace",
    gpu: Annotated[str, typer.Option(help="accelerator resource")] = "nvidia.com/gpu",
) -> None:
    """Say line by line what a namespace has of what a run needs; reads only.

    Exit code 0: nothing is missing; 2: something is; 75: the cluster does not answer.
    """
    from pipelines.cluster.check import MISSING, Wanted
    from pipelines.cluster.check import check as look
    from pipelines.cluster.connect import connect

    with one_line_errors(), unreachable_is_again():
        lines = []
        for line in look(connect(namespace, context), Wanted(claim, gpu)):
            typer.echo(f"{line.state:<8} {line.what}: {line.said}")
            lines.append(line)
        missing = sum(line.state == MISSING for line in lines)
        typer.echo(f"{missing} missing" if missing else "nothing is missing")
        if missing:
            raise typer.Exit(ExitCode.BAD_INPUT)
