"""A step hands its work to a command: how it ends, and who hears a signal."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from components import commands
from components.commands import hand_over
from danceopd.errors import Interrupted, UserError

LISTENER = """
import pathlib, signal, sys, time
def stop(*_): sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).write_text("")
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Python with text to run, where steps run modules."""
    monkeypatch.setattr(commands, "PYTHON", (commands.PYTHON[0], "-c"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (2, UserError, "training: bad input; the line above says what"),
        (75, Interrupted, "training: stopped; tried again, it goes on"),
        (1, RuntimeError, "training: ended with code 1"),
        (137, RuntimeError, "training: ended with code 137"),
    ],
)
def test_the_end_of_the_command_is_the_steps(code, error, message):
    with pytest.raises(error, match=message) as caught:
        hand_over("training", [f"raise SystemExit({code})"])
    assert code != 75 or caught.value.code == 75


@pytest.mark.slow
def test_a_command_that_ends_well_says_nothing_and_has_its_variables():
    assert hand_over("training", ["import os; assert os.environ['HERE'] == '1'"], {"HERE": "1"}) is None


@pytest.mark.slow
def test_a_signal_to_the_step_goes_to_the_command_and_handlers_are_put_back(tmp_path):
    ready, before = tmp_path / "ready", signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted):
        hand_over("training", [LISTENER, str(ready)])
    assert signal.getsignal(signal.SIGTERM) is before
