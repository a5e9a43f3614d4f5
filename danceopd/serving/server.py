"""The HTTP server around the app: starts, tells when the model is there, and ends quietly when told to."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from danceopd.serving.app import build_app
from danceopd.serving.metrics import Metrics
from danceopd.serving.schema import Limits
from danceopd.serving.worker import Served, Worker

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Ends with code 0 on SIGTERM and SIGINT: the request in work is finished, those that wait are refused."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT  # asked twice
        self.should_exit = True
        # A handler may interrupt a thread that holds the worker's lock.
        threading.Thread(target=self._worker.close, daemon=True).start()


def run_server(
    load: Callable[[Metrics], Served],
    listener: socket.socket,
    name: str,
    limits: Limits,
    key: str | None,
    places: int,
    grace: int,
    hosts: list[str] | None,
    tell: Callable[[], None],
    follow: Callable[[Worker, threading.Event], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        load: opens the student, while the server answers that it is not ready; it is given the server's figures.
        listener: the bound socket.
        name: of the model.
        limits: of a request.
        key: bearer key, or None.
        places: requests that may wait.
        grace: seconds for the request in work at the end.
        hosts: names the server answers to; None: any.
        tell: called once the model is there.
        follow: keeps the worker at a registered model's alias until the event is set; called on a thread of its own.

    Raises:
        Exception: what `load` raised.
    """
    metrics = Metrics(places)
    worker = Worker(lambda: load(metrics), places, metrics)
    over = threading.Event()
    app = build_app(worker, metrics, name, limits, key, hosts)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=grace, lifespan="off"
    )
    server = _Server(config, worker)
    if hosts is None and key is None:
        log.warning("anyone who reaches %s may draw; set DANCEOPD_API_KEY to ask for a key", listener.getsockname()[0])

    def watch() -> None:
        worker.settled.wait()
        if worker.failure is None:
            tell()
            if follow is not None:
                threading.Thread(target=follow, args=(worker, over), daemon=True, name="following the alias").start()
        server.should_exit = server.should_exit or worker.failure is not None

    worker.start()
    threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listener])
    over.set()
    worker.close()
    worker.join(grace)
    if worker.failure is not None:
        raise worker.failure
    log.info("stopped")
