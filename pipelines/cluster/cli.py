"""`danceopd job ...`: training jobs on a Kubernetes cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.image import IMAGE
from danceopd.errors import ExitCode, UserError
from danceopd.text import parse_yaml_documents, read_text
from danceopd.tracking.journal import RUN
from pipelines.one_line import one_line_errors

if TYPE_CHECKING:  # slow to import
    from pipelines.cluster.connect import Cluster
    from pipelines.cluster.jobs import Handle

LAST_PATIENCE = 30.0  # seconds for an API call after a signal: whoever sent it waits
WORKFLOW = "ARGO_WORKFLOW"  # set in a pipeline's step: the run it belongs to

app = typer.Typer(no_args_is_help=True, help="Training jobs on a Kubernetes cluster.")

NamespaceOption = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="default: the manifest's, the pod's or the context's, else danceopd"),
]
ContextOption = Annotated[str | None, typer.Option("--context", help="of the kubeconfig")]
NameArgument = Annotated[str, typer.Argument(help="the job's name")]


@app.command()
def render(
    step: Annotated[str, typer.Argument(help="finetune, distill or evaluate")],
    teacher: Annotated[str, typer.Argument(help="for finetune: which one")] = "",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="shipped recipe, or a file in the container")] = "world",
    overrides: Annotated[list[str], typer.Option("--set", help="override: key.sub=value, repeatable")] = [],  # noqa: B006
    name: Annotated[str, typer.Option(help="of the job; default: from step and teacher")] = "",
    kind: Annotated[str, typer.Option(help="Job, or TrainJob where Kubeflow Trainer is installed")] = "Job",
    image: Annotated[str, typer.Option(help="container image; best with its digest")] = IMAGE,
    nodes: Annotated[int, typer.Option(help="pods that train together")] = 1,
    gpus: Annotated[int, typer.Option(help="accelerators of each; 0: CPU only")] = 0,
    gpu: Annotated[str, typer.Option(help="accelerator resource")] = "nvidia.com/gpu",
    cpu: Annotated[int, typer.Option(help="cores of each pod")] = 4,
    memory: Annotated[int, typer.Option(help="GiB of each pod")] = 16,
    hours: Annotated[int, typer.Option(help="it is ended after this long")] = 48,
    retries: Annotated[int, typer.Option(help="failures to make good; interruptions do not count")] = 3,
    claim: Annotated[str, typer.Option(help="persistent volume claim with the workspace")] = "danceopd-workspace",
    workspace: Annotated[str, typer.Option(help="folder on it; it is mounted at /workspace")] = "/workspace",
    queue: Annotated[str, typer.Option(help="Kueue's LocalQueue that admits it")] = "",
    selector: Annotated[list[str], typer.Option("--node-selector", help="label=value, repeatable")] = [],  # noqa: B006
    tolerations: Annotated[list[str], typer.Option("--toleration", help="key of a taint, repeatable")] = [],  # noqa: B006
    run: Annotated[str, typer.Option(envvar=RUN, help="pipeline run it is a part of, for MLflow")] = "",
    out: Annotated[Path | None, typer.Option(help="YAML file to write; default: standard output")] = None,
) -> None:
    """Write a job's manifest, for `danceopd job submit` or kubectl."""
    from danceopd.files import check_output_file, write_atomic
    from pipelines.cluster.objects import ENDINGS, JobPlan, is_ours, manifests, to_yaml

    with one_line_errors():
        plan = JobPlan(
            step=step,
            teacher=teacher,
            recipe=recipe,
            overrides=tuple(overrides),
            name=name,
            kind=kind,
            image=image,
            nodes=nodes,
            gpus=gpus,
            gpu=gpu,
            cpu=cpu,
            memory=memory,
            hours=hours,
            retries=retries,
            claim=claim,
            workspace=workspace,
            queue=queue,
            node_selector=_labels(selector),
            tolerations=tuple(tolerations),
            run=run,
        )
        place = check_output_file(out, ENDINGS, is_ours) if out else None
        text = to_yaml(manifests(plan))
        if place:
            write_atomic(place, text)
        typer.echo(out if place else text, nl=place is not None)


