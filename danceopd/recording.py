"""What each step writes into its journal: settings, data, curves, sample grids, models, the machine's load."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from danceopd import tracking
from danceopd.journal import DatasetUse, Journal, ending, open_journal
from danceopd.recipe import Recipe

log = logging.getLogger(__name__)
TRAINING, EVALUATION = "training", "evaluation"
SYSTEM = "system/"  # MLflow shows what is called so as system metrics
_FIRST, _EVERY = 60.0, 10.0  # seconds; MLflow is slow to import, which a short step is spared


def begin(
    recipe: Recipe,
    workspace: Path,
    product: str,
    title: str,
    params: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    context: str = TRAINING,
) -> Journal:
    """Open a step's journal and say what it is about.

    Args:
        recipe: names experiment and dataset.
        workspace: folder all steps share.
        product: name of the journal.
        title: of the run in lists.
        params: settings that decide this step.
        data: facts of the dataset it reads, or None.
        context: what it reads it for, training or evaluation.
    """
    journal = open_journal(workspace, product)
    journal.start(title, recipe.register_as.experiment, params, {"recipe": recipe.digest(), "recipe_name": recipe.name})
    if data is not None:
        source = {name: data[name] for name in ("dvc", "git") if data.get(name)} or {"folder": str(data["dataset"])}
        journal.dataset(DatasetUse(recipe.name, data["content"], source, context, data["counts"]))
    return journal


def entry(journal: Journal, name: str, found: Mapping[str, Any]) -> None:
    """One entry of a training history: figures by step, and a validated state as a model with its scores."""
    step = found["step"]
    values = _losses("loss", found["loss"]) | {name: found.get(name) for name in ("grad_norm", "forwards_per_sample")}
    journal.points(step, values)
    if validated := found.get("validation"):
        state = f"{journal.folder.name if journal.folder else ''}-step-{step}"
        journal.model(f"{name}-step-{step}", state, step, {"best_step": found["best_step"]})
        scores = {f"validation/{key}": value for key, value in by_task(validated["figures"]).items()}
        journal.points(step, {"validation/margin": validated["score"]} | scores, model=state)


def _losses(name: str, loss: float | Mapping[str, float]) -> dict[str, float | None]:
    """One loss, or one a task."""
    return {f"{name}/{task}": v for task, v in loss.items()} if isinstance(loss, Mapping) else {name: loss}


def model_made(journal: Journal, name: str, folder: Path, digest: str, facts: Mapping[str, Any]) -> None:
    """A teacher or student that is finished, with what was measured of it."""
    step = facts.get("steps", 0)
    journal.model(name, digest, step, {"folder": str(folder), "kind": facts.get("kind", "student")})
    scores = {
        f"{who}/{task}/{key}": value
        for task, row in facts.get("scores", {}).items()
        for who, of in row.items()
        for key, value in of.items()
    }
    journal.points(step, scores | _losses("final_loss", facts.get("loss", {})), model=digest)


def evaluated(journal: Journal, metrics: Mapping[str, Any], folder: Path, student: str) -> None:
    """An evaluation: the student's figures as its model's, those of the others beside them, and the report."""
    journal.uses(student)
    for field, tasks in metrics["scores"].items():
        values = by_task(tasks)
        if field == "student":
            journal.points(0, values, model=student)
        else:
            journal.points(0, {f"{field}/{name}": value for name, value in values.items()})
    for name in ("report.html", "report.md", "metrics.json"):
        if (folder / name).is_file():
            journal.file(folder / name, EVALUATION)


def by_task(scores: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """A field's scores as {task/metric: value}."""
    return {f"{task}/{name}": value for task, row in scores.items() for name, value in row.items()}


@contextmanager
def recorded(workspace: Path, product: str) -> Iterator[None]:
    """Note how a step ended and, if it takes a while, what it did to the machine."""
    with ending(open_journal(workspace, product)), SystemWatch(open_journal(workspace, product)):
        yield


class SystemWatch:
    """MLflow's own system metrics (processor, memory, disk, network, GPUs), written into a journal by a thread.

    MLflow's `SystemMetricsMonitor` itself needs a store that answers; its parts, which measure, do not.
    """

    def __init__(self, journal: Journal, first: float = _FIRST, every: float = _EVERY):
        self._journal, self._first, self._every = journal, first, every
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SystemWatch:
        if self._journal.folder is not None:
            self._thread = threading.Thread(target=self._run, name="danceopd-system-metrics", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        if self._stop.wait(self._first):
            return
        monitors, step = _monitors(), self._journal.next_step(SYSTEM)
        while True:
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            self._journal.points(step, {f"{SYSTEM}{name}": value for name, value in values.items()})
            step += 1
            if self._stop.wait(self._every):
                return


def _monitors() -> list[Any]:
    tracking.import_mlflow()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    found = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    reasons = []
    for gpus in (GPUMonitor, ROCMMonitor):
        try:
            return [*found, gpus()]
        except Exception as error:  # its package is missing, or no such GPU is there
            reasons.append(" ".join(str(error).split()))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        log.warning("no system metrics of the GPUs: %s", reasons[0 if torch.version.hip is None else 1])
    return found
