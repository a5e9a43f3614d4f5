"""The machine's load while a step runs, for MLflow's system metrics."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

from danceopd.tracking import mlflow_store
from danceopd.tracking.journal import Journal

log = logging.getLogger(__name__)

SYSTEM = "system/"  # MLflow shows what is called so as system metrics


_FIRST, _EVERY = 60.0, 10.0  # seconds; MLflow is slow to import, which a short step is spared


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
    mlflow_store.import_mlflow()
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
