"""Progress of long work: a live bar on a terminal, plain lines every so often in a pod's log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class StepProgress:
    """Counts steps of one loop and shows the figures it is given.

    Args:
        label: what is running.
        total: number of steps.
        every: steps between plain lines.
    """

    def __init__(self, label: str, total: int, every: int):
        self.label, self.total, self.every = label, total, every
        self._started, self._first = time.monotonic(), 0
        self._bar: Progress | None = None

    def steps(self, start: int = 0) -> Iterator[int]:
        """Yield step numbers from `start`; call `show` inside the loop."""
        self._started, self._first = time.monotonic(), start
        if not sys.stderr.isatty():
            yield from range(start, self.total)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as self._bar:
            self._task = self._bar.add_task(self.label, total=self.total, completed=start)
            for step in range(start, self.total):
                yield step
                self._bar.advance(self._task)
        self._bar = None

    def show(self, step: int, **figures: float) -> None:
        """Report figures of a step; a plain line only every `every` steps and at the last."""
        text = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self.label} {text}")
        elif (step + 1) % self.every == 0 or step + 1 == self.total:
            pace = (time.monotonic() - self._started) / (step + 1 - self._first)
            log.info("%s step %d/%d %s (%.0f ms per step)", self.label, step + 1, self.total, text, 1000 * pace)
