"""A registered model that is served by its alias: the version it names is brought here, tried, and takes over.

A new champion is loaded beside the one that serves and draws a probe picture; only then does it take over, between two
requests. Moved back, the alias brings the earlier version back, which lies here still.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from danceopd.errors import UserError
from danceopd.inference.generate import Drawer, Sample, open_student
from danceopd.registry.champion_teacher import Champion, fetch_champion
from danceopd.registry.register import WEIGHTS
from danceopd.registry.versions import RegisteredModel
from danceopd.serving.metrics import Metrics
from danceopd.serving.reference import Reference
from danceopd.serving.worker import Served, Worker
from danceopd.tracking import mlflow_store

log = logging.getLogger(__name__)


def try_out(drawer: Drawer, what: str) -> Drawer:
    """Draw a probe picture, so that what cannot draw is found before anyone asks it to.

    Raises:
        UserError: if it fails, or draws nothing but one color.
    """
    try:
        [picture] = drawer.draw_samples([Sample("a picture", steps=1)])
    except Exception as error:
        raise UserError(f"{what}: cannot draw a probe picture ({error}); it is not served") from error
    if all(len(set(band.getextrema())) == 1 for band in picture.convert("RGB").split()):
        raise UserError(f"{what}: its probe picture is of one color; it is not served")
    return drawer


def from_folder(folder: Path, dtype: str | None) -> Callable[[Metrics], Served]:
    """Loads a student from its folder, and tries it."""
    return lambda _: Served(try_out(open_student(folder, dtype), str(folder)))


def following(
    reference: Reference, tracking_uri: str, cache: Path, dtype: str | None, every: float
) -> tuple[Callable[[Metrics], Served], Callable[[Worker, threading.Event], None]]:
    """Loads what an alias names, and keeps a worker at it; see `Follower`."""
    made: list[Follower] = []

    def load(metrics: Metrics) -> Served:
        made.append(Follower(reference, tracking_uri, cache, lambda folder: open_student(folder, dtype), metrics))
        return made[0].first()

    return load, lambda worker, over: made[0].run(worker, every, over)


class Follower:
    """Keeps a worker at the version that an alias names.

    Args:
        reference: what to follow.
        tracking_uri: of the registry.
        cache: folder for versions; it holds the one that serves and the one before.
        open_folder: loads a student.
        metrics: told of versions, failures, and of how long the registry has been silent.
    """

    def __init__(
        self,
        reference: Reference,
        tracking_uri: str,
        cache: Path,
        open_folder: Callable[[Path], Drawer],
        metrics: Metrics,
    ):
        self._reference, self._uri, self._cache = reference, tracking_uri, Path(cache)
        self._open, self._metrics = open_folder, metrics
        self._refused = ""  # version that could not be loaded, said once
        self._silent = False  # whether the registry's silence was said

    def first(self) -> Served:
        """The version that the alias names now.

        Raises:
            UserError: if the registry does not answer, or the version cannot be served.
        """
        served = self._load(self._named())
        self._metrics.serves(served.version)
        self._metrics.alias_seen(time.monotonic())
        return served

    def run(self, worker: Worker, every: float, over: threading.Event) -> None:
        """Look at the alias now and then, until `over` is set."""
        while not over.wait(every):
            self.look(worker)

    def look(self, worker: Worker) -> None:
        """Look at the alias once; if it names another version, let that take over."""
        try:
            version = self._named()
        except UserError as error:
            if not self._silent:
                log.warning("%s; version %s goes on serving", error, worker.version)
            self._silent = True
            return
        self._silent = False
        self._metrics.alias_seen(time.monotonic())
        number = str(version.version)
        if number == worker.version:
            self._metrics.rollover_failing(False)
            return
        try:
            served = self._load(version)
        except UserError as error:
            if number != self._refused:
                log.warning("%s; version %s goes on serving", error, worker.version)
            self._refused = number
            self._metrics.rollover_failing(True)
            return
        self._refused = ""
        before = worker.version
        worker.replace(served)
        self._metrics.rolled_over(served.version)
        log.info("%s is version %s now, before it version %s", self._reference, served.version, before)
        self._forget({number, before})

    def _named(self) -> Any:
        """The model version behind the alias."""
        if not mlflow_store.answers(self._uri):
            raise UserError(f"MLflow store {mlflow_store.redact(self._uri)} does not answer")
        from mlflow.exceptions import MlflowException

        try:
            return RegisteredModel(mlflow_store.open_client(self._uri), self._reference.model).find(
                self._reference.alias
            )
        except MlflowException as error:
            raise UserError(f"{self._reference}: {mlflow_store.redact(str(error))}") from error

    def _load(self, version: Any) -> Served:
        number = str(version.version)
        what = f"{self._reference.model} version {number}"
        return Served(try_out(self._open(self._bring(version)), what), number)

    def _bring(self, version: Any) -> Path:
        """A version's pipeline folder here, whole or not at all."""
        folder = self._place(str(version.version))
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        tags = version.tags
        champion = Champion(self._reference.model, str(version.version), tags.get("student", ""), tags.get(WEIGHTS))
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as scratch:
            fetch_champion(champion, self._uri, Path(scratch)).rename(folder)
        return folder

    def _place(self, number: str) -> Path:
        return self._cache / self._reference.model / number

    def _forget(self, kept: set[str]) -> None:
        for folder in self._place("").iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)
