"""`danceopd data import`: other people's data sets, from the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def data_import(
    layout: Annotated[str | None, typer.Argument(help="omniedit, ultraedit, magicbrush, ...; or in --spec")] = None,
    inputs: Annotated[list[str] | None, typer.Argument(help="files, folders, globs; also s3://, gs://, hf://")] = None,
    out: Annotated[Path, typer.Option(help="folder that appears at the end, for a recipe's data.inputs")] = ...,
    spec: Annotated[Path | None, typer.Option(help="YAML file with the import's settings")] = None,
    task: Annotated[list[str], typer.Option(help="KIND=TASK, repeatable; '*=TASK' for every other kind")] = [],  # noqa: B006
    overrides: Annotated[list[str], typer.Option("--set", help="a setting: key.sub=value, repeatable")] = [],  # noqa: B006
    workers: Annotated[int, typer.Option(min=1, help="threads that decode and encode pictures")] = os.cpu_count() or 1,
) -> None:
    """Import a data set into the task-tagged schema; run it again after an interruption and it goes on."""
    from danceopd.data.importers.run import run_import
    from danceopd.data.importers.spec import load_spec

    _tell_import(run_import(load_spec(layout, inputs or [], spec, overrides, task), out, workers), out)


def _tell_import(report: dict, out: Path) -> None:
    console = Console()
    table = Table("task", "train", "val", "test", title=f"{out}: {report['kept']} of {report['rows']} rows kept")
    for task, splits in report["counts"].items():
        table.add_row(task, *(str(splits.get(split, 0)) for split in ("train", "val", "test")))
    console.print(table)
    if report["dropped"]:
        lost = Table("not kept", "why", "rows", "first")
        for fate, entries in sorted(report["dropped"].items()):
            for label, entry in sorted(entries.items()):
                lost.add_row(fate, label, str(entry["count"]), entry["examples"][0])
        console.print(lost)
