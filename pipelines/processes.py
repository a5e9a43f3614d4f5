"""The steps of a run on this machine as processes: kfp's local runner starts them here, and Ctrl-C ends them here."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil
from kfp.local import subprocess_task_handler as runner

from danceopd.errors import ExitCode

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds a step has to clean up after the second Ctrl-C
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_STEP = "summarize"  # runs after a failure, and so after the first Ctrl-C, too


class Steps:
    """The processes of the steps under way.

    Attributes:
        asked: whether the run was asked to end; then no step is started any more, but the one that sums up.
    """

    def __init__(self) -> None:
        self.asked = False
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def run(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """Run one step to its end, its lines on standard output; takes the place of kfp's `run_local_subprocess`.

        Args:
            full_command: program and arguments.
            env_vars: of its environment, beside this process's own.

        Returns:
            Its exit code.
        """
        with self._lock:
            if self.asked and LAST_STEP not in full_command:
                return ExitCode.INTERRUPTED
            step = subprocess.Popen(
                full_command,
                env={**os.environ, **(env_vars or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # what a terminal sends to the whole group reaches it once, through us
            )
            self._running.add(step)
            if self.asked and LAST_STEP not in full_command:  # since we looked
                _interrupt(step)
        try:
            with step:
                assert step.stdout is not None  # a pipe, as above
                for line in step.stdout:
                    print(line, end="")
                return step.wait()
        finally:
            with self._lock:
                self._running.discard(step)

    def stop(self) -> None:
        """Ask every running step to save and end, and start no other."""
        self.asked = True
        self._signal()

    def end(self) -> None:
        """End every running step with all that it started, whatever it is at; those that can clean up first."""
        self.asked = True
        left = [process for step in tuple(self._running) for process in _family(step.pid)]
        self._signal()
        deadline = time.monotonic() + PATIENCE
        while (left := [process for process in left if _lives(process)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _signal(self) -> None:
        for step in tuple(self._running):
            _interrupt(step)


def _interrupt(step: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(step.pid, signal.SIGINT)


def _family(number: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(number)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def stoppable_steps() -> Iterator[Steps]:
    """Within the block Ctrl-C (or SIGTERM, or a terminal that closes) lets running steps save; a second one ends them.

    Python lets the main thread alone handle signals: in any other thread steps run as kfp runs them.
    """
    steps = Steps()
    if threading.current_thread() is not threading.main_thread():
        yield steps
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if not steps.asked:
            log.warning("waiting for the running step to save and end; Ctrl-C again ends it at once")
            steps.stop()
        elif number != signal.SIGHUP:
            steps.end()
            raise KeyboardInterrupt

    heard = [number for number in _STOPS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    plain, runner.run_local_subprocess = runner.run_local_subprocess, steps.run
    try:
        yield steps
    finally:
        runner.run_local_subprocess = plain
        for number, handler in before.items():
            signal.signal(number, handler)
