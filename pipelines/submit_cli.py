"""`danceopd pipeline run --host`, `upload`, `changed` and `schedule ...`: the commands that ask a server."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.image import IMAGE
from danceopd.cli.options import RecipeOption, SetOption
from danceopd.config.load import load_recipe
from danceopd.config.recipe import Recipe
from danceopd.errors import ExitCode, UserError
from danceopd.tracking.mlflow_store import ENVIRONMENT, default_tracking_uri
from pipelines.one_line import Away, one_line_errors

if TYPE_CHECKING:  # slow to import
    from pipelines.retrain import Comparison, Inputs
    from pipelines.submit import Server

NAME = "danceopd"  # of pipeline and experiment

HostOption = Annotated[
    str | None, typer.Option("--host", help="Kubeflow Pipelines server; default: $KF_PIPELINES_ENDPOINT")
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", help="your profile's, on a server with several users")
]
PackageOption = Annotated[
    Path | None, typer.Option(help="a compiled pipeline (danceopd pipeline compile); default: compiled now")
]
PipelineOption = Annotated[
    str | None, typer.Option("--pipeline", help="an uploaded pipeline's newest version, in place of --package")
]
ImageOption = Annotated[
    str | None, typer.Option(help="container image of every step when it is compiled now; best with its digest")
]
PlacementOption = Annotated[
    str | None,
    typer.Option(help="GPUs, nodes, volume of the steps when it is compiled now: a YAML file or a shipped one"),
]
ParamOption = Annotated[
    list[str], typer.Option("--param", help="one more argument of the pipeline: name=value, repeatable")
]
ExperimentOption = Annotated[str | None, typer.Option(help="to put runs under; made if it is missing [danceopd]")]
AccountOption = Annotated[str | None, typer.Option("--service-account", help="of the run's pods")]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="the data.dvc that names the data; default: the repository's")
]
StoreOption = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow store; default: $MLFLOW_TRACKING_URI, else the workspace's")
]


@dataclass(frozen=True)
class Submission:
    """What `danceopd pipeline run` was told of a server; all of it means nothing to a run here.

    Attributes are the options of these names; None, False and () where they were not given.
    """

    namespace: str | None = None
    experiment: str | None = None
    name: str | None = None
    package: Path | None = None
    pipeline: str | None = None
    image: str | None = None
    placement: str | None = None
    service_account: str | None = None
    params: tuple[str, ...] = ()
    follow: bool = False

    def refuse_without_host(self) -> None:
        """Raise a `UserError` that names an option which only a server understands, if one was given."""
        names = {"params": "param"}
        given = [names.get(f.name, f.name) for f in fields(self) if getattr(self, f.name) != f.default]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: only with --host, a Kubeflow Pipelines server")


@contextmanager
def _package(
    given: Path | None, pipeline: str | None, image: str | None, placement: str | None
) -> Iterator[Path | None]:
    """The compiled file to send: the one that was given, one compiled now, or none for an uploaded pipeline."""
    compiled = [name for name, value in {"--image": image, "--placement": placement}.items() if value is not None]
    chosen = [name for name, value in {"--pipeline": pipeline, "--package": given}.items() if value is not None]
    if len(chosen) > 1 or (chosen and compiled):
        raise UserError(f"{' and '.join(chosen + compiled)}: give one; a compiled pipeline has image and placement")
    if chosen:
        yield given
        return
    from pipelines.compile import compile_pipeline
    from pipelines.options import PipelineOptions
    from pipelines.placement import load_placement

    options = PipelineOptions(image or IMAGE, load_placement(placement))
    with tempfile.TemporaryDirectory() as scratch:
        yield compile_pipeline(Path(scratch) / "pipeline.yaml", options)


def _ours(recipe: Recipe, tracking_uri: str | None) -> dict[str, str]:
    """The arguments every run gets, where its pipeline takes them; what data there is, it finds out itself."""
    uri = tracking_uri or os.environ.get(ENVIRONMENT)
    return {"recipe": recipe.model_dump_json()} | ({"tracking_uri": uri} if uri else {})


# ------------------------------------------------------------------------------------------------------------------ run


def run_on_server(
    host: str, recipe: Recipe, told: Submission, data_file: Path | None, tracking_uri: str | None, if_changed: bool
) -> int:
    """Start a run, and follow it if told to; returns the exit code.

    With `if_changed`, nothing is started if there is nothing to train or a run of the same inputs went well (its
    student may have failed a gate); one that is under way is taken for this one.
    """
    from pipelines import submit
    from pipelines.retrain import compare, read_inputs

    uri = tracking_uri or os.environ.get(ENVIRONMENT)
    if if_changed and not uri:
        raise UserError(f"--if-changed: name the registry by --tracking-uri or {ENVIRONMENT}")
    inputs = read_inputs(recipe, data_file)
    found = compare(recipe, inputs, uri) if uri and (if_changed or told.follow) else None
    if if_changed and found is not None:
        _say_lines(found.lines())
        if not found.changed:
            return 0
    server = submit.open_server(host, told.namespace)
    with _package(told.package, told.pipeline, told.image, told.placement) as package:
        source, parameters = submit.source_of(server, package, told.pipeline)
        arguments = submit.fill_in(parameters, _ours(recipe, tracking_uri), told.params)
        experiment = submit.open_experiment(server, told.experiment or NAME)
        name = told.name or f"{recipe.name} {inputs.key if if_changed else f'{datetime.now(UTC):%Y-%m-%d %H:%M:%S}'}"
        there = submit.find_run(server, experiment, name) if if_changed else None
        if there is not None and there[1] == submit.SUCCEEDED and inputs.known:
            typer.echo(f"run {name}: was run already, {server.link(there[0])}; without --if-changed it runs again")
            return 0
        if there is not None and there[1] not in submit.OVER:
            run, how = there[0], "found under way"
        else:
            with _safe_to_repeat(if_changed):
                run, how = (
                    submit.start_run(server, source, arguments, experiment, name, told.service_account),
                    "started",
                )
    typer.echo(f"run {name}: {how}, {server.link(run)}")
    return _follow(server, run, recipe, inputs, uri, found) if told.follow else 0


@contextmanager
def _safe_to_repeat(named: bool) -> Iterator[None]:
    """A run that is named after its inputs is found by the next try, should it have been started."""
    from pipelines.submit import BrokenOff

    try:
        yield
    except BrokenOff as error:
        raise Away(str(error)) if named else error from error


def _follow(
    server: Server, run: str, recipe: Recipe, inputs: Inputs, uri: str | None, before: Comparison | None
) -> int:
    """Show the run's steps to its end, then what it did to the registry."""
    from pipelines import submit
    from pipelines.retrain import verdict

    outcome = submit.follow(server, run, typer.echo, submit.PATIENCE, submit.PAUSE)
    typer.echo(f"run {outcome.state.lower()}")
    for reason in outcome.reasons:
        typer.echo(f"danceopd: {reason}", err=True)
    if outcome.state != submit.SUCCEEDED:
        return ExitCode.INTERRUPTED if outcome.state == submit.LOST else ExitCode.FAILED
    if before is None or uri is None:
        typer.echo(f"what was registered stands in the run's summary; with --tracking-uri or {ENVIRONMENT} also here")
        return 0
    try:
        typer.echo(verdict(recipe, inputs, uri, before.newest))
    except UserError as error:  # the run itself went well
        typer.echo(f"danceopd: {error}", err=True)
    return 0


