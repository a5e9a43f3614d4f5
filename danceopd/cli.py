"""`danceopd ...`: the command line. Bad input ends with one line on stderr and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from danceopd import __version__
from danceopd.data.commands import data_cache, data_import
from danceopd.errors import Interrupted, UserError
from danceopd.evaluation.commands import data_import_benchmark
from danceopd.generate_commands import generate
from danceopd.options import RecipeOption, SetOption, StoreOption, WorkspaceOption, open_recipe
from danceopd.recipe import Recipe, load_recipe
from danceopd.recipe_commands import recipe_app
from danceopd.registry_commands import registry_app
from danceopd.serving.commands import serve
from danceopd.tracking_commands import add_tracking

# typer brings its own copy of click, whose error base it does not export.
UsageError = typer.BadParameter.__bases__[0]

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Many specialists, one flow-matching student."
)
data_app = typer.Typer(no_args_is_help=True, help="The task-tagged dataset.")
world_app = typer.Typer(no_args_is_help=True, help="The small world that ships with the project.")
app.add_typer(data_app, name="data")
data_app.command("import")(data_import)
data_app.command("cache")(data_cache)
data_app.command("import-benchmark")(data_import_benchmark)
app.add_typer(world_app, name="world")
app.add_typer(registry_app, name="registry")
app.add_typer(recipe_app, name="recipe")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"danceopd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="more log lines")] = False,
) -> None:
    set_up_logging(logging.DEBUG if verbose else logging.INFO)


def set_up_logging(level: int) -> None:
    """Our own log lines to stderr: colored on a terminal, plain elsewhere. Libraries speak from WARNING up."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Of several processes the first speaks for all.
    logging.getLogger("danceopd").setLevel(level if os.environ.get("RANK", "0") == "0" else logging.WARNING)


# ---------------------------------------------------------------------------------------------------------------- data


