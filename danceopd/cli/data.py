"""`danceopd data ...`: the task-tagged dataset: assembled, tracked, checked, imported, encoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from danceopd.cli.options import RecipeOption, SetOption, WorkspaceOption, open_recipe
from danceopd.config.load import load_recipe
from danceopd.config.recipe import Recipe
from danceopd.errors import UserError

if TYPE_CHECKING:  # torch is slow to import, and most of these commands do without
    import pyarrow as pa

    from danceopd.data.encoded import CutPrompts

WorkerOption = Annotated[
    str | None, typer.Option(help="K/N: this is worker K (from 0) of N, each started by itself, on any machine")
]
data_app = typer.Typer(no_args_is_help=True, help="The task-tagged dataset.")


@data_app.command("build")
def data_build(
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006 (typer's way)
    out: Annotated[Path | None, typer.Option(help="dataset folder; default: tracked data/, or workspace")] = None,
    workspace: WorkspaceOption = None,
    workers: Annotated[int, typer.Option(min=1, help="threads that decode and hash pictures")] = os.cpu_count() or 1,
    worker: WorkerOption = None,
) -> None:
    """Assemble the recipe's dataset: generate or read, check, split, count, hash; go on after an interruption.

    Several workers (--worker) share the input files; the last one writes what one command alone would have written.
    """
    from danceopd import steps

    share, (loaded, place) = _share(worker), open_recipe(recipe, overrides, workspace)
    product = (
        steps.build_data(loaded, place, folder=out, workers=workers)
        if share is None
        else steps.build_share(loaded, place, share, folder=out, workers=workers)
    )
    if product is not None:
        _print_counts(product.facts["counts"], f"{product.dataset}  content {product.facts['content'][:16]}")
    else:
        typer.echo(f"{loaded.name}: this worker's share is looked at; the last worker writes the dataset")


@data_app.command("track")
def data_track(recipe: RecipeOption = "world", overrides: SetOption = []) -> None:  # noqa: B006
    """Build the recipe's dataset as the repository's data/ and record it in data.dvc."""
    from danceopd import steps
    from danceopd.data import versioning

    repo = versioning.find_repo(Path.cwd())
    if repo is None:
        raise UserError(f"{Path.cwd()}: not in a git or DVC repository; run this in a clone")
    typer.echo(f"data.dvc: md5 {steps.track_data(load_recipe(recipe, overrides), repo)}")


@data_app.command("validate")
def data_validate(folder: Path) -> None:
    """Check every shard, record and picture of a dataset folder; count what lies on two sides of a split."""
    from danceopd.data.assemble import count_two_sides, verify_dataset

    manifest = verify_dataset(folder)
    sides = count_two_sides(folder)
    rows = sum(facts["rows"] for facts in manifest["files"].values())
    typer.echo(f"{folder}: {rows} records in {len(manifest['files'])} shards, all valid; content {manifest['content']}")
    typer.echo(str(sides) if sides else "no picture lies, or looks like one, on two sides of a split")


@data_app.command("stats")
def data_stats(
    folder: Path,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="count the prompts that its text encoder would cut")
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
) -> None:
    """Records by task and split, distinct prompts, bytes of pictures; with a recipe, prompts that are cut."""
    import pyarrow.compute as pc

    from danceopd.data.assemble import open_dataset
    from danceopd.data.records import SPLITS

    dataset = open_dataset(folder)
    cut = None if recipe is None else _cutter(*open_recipe(recipe, overrides, workspace))
    _print_counts(dataset.manifest["counts"], str(folder))
    for split in SPLITS:
        columns = dataset.columns().filter(pc.equal(dataset.columns()["split"], split))
        prompts, groups = (pc.count_distinct(columns[name]).as_py() for name in ("prompt_key", "group"))
        size = pc.sum(columns["bytes"]).as_py() or 0
        typer.echo(
            f"{split}: {columns.num_rows} records in {groups} groups that share pictures, {prompts} distinct prompts, "
            f"{size / 1e6:.1f} MB of pictures"
        )
        if cut is not None and (found := cut(columns)):
            typer.echo(f"{split}: {found}")


def _cutter(recipe: Recipe, workspace: Path) -> Callable[[pa.Table], CutPrompts | None]:
    """What counts the prompts that a recipe's base would cut, from its tokenizer alone."""
    from danceopd.backbones import open_outline
    from danceopd.backbones.bases import fetch_configs
    from danceopd.data.encoded import cut_prompts

    folder = fetch_configs(recipe.model.base, recipe.model.revision, workspace)
    backbone = open_outline(folder, recipe.model)

    def count(columns: pa.Table) -> CutPrompts | None:
        edits = columns["source_key"].is_valid().to_pylist()
        pairs = zip(columns["prompt"].to_pylist(), edits, strict=True)
        prompts = {(text, int(edit and backbone.prompt_sees_source)) for text, edit in pairs}
        return cut_prompts(backbone, sorted(prompts))

    return count