@app.command()
def submit(
    manifest: Annotated[str, typer.Argument(help="YAML file, kustomize folder, or - for standard input")],
    only: Annotated[str, typer.Option(help="which job, if there are several")] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="show status and log until it is over; exit code says how")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="replace a job of this name that is over")] = False,
    start_within: Annotated[int, typer.Option(min=1, help="minutes it may take to start; then it is deleted")] = 60,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """Submit a job, or find the one that is there already; nothing is ever submitted twice.

    With --wait: 0 succeeded, 1 failed, 2 bad input, 75 stopped watching (submit again to go on).
    """
    from pipelines.cluster.jobs import submit as submit_job

    with one_line_errors():
        document, services = read_manifest(manifest, only)
        cluster = _connect(_namespace_of(document, namespace), context)
        with unreachable_is_again(), _stopped(cluster, document["metadata"]["name"]):
            handle = submit_job(cluster, document, services, again, _run_of(cluster))
            typer.echo(f"{handle}: {'found, and followed' if handle.adopted else 'submitted'}", err=wait)
            if wait:
                raise typer.Exit(_wait(cluster, handle, start_within))


@app.command()
def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until the job is over")] = False,
    rank: Annotated[int, typer.Option(min=0, help="of the node")] = 0,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """Show a job's log."""
    from pipelines.cluster import jobs
    from pipelines.cluster.logs import read, streaming

    with one_line_errors(), unreachable_is_again():
        cluster = _connect(namespace, context)
        handle = jobs.find(cluster, name)
        if not follow:
            for line in read(cluster, handle, rank):
                typer.echo(line)
            return
        with streaming(cluster, handle, typer.echo, rank):
            *_, last = jobs.statuses(cluster, handle)
        typer.echo(f"{handle}: {last}", err=True)


