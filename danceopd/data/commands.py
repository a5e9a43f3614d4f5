"""`danceopd data import` and `danceopd data cache`: other people's data sets, and encodings to share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from danceopd.errors import UserError
from danceopd.options import RecipeOption, SetOption, WorkspaceOption
from danceopd.recipe import load_recipe


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


def data_cache(
    out: Annotated[Path, typer.Option(help="folder of the cache; what is there already is kept")] = ...,
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    worker: Annotated[
        str | None, typer.Option(help="K/N: this is worker K (from 0) of N, each started by itself")
    ] = None,
) -> None:
    """Encode what the recipe's training reads, shard by shard; run it again after an interruption and it goes on."""
    from danceopd import steps

    loaded = load_recipe(recipe, overrides)
    place = workspace or Path("runs") / loaded.name
    share = _share(worker)
    base, data = steps.resolve_base(loaded, place), steps.build_data(loaded, place)
    rows = steps.cache_encodings(loaded, base, data, out, share)
    if os.environ.get("RANK", "0") == "0":
        for group, count in rows.items():
            typer.echo(f"{out / group}: {count} rows")


def _share(worker: str | None) -> tuple[int, int] | None:
    if worker is None:
        return None
    number, _, count = worker.partition("/")
    if not number.isdigit() or not count.isdigit() or int(number) >= int(count):
        raise UserError(f"--worker {worker!r}: write K/N with 0 <= K < N, for example 0/4")
    return int(number), int(count)
