"""The pipeline on one machine, through kfp's own local runner: the same function that compiles for a cluster."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import local

from components.cards import card_problem
from components.checking import inputs_revision
from components.running import RUN_ID, failures, notes_folder, read_notes
from danceopd.backbones.bases import SHIPPED
from danceopd.config.recipe import FinetunedTeacher, Recipe
from danceopd.devices import small_threads, usable_cores
from danceopd.errors import Interrupted
from danceopd.files import read_json
from danceopd.workspace import STEP, code_revision
from pipelines.distillation import build_pipeline
from pipelines.one_line import StepFailed
from pipelines.options import PipelineOptions, Threads
from pipelines.placement import Placement
from pipelines.processes import stoppable_steps
from pipelines.steplog import readable_steps
from pipelines.warming import warm_imports

log = logging.getLogger(__name__)
PARALLEL_STEPS = 2  # kfp's local runner never has more of a ParallelFor under way
_ANSI_COLOR = re.compile(r"\x1b\[\d+m")


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        metrics: the evaluation's `metrics.json`.
        registration: what was registered, or why not.
        shortfalls: which gates failed by how much, and what to try; see `danceopd.evaluation.shortfalls`.
        report: the evaluation's HTML report.
        notes: the folder with the run's notes and `summary.md`.
    """

    metrics: dict[str, Any]
    registration: dict[str, Any]
    shortfalls: list[str]
    report: Path
    notes: Path


def run_local(recipe: Recipe, workspace: Path, fresh: bool = False) -> Summary:
    """Run the whole chain here, step logs on standard output as they come.

    Steps whose inputs, data and code are unchanged, and whose products still lie in the workspace, are not run again.

    Args:
        recipe: what to run.
        workspace: folder for everything the run makes; made if need be.
        fresh: forget earlier products and run every step.

    Raises:
        StepFailed: if a step ended badly; a student that fails a gate is an outcome, not a failure of its step here.
        UserError: if the data's revision cannot be told.
    """
    workspace = Path(workspace).resolve()
    cache = workspace / "kfp" / "cache"
    if fresh:
        forget_products(workspace)
    drop_stale_entries(cache)
    once = Placement(retries=0)  # an unchanged machine fails the same way again
    options = PipelineOptions(placement=once, threads=share_cores(recipe))
    arguments = {
        "recipe": recipe.model_dump_json(),
        "data_revision": inputs_revision(recipe, workspace),
        "code_revision": code_revision(),
        "workspace": str(workspace),
        "tracking_uri": os.environ.get("MLFLOW_TRACKING_URI", ""),
    }
    run = uuid.uuid4().hex[:12]
    try:
        with warm_imports():
            run_here(build_pipeline(options), arguments, workspace, run)
    except StepFailed:
        if not _gates_failed(workspace, run):
            raise
    return _summary(workspace, run)


def run_here(pipeline: Callable, arguments: dict[str, Any], workspace: Path, run: str) -> Any:
    """Run a pipeline's steps as processes on this machine; returns the runner's task, whose outputs are set.

    Raises:
        StepFailed: if a step ended badly.
        Interrupted: if it was asked to end (Ctrl-C, SIGTERM); its running steps have saved what they could.
    """
    # no workspace_root: the runner deletes that folder when it is done
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(workspace / "kfp"),
        enable_caching=True,
        cache_root=str(workspace / "kfp" / "cache"),
    )
    with _run_id(run), readable_steps(), stoppable_steps() as steps:
        try:
            return pipeline(**arguments)
        except RuntimeError as error:
            told = _failure(workspace, run, error)
            if steps.asked:
                raise Interrupted(f"{told}; no other step was started") from error
            raise StepFailed(told) from error


def share_cores(recipe: Recipe) -> Threads:
    """Threads for teachers that train side by side, and for the steps that run alone.

    For the small worlds few: one for teachers, two of which train at a time, and `small_threads()` for the others.
    """
    if recipe.model.base in SHIPPED:
        return Threads(finetune=1, others=small_threads())
    cores = usable_cores()
    trained = sum(isinstance(teacher, FinetunedTeacher) for teacher in recipe.teachers.values())
    return Threads(finetune=max(1, cores // max(1, min(trained, PARALLEL_STEPS))), others=cores)


def forget_products(workspace: Path) -> None:
    """Remove what earlier runs made below `workspace`: products, checkpoints, the runner's own. Nothing else."""
    for name in ("kfp", "checkpoints"):
        shutil.rmtree(workspace / name, ignore_errors=True)
    for marker in list(workspace.glob(f"*/*/{STEP}")):
        shutil.rmtree(marker.parent)


def drop_stale_entries(cache: Path) -> list[str]:
    """Remove the runner's cache entries whose cards name products that are gone or changed; says why for each."""
    problems = []
    for entry in sorted(cache.glob("*.json")):
        problem = next(filter(None, map(_card_problem, _artifacts(json.loads(entry.read_text())))), None)
        if problem:
            entry.unlink()
            problems.append(problem)
    return problems


def _card_problem(metadata: dict) -> str | None:
    return card_problem(metadata["folder"], metadata["digest"]) if "folder" in metadata else None


def _artifacts(value: Any) -> Iterator[dict]:
    """The metadata of every artifact in a cache entry."""
    if isinstance(value, dict) and isinstance(value.get("metadata"), dict):
        yield value["metadata"]
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _artifacts(item)


@contextmanager
def _run_id(run: str) -> Iterator[None]:
    before = os.environ.get(RUN_ID)
    os.environ[RUN_ID] = run
    try:
        yield
    finally:
        os.environ.pop(RUN_ID)
        if before is not None:
            os.environ[RUN_ID] = before


def _failure(workspace: Path, run: str, error: RuntimeError) -> str:
    return "\n".join(failures(read_notes(workspace, run))) or _ANSI_COLOR.sub("", str(error))


def _registration(workspace: Path, run: str) -> dict[str, Any]:
    """The note of the step that registers, or nothing if it has not begun."""
    return next((note for note in read_notes(workspace, run) if note["step"] == "register"), {})


def _gates_failed(workspace: Path, run: str) -> bool:
    registration = _registration(workspace, run).get("registration")
    return registration is not None and not registration["registered"]


def _summary(workspace: Path, run: str) -> Summary:
    note = _registration(workspace, run)
    evaluation = Path(note["evaluation"])
    metrics = read_json(evaluation / "metrics.json")
    report, notes = evaluation / "report.html", notes_folder(workspace, run)
    return Summary(metrics, note["registration"], note["shortfalls"], report, notes)