def _say_lines(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def unchanged_here(recipe: Recipe, workspace: Path, data_file: Path | None, tracking_uri: str | None) -> bool:
    """Whether a run here has nothing to train; says what changed or that nothing did."""
    from pipelines.retrain import compare, read_inputs

    found = compare(recipe, read_inputs(recipe, data_file), tracking_uri or default_tracking_uri(workspace))
    _say_lines(found.lines())
    return not found.changed


# -------------------------------------------------------------------------------------------------------------- changed


def changed(
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    data: DataOption = None,
    workspace: Annotated[Path | None, typer.Option(help="whose store is the default; default: runs/<recipe>")] = None,
    tracking_uri: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="for other programs")] = False,
) -> None:
    """Say whether recipe, code or data changed since the registry's champion.

    Exit code 0: changed, or there is no champion; 3: nothing to train; 2: it cannot be told; 75: MLflow is away.
    """
    from pipelines.retrain import compare, read_inputs

    with one_line_errors():
        loaded = load_recipe(recipe, overrides)
        uri = tracking_uri or default_tracking_uri(workspace or Path("runs") / loaded.name)
        found = compare(loaded, read_inputs(loaded, data), uri)
    _say_lines([found.to_json()] if as_json else found.lines())
    raise typer.Exit(0 if found.changed else ExitCode.UNCHANGED)


