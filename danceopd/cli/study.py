"""`danceopd study`: methods and windows compared over seeds, at one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from danceopd.cli.options import WorkspaceOption
from danceopd.config.load import load_recipe


def study(
    name: Annotated[str, typer.Argument(help="a shipped study, or a YAML file")],
    overrides: Annotated[list[str], typer.Option("--set", help="override of the study: budget.forwards=50000")] = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    workers: Annotated[int, typer.Option(min=1, help="processes that share the cores")] = 1,
) -> None:
    """Compare methods and windows over seeds at one budget; goes on where it was stopped."""
    from danceopd.studies.plan import load_study
    from danceopd.studies.run import run_study
    from danceopd.studies.table import terminal_table

    loaded = load_study(name, overrides)
    place = workspace or Path("runs") / load_recipe(loaded.recipe, loaded.set).name
    summary = run_study(loaded, place, workers)
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(terminal_table(summary))
    typer.echo(f"{summary['folder']}/study.md")