@data_app.command("build")
def data_build(
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006 (typer's way)
    out: Annotated[Path | None, typer.Option(help="dataset folder; default: tracked data/, or workspace")] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Assemble the recipe's dataset: generate or read, check, split, count, hash."""
    from danceopd import steps

    loaded, place = open_recipe(recipe, overrides, workspace)
    product = steps.build_data(loaded, place, folder=out)
    _print_counts(product.facts["counts"], f"{product.facts['dataset']}  content {product.facts['content'][:16]}")


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
    """Check every shard, record and picture of a dataset folder."""
    from danceopd.data.assemble import verify_dataset

    manifest = verify_dataset(folder)
    rows = sum(facts["rows"] for facts in manifest["files"].values())
    typer.echo(f"{folder}: {rows} records in {len(manifest['files'])} shards, all valid; content {manifest['content']}")


@data_app.command("stats")
def data_stats(folder: Path) -> None:
    """Records by task and split, distinct prompts, bytes of pictures."""
    from danceopd.data.assemble import open_dataset
    from danceopd.data.records import SPLITS

    dataset = open_dataset(folder)
    _print_counts(dataset.manifest["counts"], str(folder))
    for split in SPLITS:
        records = dataset.records(split)
        prompts = Counter(r.prompt for r in records)
        size = sum(len(picture) for r in records for picture in (r.source, r.target) if picture)
        typer.echo(f"{split}: {len(records)} records, {len(prompts)} distinct prompts, {size / 1e6:.1f} MB of pictures")


def _print_counts(counts: dict, title: str) -> None:
    table = Table("task", "train", "val", "test", title=title)
    for task, splits in counts.items():
        table.add_row(task, *(str(splits[s]) for s in ("train", "val", "test")))
    Console().print(table)


# --------------------------------------------------------------------------------------------------------------- steps


@app.command()
def finetune(
    teacher: Annotated[str, typer.Argument(help="a teacher of the recipe")],
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
) -> None:
    """Fine-tune one teacher and prove it better than the base."""
    from danceopd import steps

    loaded, place = open_recipe(recipe, overrides, workspace)
    base, data = steps.resolve_base(loaded, place), steps.build_data(loaded, place)
    product = steps.finetune_teacher(loaded, teacher, base, data, place)
    _tell(f"{product.folder}  {product.facts['scores']}")


def _tell(text: str) -> None:
    """One line of result; of several processes the first speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)


def _student(loaded: Recipe, place: Path, tracking_uri: str | None = None):
    from danceopd import steps

    base, data = steps.resolve_base(loaded, place), steps.build_data(loaded, place)
    teachers = {n: steps.finetune_teacher(loaded, n, base, data, place, tracking_uri) for n in loaded.teachers}
    return base, data, teachers, steps.distill_student(loaded, base, data, teachers, place)


@app.command()
def distill(recipe: RecipeOption = "world", overrides: SetOption = [], workspace: WorkspaceOption = None) -> None:  # noqa: B006
    """Distill the student; missing teachers are made first."""
    loaded, place = open_recipe(recipe, overrides, workspace)
    *_, student = _student(loaded, place)
    _tell(f"{student.pipeline}  loss {student.facts['loss']}")


@app.command()
def evaluate(recipe: RecipeOption = "world", overrides: SetOption = [], workspace: WorkspaceOption = None) -> None:  # noqa: B006
    """Evaluate base, teachers and student on held-out records; missing products are made first."""
    from danceopd import steps

    loaded, place = open_recipe(recipe, overrides, workspace)
    evaluation = steps.evaluate_student(loaded, *_student(loaded, place), place)
    verdict = "holds all its gates" if evaluation.facts["passed"] else "fails a gate"
    _tell(f"{evaluation.folder / 'report.html'}: the student {verdict}")


@app.command()
def register(
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    workspace: WorkspaceOption = None,
    tracking_uri: StoreOption = None,
) -> None:
    """Register the student in MLflow if its gates hold; missing products are made first."""
    from danceopd import steps

    loaded, place = open_recipe(recipe, overrides, workspace)
    base, data, teachers, student = _student(loaded, place, tracking_uri)
    evaluation = steps.evaluate_student(loaded, base, data, teachers, student, place)
    lineage = steps.lineage(loaded, base, data, teachers, student)
    result = steps.register_student(loaded, student, evaluation, lineage, tracking_uri, place)
    if not result.registered:
        raise UserError("not registered: " + "; ".join(result.reasons))
    typer.echo(f"{loaded.register_as.model} version {result.version} ({', '.join(result.alias)})")
    for reason in result.reasons:
        typer.echo(reason)


# ------------------------------------------------------------------------------------------------------------- student


@app.command()
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


app.command()(generate)
app.command()(serve)


@world_app.command("build-base")
def world_build_base(
    out: Annotated[Path, typer.Option(help="folder for the pipeline; <out>.sha256 and <out>.json appear beside it")],
    vae_steps: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Make the small world's base from nothing; the shipped one took 34 minutes of training."""
    from dataclasses import replace

    from danceopd.world_base import BuildPlan, build_base

    given = {"vae_steps": vae_steps, "steps": steps}
    figures = build_base(out, replace(BuildPlan(), **{k: v for k, v in given.items() if v is not None}))
    typer.echo(figures)


add_tracking(app)


def _mount_commands() -> None:
    """Mount the sub-commands that packages above this one offer (`danceopd pipeline ...`)."""
    for entry in entry_points(group="danceopd.commands"):
        app.add_typer(entry.load(), name=entry.name)


def main() -> None:
    """Entry point: maps errors a user can mend to one line and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _mount_commands()
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        sys.exit(_say(str(error), 2))
    except UsageError as error:
        where = f" ({error.ctx.command_path} --help)" if error.ctx else ""
        sys.exit(_say(error.format_message() + where, 2))
    except Interrupted as stop:
        sys.exit(_say(str(stop), stop.code))
    except typer.Abort:
        sys.exit(_say("interrupted", 130))
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str, code: int) -> int:
    print(f"danceopd: {' '.join(message.split())}", file=sys.stderr)
    return code