# --------------------------------------------------------------------------------------------------------------- upload


def upload(
    host: HostOption = None,
    namespace: NamespaceOption = None,
    package: PackageOption = None,
    image: ImageOption = None,
    placement: PlacementOption = None,
    name: Annotated[str, typer.Option(help="of the pipeline")] = NAME,
    version: Annotated[str | None, typer.Option("--version", help="its name; default: time and content")] = None,
) -> None:
    """Upload the pipeline to a server: a new one, or a new version of the one of this name."""
    from pipelines import submit

    with one_line_errors(), _package(package, None, image, placement) as file:
        assert file is not None  # no uploaded pipeline was named
        submit.load_package(file)
        server = submit.open_server(host, namespace)
        pipeline_id, version_id = submit.upload(server, file, name, version)
        typer.echo(f"pipeline {name}: {server.host}/#/pipelines/details/{pipeline_id}/version/{version_id}")


# ------------------------------------------------------------------------------------------------------------- schedule

schedule_app = typer.Typer(no_args_is_help=True, help="Recurring runs on a Kubeflow Pipelines server.")
ScheduleArgument = Annotated[str, typer.Argument(help="its name or id")]


@schedule_app.command("create")
def schedule_create(
    cron: Annotated[str, typer.Option(help="minute hour day month weekday, in the server's time")],
    host: HostOption = None,
    namespace: NamespaceOption = None,
    recipe: RecipeOption = "world",
    overrides: SetOption = [],  # noqa: B006
    name: Annotated[str | None, typer.Option(help="of the schedule; default: the recipe's")] = None,
    package: PackageOption = None,
    pipeline: PipelineOption = None,
    image: ImageOption = None,
    placement: PlacementOption = None,
    params: ParamOption = [],  # noqa: B006
    experiment: ExperimentOption = None,
    service_account: AccountOption = None,
    tracking_uri: StoreOption = None,
) -> None:
    """Run the pipeline again and again, with the arguments it has now; one at a time, without catching up.

    What data there is, each run finds out itself.
    """
    from pipelines import schedules, submit

    with one_line_errors(), _package(package, pipeline, image, placement) as file:
        loaded = load_recipe(recipe, overrides)
        cron = schedules.check_cron(cron)
        server = submit.open_server(host, namespace)
        source, parameters = submit.source_of(server, file, pipeline)
        arguments = submit.fill_in(parameters, _ours(loaded, tracking_uri), params)
        where = submit.open_experiment(server, experiment or NAME)
        title = name or loaded.name
        made = schedules.create(server, title, cron, source, arguments, where, service_account)
        typer.echo(f"schedule {title}: {cron}, {server.host}/#/recurringrun/details/{made}")


@schedule_app.command("list")
def schedule_list(host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """Show every schedule."""
    from pipelines import schedules, submit

    with one_line_errors():
        table = Table("schedule", "state", "cron", "id", box=None)
        for schedule in schedules.every(submit.open_server(host, namespace)):
            table.add_row(schedule.name, "on" if schedule.enabled else "paused", schedule.cron, schedule.id)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@schedule_app.command("pause")
def schedule_pause(name: ScheduleArgument, host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """Start no more of its runs; those under way go on."""
    _change("pause", "paused", name, host, namespace)


@schedule_app.command("resume")
def schedule_resume(name: ScheduleArgument, host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """Start its runs again."""
    _change("resume", "on", name, host, namespace)


@schedule_app.command("delete")
def schedule_delete(name: ScheduleArgument, host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """Remove it; its runs stay."""
    _change("delete", "deleted", name, host, namespace)


def _change(act: str, done: str, name: str, host: str | None, namespace: str | None) -> None:
    from pipelines import schedules, submit

    with one_line_errors():
        found = getattr(schedules, act)(submit.open_server(host, namespace), name)
    typer.echo(f"schedule {found.name}: {done}")
