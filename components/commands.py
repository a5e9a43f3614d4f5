"""A command that a step hands its work to: its log is the step's, its end is the step's, and so are its signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from danceopd.errors import ExitCode, Interrupted, UserError

PYTHON = (sys.executable, "-m")


def hand_over(what: str, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    """Run `python -m ...` and wait for it; SIGTERM and SIGINT to this process go to it.

    Args:
        what: it does, for messages.
        arguments: module and its arguments.
        variables: of its environment, beside this process's own.

    Raises:
        UserError: if it ended with 2: it has said why.
        Interrupted: if it ended with 75, and can be resumed.
        RuntimeError: if it ended in any other way but well.
    """
    # A session of its own: whoever signals the whole group of this process is heard once, through us.
    environment = {**os.environ, **(variables or {})}
    with (
        subprocess.Popen([*PYTHON, *arguments], env=environment, start_new_session=True) as child,
        _passing_signals(child),
    ):
        code = child.wait()
    if code == ExitCode.BAD_INPUT:
        raise UserError(f"{what}: bad input; the line above says what and how to mend it")
    if code == ExitCode.INTERRUPTED:
        raise Interrupted(f"{what}: stopped; tried again, it goes on from where it was")
    if code != 0:
        raise RuntimeError(f"{what}: ended with code {code}; its last lines above say why")


@contextmanager
def _passing_signals(child: subprocess.Popen) -> Iterator[None]:
    def pass_on(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
