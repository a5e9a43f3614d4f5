"""Runs one `danceopd` command and notes what each stretch of it took of memory, disk and time. Started by
`real_size.py`: python -m benchmarks.real_size_worker FIGURES COMMAND [ARGUMENT ...]

A stretch is a call of one of the command's own functions, or what lies between two of them. Peaks are the kernel's
(`VmHWM`, reset at the start of each stretch); the part that is no file's is sampled.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from danceopd.preflight.memory import MemoryEstimate

STATUS, IO, CLEAR = (Path("/proc/self") / name for name in ("status", "io", "clear_refs"))
RESET_PEAK = "5"
EVERY = 0.02  # seconds between two looks at the memory that is no file's
# By command: what a stretch is called, the function that is it, and what follows it is called.
STRETCHES = {
    "finetune": [("teacher: updates", "danceopd.finetune", "finetune", "teacher: proof")],
    "distill": [
        ("student: updates", "danceopd.distill", "distill", "student: history"),
        ("student: export", "danceopd.steps.student", "export_student", "student: card"),
    ],
}
FIRST = {"finetune": "teacher: read", "distill": "student: read, preflight"}


@dataclass
class Stretch:
    """What a stretch took: `peak` and `anonymous` (of it no file's) bytes of memory, bytes written, seconds."""

    name: str
    peak: int = 0
    anonymous: int = 0
    written: int = 0
    seconds: float = 0.0


def kilobytes(field: str) -> int:
    """A size that the kernel tells of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def written() -> int:
    """Bytes that this process caused to be written to storage so far."""
    return int(next(line for line in IO.read_text().splitlines() if line.startswith("write_bytes")).split()[1])


class Meter:
    """Measures one stretch after another."""

    def __init__(self) -> None:
        self.found: list[Stretch] = []
        self.estimates: dict[str, int] = {}
        self._begun, self._written = 0.0, 0
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            if self.found:
                self._look(self.found[-1])

    @staticmethod
    def _look(stretch: Stretch) -> None:
        stretch.anonymous = max(stretch.anonymous, kilobytes("RssAnon"))

    def begin(self, name: str) -> None:
        """End the stretch under way, if there is one, and start another."""
        self._note()
        CLEAR.write_text(RESET_PEAK)
        self._begun, self._written = time.monotonic(), written()
        self.found.append(Stretch(name))

    def end(self) -> None:
        """End the last stretch."""
        self._note()
        self._over.set()

    def _note(self) -> None:
        if not self.found:
            return
        last = self.found[-1]
        self._look(last)
        last.peak, last.written = kilobytes("VmHWM"), written() - self._written
        last.seconds = time.monotonic() - self._begun

    def around(self, name: str, function: Callable, after: str) -> Callable:
        """A function whose calls are stretches, and what follows a call another."""

        @functools.wraps(function)
        def measured(*given: Any, **named: Any) -> Any:
            self.begin(name)
            result = function(*given, **named)
            self.begin(after)
            return result

        return measured

    def noting(self, check_memory: Callable) -> Callable:
        """The preflight's check, which keeps what it says that training takes besides what is there."""

        @functools.wraps(check_memory)
        def noted(estimate: MemoryEstimate, available: int) -> Any:
            self.estimates["preflight"] = estimate.total
            return check_memory(estimate, available)

        return noted


def measure(arguments: list[str]) -> dict:
    """Run a command in this process; its stretches and what its preflight said.

    Raises:
        UserError: and whatever else the command raises.
    """
    from danceopd.cli.main import root_command

    command, meter = arguments[0], Meter()
    meter.begin(FIRST.get(command, command))
    with ExitStack() as changed:
        for name, module, function, after in STRETCHES.get(command, []):
            plain = getattr(importlib.import_module(module), function)
            changed.enter_context(patch(f"{module}.{function}", meter.around(name, plain, after)))
        if command == "distill":
            plain = importlib.import_module("danceopd.preflight.checks").check_memory
            changed.enter_context(patch("danceopd.preflight.checks.check_memory", meter.noting(plain)))
        root_command().main(arguments, prog_name="danceopd", standalone_mode=False)
    meter.end()
    return {"stretches": [asdict(stretch) for stretch in meter.found], "estimates": meter.estimates}


def main() -> None:
    figures, arguments = Path(sys.argv[1]), sys.argv[2:]
    figures.write_text(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
