"""One thread that owns the model: it loads it, and then draws what waits in a short queue, one request at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from danceopd.inference.generate import Drawer, Sample
from danceopd.serving.errors import RequestError
from danceopd.serving.metrics import Metrics


@dataclass(frozen=True, eq=False)
class Served:
    """What draws.

    Attributes:
        drawer: the student.
        version: of the registered model; empty: a folder.
    """

    drawer: Drawer
    version: str = ""


@dataclass(frozen=True, eq=False)
class Job:
    """One request's pictures to draw, all by one student, and where its answer is awaited."""

    samples: list[Sample]
    served: Served
    answer: Future[list[Image.Image]] = field(default_factory=Future)


class Worker:
    """Draws on a thread of its own.

    Args:
        load: opens the first student; called once, on the thread.
        places: jobs that may wait beside the one in work.
        metrics: told what happens.
    """

    def __init__(self, load: Callable[[], Served], places: int, metrics: Metrics):
        self._load, self._places, self._metrics = load, places, metrics
        self._jobs: deque[Job] = deque()
        self._change = threading.Condition(threading.RLock())  # of the queue, or of whether it is open
        self._closed = False
        self._in_work = 0  # pictures
        self._pace = 1.0  # seconds a picture takes, as the last job took
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self.served: Served | None = None
        self.failure: Exception | None = None
        self.settled = threading.Event()  # loaded, or failed to

    @property
    def ready(self) -> bool:
        """Whether the model is there and requests are taken."""
        return self.served is not None and not self._closed

    @property
    def version(self) -> str:
        """Of the student that new requests are drawn by; empty: a folder, or none yet."""
        return self.served.version if self.served is not None else ""

    def replace(self, served: Served) -> None:
        """Let another student draw what is asked from now on; jobs that were taken keep the one they were taken for."""
        with self._change:
            self.served = served

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def admit(self) -> Served:
        """The student, if a job would be taken now.

        Raises:
            RequestError: 503 before the model is there and once the worker is closing, 429 if the queue is full.
        """
        with self._change:
            if self._closed:
                raise _closing()
            if self.served is None:
                raise RequestError(503, "the model is being loaded; come again", None, "model_not_ready", 5)
            if len(self._jobs) >= self._places:
                pictures = self._in_work + sum(len(job.samples) for job in self._jobs)
                told = f"{len(self._jobs)} requests wait already; come again later"
                raise RequestError(429, told, None, "queue_full", max(1, min(600, round(pictures * self._pace))))
            return self.served

    def submit(self, samples: list[Sample], served: Served) -> Job:
        """Queue samples; the job's answer holds their pictures, in order.

        Args:
            samples: what to draw.
            served: what `admit` returned when they were asked for.

        Raises:
            RequestError: as `admit` does.
        """
        job = Job(samples, served)
        with self._change:
            self.admit()
            self._jobs.append(job)
            self._changed()
        return job

    def withdraw(self, job: Job) -> bool:
        """Take a job that waits out of the queue; False if it is in work or done."""
        with self._change:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
            self._changed()
        return True

    def close(self) -> None:
        """Take no more, and refuse those that wait. The one in work is finished."""
        with self._change:
            refused, self._closed = list(self._jobs), True
            self._jobs.clear()
            self._changed()
        for job in refused:
            job.answer.set_exception(_closing())

    def join(self, seconds: float) -> None:
        """Wait for the job in work, at most this long."""
        self._thread.join(seconds)

    def _changed(self) -> None:
        self._metrics.waiting(len(self._jobs))
        self._change.notify_all()

    def _run(self) -> None:
        try:
            self.served = self._load()
        except Exception as error:  # told by who started the server
            self.failure = error
            return
        finally:
            self.settled.set()
        self._metrics.ready(True)
        while (job := self._next()) is not None:
            self._draw(job)
        self._metrics.ready(False)

    def _next(self) -> Job | None:
        """The job that waits longest; None once the worker is closed."""
        with self._change:
            self._in_work = 0
            self._change.wait_for(lambda: self._jobs or self._closed)
            if self._closed:
                return None
            job = self._jobs.popleft()
            self._in_work = len(job.samples)
            self._changed()
            return job

    def _draw(self, job: Job) -> None:
        started = time.monotonic()
        try:
            # In batches of one, so that a picture is to the bit what `danceopd generate` draws.
            pictures = job.served.drawer.draw_samples(job.samples)
        except Exception as error:
            job.answer.set_exception(error)
            return
        seconds = time.monotonic() - started
        self._pace = seconds / len(job.samples)
        self._metrics.drawn(len(job.samples), seconds)
        job.answer.set_result(pictures)


def _closing() -> RequestError:
    return RequestError(503, "the server is shutting down; come again", None, "shutting_down", 10)