@app.command()
def status(
    name: Annotated[str, typer.Argument(help="the job's name; default: all jobs")] = "",
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """Show how jobs stand, and why one does not run."""
    from pipelines.cluster import jobs

    with one_line_errors(), unreachable_is_again():
        cluster = _connect(namespace, context)
        if name:
            handle = jobs.find(cluster, name)
            typer.echo(f"{handle}: {jobs.look(cluster, handle)}")
            return
        table = Table("job", "kind", "status", box=None)
        for handle in jobs.find_all(cluster):
            table.add_row(handle.name, handle.kind.name, str(jobs.look(cluster, handle)))
        Console(width=None if sys.stdout.isatty() else 200).print(table)


@app.command()
def cancel(
    name: NameArgument,
    if_there: Annotated[bool, typer.Option("--if-there", help="one that is gone already is fine")] = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """Delete a job with its pods; its checkpoints stay on the volume."""
    from pipelines.cluster import jobs

    with one_line_errors(), unreachable_is_again():
        cluster = _connect(namespace, context)
        handle = jobs.find_if_there(cluster, name) if if_there else jobs.find(cluster, name)
        if handle is None:
            typer.echo(f"{name}: not there")
            return
        jobs.cancel(cluster, handle)
        typer.echo(f"{handle}: deleted")


def read_manifest(place: str, only: str = "") -> tuple[dict, list[dict]]:
    """The one job in a manifest and the Services beside it.

    Args:
        place: a YAML file, a kustomize folder, or `-` for standard input.
        only: name of the job, if there are several.

    Raises:
        UserError: if it cannot be read, or does not hold one job.
    """
    from pipelines.cluster.jobs import KINDS

    documents = [d for d in parse_yaml_documents(_text(place), place) if isinstance(d, dict)]
    found = {d["metadata"]["name"]: d for d in documents if d.get("kind") in KINDS and "name" in d.get("metadata", {})}
    chosen = {only: found[only]} if only in found else found if not only else {}
    if len(chosen) != 1:
        raise UserError(f"{place}: name one job by --only; it holds: {', '.join(sorted(found)) or 'none'}")
    [(name, job)] = chosen.items()
    services = [d for d in documents if d.get("kind") == "Service" and d["metadata"]["name"] == name]
    return job, services


def _namespace_of(document: dict, given: str | None) -> str | None:
    """Where a manifest says it belongs, as kubectl has it: an option may not say otherwise."""
    own = document["metadata"].get("namespace")
    if own and given and own != given:
        raise UserError(f"--namespace {given}: {document['metadata']['name']} is for namespace {own}; leave it out")
    return given or own


def _text(place: str) -> str:
    if place == "-":
        return sys.stdin.read()
    path = Path(place)
    if path.is_file():
        return read_text(path)
    if not (path / "kustomization.yaml").is_file():
        raise UserError(f"{place}: neither a YAML file nor a folder with a kustomization.yaml")
    tools = {"kustomize": ["build"], "kubectl": ["kustomize"]}
    tool = next((name for name in tools if shutil.which(name)), None)
    if tool is None:
        raise UserError(f"{place}: a kustomize folder needs kustomize or kubectl on the PATH; or give a YAML file")
    done = subprocess.run([tool, *tools[tool], str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{place}: {done.stderr}")
    return done.stdout


def _labels(pairs: list[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    bad = [pair for pair, (key, sign, _) in zip(pairs, split, strict=True) if not (key and sign)]
    if bad:
        raise UserError(f"--node-selector {bad[0]!r}: write it as label=value")
    return {key: value for key, _, value in split}


def _connect(namespace: str | None, context: str | None) -> Cluster:
    from pipelines.cluster.connect import connect

    return connect(namespace, context)


def _run_of(cluster: Cluster) -> dict | None:
    """The pipeline run that a step's job belongs to, as an owner reference; None outside a run."""
    from pipelines.cluster.runs import owner_reference

    name = os.environ.get(WORKFLOW, "")
    return owner_reference(cluster, name) if name else None


def _wait(cluster: Cluster, handle: Handle, minutes: int) -> int:
    """Follow the job to its end and say by an exit code how it ended."""
    from pipelines.cluster import jobs
    from pipelines.cluster.logs import streaming

    with streaming(cluster, handle, typer.echo):
        last = jobs.wait(cluster, handle, _say, 60.0 * minutes)
    if last.state == jobs.SUCCEEDED:
        return 0
    _say(f"danceopd: {handle}: {last}")
    return ExitCode.BAD_INPUT if last.user_error else ExitCode.FAILED


def _say(line: str) -> None:
    typer.echo(line, err=True)


class Stopped(Exception):
    """Whoever submits or follows a job was told to stop; the job was not."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


@contextmanager
def _stopped(cluster: Cluster, name: str) -> Iterator[None]:
    """SIGTERM or SIGINT within the block ends the command, and the job too if its run was cancelled."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(ExitCode.CTRL_C if number == signal.SIGINT else ExitCode.INTERRUPTED)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Stopped as stopped:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # the clean-up is short, and is not to be stopped
        _leave(cluster, name)
        raise typer.Exit(stopped.code) from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(cluster: Cluster, name: str) -> None:
    """What is done with the job when the command is told to stop; a cluster that is away is not waited for."""
    from pipelines.cluster import jobs
    from pipelines.cluster.runs import was_cancelled

    cluster = replace(cluster, patience=LAST_PATIENCE)
    run = os.environ.get(WORKFLOW, "")
    cancelled = bool(run) and was_cancelled(cluster, run)
    handle = jobs.find_if_there(cluster, name)
    if handle is None:
        _say(f"{name}: was not submitted yet; nothing runs")
    elif cancelled:
        jobs.cancel(cluster, handle)
        _say(f"{handle}: deleted, since its run was cancelled")
    else:
        _say(f"{name} runs on; submit it again to follow it, or: danceopd job cancel {name}")


@contextmanager
def unreachable_is_again() -> Iterator[None]:
    """Within the block a cluster that stays away ends the command with one line and code 75."""
    from pipelines.cluster.connect import Unreachable

    try:
        yield
    except Unreachable as error:
        typer.echo(f"danceopd: {error}; what runs there runs on: try again", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from error
