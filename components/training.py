"""Where a student is trained: in the step's own process, one process per GPU of its pod, or a job on several nodes.

A step may not import what speaks to Kubernetes (`pipelines.cluster`); it runs `danceopd job`, as a person would, whose
exit codes and behaviour on a signal are made for it: the job of a run is found again by the step's next pod, and goes
when its run is cancelled.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.commands import hand_over
from components.running import RUN_ID, Step, notes_folder
from danceopd.devices import usable_cores
from danceopd.errors import UserError, unknown_name
from danceopd.files import write_atomic
from danceopd.tracking.mlflow_store import ENVIRONMENT
from danceopd.workspace import Product

STEP, JOB, TRAIN_JOB = "step", "Job", "TrainJob"
WAYS = (STEP, JOB, TRAIN_JOB)
OF_RUNTIME = ("node-selector", "toleration")  # a TrainJob's nodes are its TrainingRuntime's
WATCHING = {"cpu": "500m", "memory": "2Gi"}  # of a step that only follows a job
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """How a run distills.

    Attributes:
        on: step (the step's own pod), Job or TrainJob.
        nodes: that train together; 1 for the step's own pod.
        gpus: of each node; 0: CPU.
    """

    on: str = STEP
    nodes: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.on not in WAYS:
            raise unknown_name("distill_on", self.on, WAYS)
        if self.nodes < 1 or self.gpus < 0:
            raise UserError(f"nodes {self.nodes}, gpus {self.gpus}: at least 1 node, and 0 or more GPUs")
        if self.on == STEP and self.nodes > 1:
            raise UserError(f"nodes {self.nodes}: a step's own pod is on one; set distill_on to Job or TrainJob")


def pod_of(way: Way, placement: Mapping[str, Any]) -> dict[str, Any]:
    """What the distillation step's own pod asks for.

    Args:
        way: how the run distills.
        placement: what the pipeline was compiled with: `accelerator` (resource, or empty), `node_selector`, `cpu` and
            `memory` (requests).

    Returns:
        `gpus`, `cpu` and `memory` as text, and `nodes`, a node selector. A step that follows a job asks for little.

    Raises:
        UserError: if GPUs are asked for that the pipeline was compiled without.
    """
    if way.gpus and not placement["accelerator"]:
        raise UserError(f"gpus {way.gpus}: this pipeline was compiled for CPUs; compile it with --placement, or set 0")
    own = way.on == STEP
    size = {name: placement[name] for name in WATCHING} if own else WATCHING
    return {
        **size,
        "gpus": str(way.gpus if own else 0),
        "nodes": placement["node_selector"] if own and way.gpus else {},
    }


def train_student(
    step: Step,
    base: Product,
    data: Product,
    teachers: dict[str, Product],
    way: Way,
    job: Mapping[str, Any],
    tracking_uri: str = "",
) -> Product:
    """The student: found, or trained where the run says.

    Args:
        step: that wants it.
        base: its base.
        data: its dataset.
        teachers: by name.
        way: how the run distills.
        job: options of `danceopd job render` that say what a job's pods are and take.
        tracking_uri: where other processes of this pod find a champion; a job's pods know from the ConfigMap
            `danceopd-tracking`; empty: as this process does.

    Raises:
        UserError: for bad input.
        Interrupted: if the training was stopped, and can be resumed.
        RuntimeError: if it failed.
    """
    from danceopd import steps  # loads torch, which whoever only compiles or submits does without

    run = steps.Run(step.recipe, step.workspace, base, data)
    if way.on == STEP and way.gpus <= 1:
        return steps.distill_student(run, teachers)
    folder = steps.student_folder(run, teachers)
    if not (folder / steps.STEP).is_file():
        recipe = _recipe_file(step)
        if way.on == STEP:
            variables = {"OMP_NUM_THREADS": str(max(1, usable_cores() // way.gpus))}
            variables |= {ENVIRONMENT: tracking_uri} if tracking_uri else {}
            hand_over(f"training on {way.gpus} GPUs", own_pod_command(way, recipe, step.workspace), variables)
        else:
            _train_by_job(step, way, job, recipe)
    return steps.open_product(folder)


def own_pod_command(way: Way, recipe: Path, workspace: Path) -> list[str]:
    """What trains on all GPUs of this pod."""
    workers = ["--standalone", "--nproc-per-node", str(way.gpus), "-m", "danceopd"]
    return ["danceopd.launch", *workers, "distill", "--recipe", str(recipe), "--workspace", str(workspace)]


def job_commands(
    way: Way, job: Mapping[str, Any], recipe: Path, workspace: Path, name: str, manifest: Path
) -> list[list[str]]:
    """What makes a job's manifest, and what submits and follows it."""
    given = {option: value for option, value in job.items() if way.on == JOB or option not in OF_RUNTIME}
    fixed = {
        "kind": way.on,
        "nodes": way.nodes,
        "gpus": way.gpus,
        "name": name,
        "recipe": recipe,
        "workspace": workspace,
        "out": manifest,
    }
    render = ["danceopd", "job", "render", "distill", *_words(fixed | given)]
    return [render, ["danceopd", "job", "submit", str(manifest), "--wait"]]


def job_name() -> str:
    """One per run: a step that is tried again finds the job of its first pod."""
    run = re.sub(r"[^a-z0-9]", "", os.environ.get(RUN_ID, "run").lower())
    return f"danceopd-distill-{run[:12]}"


def _train_by_job(step: Step, way: Way, job: Mapping[str, Any], recipe: Path) -> None:
    name = job_name()
    log.info("training as %s %s on %d nodes", way.on, name, way.nodes)
    manifest = notes_folder(step.workspace) / f"{name}.yaml"  # where the run's summary looks for it
    for command in job_commands(way, job, recipe, step.workspace, name, manifest):
        hand_over(f"{way.on} {name}", command)


def _recipe_file(step: Step) -> Path:
    """The run's recipe where other processes and pods can read it."""
    path = step.workspace / "recipes" / f"{step.recipe.name}-{step.recipe.digest()}.yaml"
    return write_atomic(path, yaml.safe_dump(step.recipe.model_dump(mode="json"), sort_keys=False))


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them; a list's once a value."""
    pairs = [(o, v) for o, value in options.items() for v in (value if isinstance(value, list | tuple) else [value])]
    return [word for option, value in pairs for word in (f"--{option}", str(value))]
