"""Makes kfp's local runner readable: the steps' own lines, live and whole, without the frame it puts around them."""

from __future__ import annotations

import builtins
import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

_FRAME = re.compile(r"-*|\[KFP Executor \S+ \S+ (DEBUG|INFO)\]:.*")
_INPUT_DUMP = "Got executor_input:"
_CACHE_HIT = re.compile(r"Task (?P<task>\S+) cache hit")
_FAILURE = re.compile(r"Task \S+ finished with status")  # the step has said so itself, and why
_INDENT = " " * 4


class StepLog(io.TextIOBase):
    """A text stream that passes on the lines that steps wrote, each whole, from however many threads.

    kfp's runner prints an indentation and a line in two calls, in one thread per parallel step; blank lines, rules
    and a dump of every step's inputs come with it.

    Args:
        out: where the lines go.
    """

    def __init__(self, out: TextIO):
        self._out = out
        self._lock = threading.Lock()
        self._state = threading.local()

    def writable(self) -> bool:
        """Whether text can be written: always."""
        return True

    def write(self, text: str) -> int:
        """Take any piece of text; lines come out when they are complete."""
        if text == _INDENT and not self._pending():
            return len(text)
        *lines, rest = (self._pending() + text).split("\n")
        self._state.pending = rest
        for line in lines:
            if self._wanted(line):
                self.say(line)
        return len(text)

    def say(self, line: str) -> None:
        """Pass on one line as it is."""
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()

    def _pending(self) -> str:
        return getattr(self._state, "pending", "")

    def _wanted(self, line: str) -> bool:
        if getattr(self._state, "in_dump", False):
            self._state.in_dump = line != "}"
            return False
        self._state.in_dump = line.endswith(_INPUT_DUMP)
        return not _FRAME.fullmatch(line.rstrip())


class _RunnerRecords(logging.Filter):
    """Keeps the runner's warnings, drops what steps say better themselves, and names the steps taken from the cache."""

    def __init__(self, log: StepLog):
        super().__init__()
        self._log = log

    def filter(self, record: logging.LogRecord) -> bool:
        hit = _CACHE_HIT.match(record.getMessage())
        if hit:
            self._log.say(f"{hit['task']} | nothing changed: reused")
        return record.levelno >= logging.WARNING and not _FAILURE.match(record.getMessage())


@contextmanager
def readable_steps(out: TextIO | None = None) -> Iterator[None]:
    """Within the block, kfp's local runner writes readable step logs to `out` (default: standard output).

    The runner changes `print` and the root logger from several threads and can leave them changed; they are put back.
    """
    log = StepLog(out or sys.stdout)
    root, plain_print = logging.getLogger(), builtins.print
    level, handlers, records = root.level, root.handlers[:], _RunnerRecords(log)
    root.setLevel(logging.INFO)
    root.addFilter(records)
    try:
        with redirect_stdout(log), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You may be attemping to run a task", RuntimeWarning)
            warnings.filterwarnings("ignore", r"Task .* settings .* no effect", UserWarning)
            yield
    finally:
        root.removeFilter(records)
        root.setLevel(level)
        root.handlers[:] = handlers
        builtins.print = plain_print
