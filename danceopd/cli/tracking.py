"""`danceopd tracking ...`, and what single commands deliver when they are done."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from danceopd.config.load import load_recipe
from danceopd.tracking.journal import current_run

TELLING = ("finetune", "distill", "evaluate")  # commands that write journals; `register` delivers by itself
tracking_app = typer.Typer(no_args_is_help=True, help="What runs told MLflow, and what it has not got yet.")


@tracking_app.command("deliver")
def deliver(
    workspace: Annotated[Path, typer.Option(help="whose journals")] = Path("runs/world"),
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store; default: the workspace's")
    ] = None,
) -> None:
    """Take to the store what it did not get while it was away; what it has is not sent again."""
    from danceopd.tracking.delivery import deliver_named
    from danceopd.tracking.mlflow_store import default_tracking_uri, redact

    uri = tracking_uri or default_tracking_uri(workspace)
    outcome = deliver_named(workspace, uri)
    typer.echo(f"{redact(uri)}: {outcome.delivered} journal(s) delivered")


def add_tracking(app: typer.Typer) -> None:
    """Mount `danceopd tracking`, and let single commands deliver at their end, well or not."""
    app.add_typer(tracking_app, name="tracking")
    for command in app.registered_commands:
        if command.callback is not None and (command.name or command.callback.__name__) in TELLING:
            command.callback = _delivering(command.callback)


def _delivering(command: Callable) -> Callable:
    @functools.wraps(command)
    def run(*, recipe: str, overrides: list[str], workspace: Path | None, **more: Any) -> None:
        try:
            command(recipe=recipe, overrides=overrides, workspace=workspace, **more)
        finally:
            _deliver(recipe, overrides, workspace)

    return run


def _deliver(recipe: str, overrides: list[str], workspace: Path | None) -> None:
    """Deliver a single command's journals; in a pipeline run, and of several processes, that is another's task."""
    from danceopd.errors import UserError
    from danceopd.tracking import delivery
    from danceopd.tracking.mlflow_store import default_tracking_uri

    if current_run() is not None or os.environ.get("RANK", "0") != "0":
        return
    try:
        place = workspace or Path("runs") / load_recipe(recipe, overrides).name
    except UserError:  # the command has said so
        return
    delivery.deliver(place, default_tracking_uri(place))