def _print_counts(counts: dict, title: str) -> None:
    table = Table("task", "train", "val", "test", title=title)
    for task, splits in counts.items():
        table.add_row(task, *(str(splits[s]) for s in ("train", "val", "test")))
    Console().print(table)


@data_app.command("import")
def data_import(
    layout: Annotated[str | None, typer.Argument(help="omniedit, ultraedit, magicbrush, ...; or in --spec")] = None,
    inputs: Annotated[list[str] | None, typer.Argument(help="files, folders, globs; also s3://, gs://, hf://")] = None,
    *,
    out: Annotated[Path, typer.Option(help="folder that appears at the end, for a recipe's data.inputs")],
    spec: Annotated[Path | None, typer.Option(help="YAML file with the import's settings")] = None,
    task: Annotated[list[str], typer.Option(help="KIND=TASK, repeatable; '*=TASK' for every other kind")] = [],  # noqa: B006
    overrides: Annotated[list[str], typer.Option("--set", help="a setting: key.sub=value, repeatable")] = [],  # noqa: B006
    workers: Annotated[int, typer.Option(min=1, help="threads that decode and encode pictures")] = os.cpu_count() or 1,
    worker: WorkerOption = None,
) -> None:
    """Import a data set into the task-tagged schema; run it again after an interruption and it goes on.

    Several workers (--worker) share the input files; the last one writes what one command alone would have written.
    """
    from danceopd.data.importers.run import run_import, run_share
    from danceopd.data.importers.spec import load_spec

    share, asked = _share(worker), load_spec(layout, inputs or [], spec, overrides, task)
    report = run_import(asked, out, workers) if share is None else run_share(asked, out, share, workers)
    if report is not None:
        _tell_import(report, out)
    else:
        typer.echo(f"{out}: this worker's share is converted; the last worker writes it all")


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
    if report.get("unused"):
        typer.echo(f"no row is of the kind: {', '.join(report['unused'])}; is a --task or 'tasks' misspelt?")
    if report.get("ignored"):  # an import of an earlier version has none
        unread = Table("ignored", "how many", "first")
        for what, entry in sorted(report["ignored"].items()):
            unread.add_row(what, str(entry["count"]), entry["examples"][0])
        console.print(unread)


@data_app.command("cache")
def data_cache(
    out: Annotated[Path, typer.Option(help="folder of the cache; what is there already is kept")],
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    worker: WorkerOption = None,
) -> None:
    """Encode what the recipe's training reads, shard by shard; run it again after an interruption and it goes on."""
    from danceopd import steps
    from danceopd.data.cache import strangers
    from danceopd.files import check_output

    loaded, place = open_recipe(recipe, overrides, workspace)
    share = _share(worker)
    check_output(out, strangers)
    rows = steps.cache_encodings(steps.open_run(loaded, place), out, share)
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


@data_app.command("import-benchmark")
def data_import_benchmark(
    benchmark: Annotated[str, typer.Argument(help="geneval, gedit or imgedit")],
    source: Annotated[Path, typer.Argument(help="the benchmark's file or folder, as its authors give it out")],
    out: Annotated[Path, typer.Option(help="dataset folder that appears, for evaluate.benchmarks")],
    task: Annotated[str, typer.Option(help="task of the records, as a recipe calls it")],
    images: Annotated[Path | None, typer.Option(help="imgedit: folder of the pictures; default: the file's")] = None,
    language: Annotated[str, typer.Option(help="gedit: of the instructions")] = "en",
) -> None:
    """Write a benchmark as a dataset folder, to be named under evaluate.benchmarks."""
    from danceopd.evaluation.benchmark_sets import Asked, import_benchmark

    manifest = import_benchmark(benchmark, Asked(source, task, images, language), out)
    typer.echo(f"{out}: {manifest['counts'][task]['test']} records  content {manifest['content'][:16]}")
