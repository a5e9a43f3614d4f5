"""The launcher: what its workers end with, it ends with; a SIGTERM leaves them time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from danceopd.launch import exit_code, launch

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import os, signal, sys, time
code = int(sys.argv[1])
if os.environ["RANK"] == "1":
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
"""
PATIENT = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
def stop(*_):
    time.sleep(0.5)
    (here / f"checkpoint-{sys.argv[2]}").write_text("")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(here / "started").write_text("")
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def handlers_as_they_were(monkeypatch):
    """torch's agent leaves its signal handlers and variables behind; in a process of its own that is no matter."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "ends"), [(0, 0), (1, 1), (2, 2), (75, 75), (-9, 137)])
def test_two_workers_of_which_one_ends_with_a_code(tmp_path, code, ends):
    (tmp_path / "worker.py").write_text(WORKER)
    assert launch(["--standalone", "--nproc-per-node", "2", str(tmp_path / "worker.py"), str(code)]) == ends


@pytest.mark.parametrize(
    ("codes", "ends"), [([1, 2], 2), ([1, 75], 75), ([75, 2], 2), ([3, 1], 3), ([-15], 143), ([-9, 1], 137)]
)
def test_a_code_that_means_something_goes_before_a_lost_connection(codes, ends):
    assert exit_code(codes) == ends


@pytest.mark.slow
def test_a_sigterm_leaves_the_workers_time_and_asks_to_be_started_again(tmp_path):
    (tmp_path / "worker.py").write_text(PATIENT)
    command = [sys.executable, "-m", "danceopd.launch", "--standalone", str(tmp_path / "worker.py"), str(tmp_path), "a"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    assert (tmp_path / "checkpoint-a").exists()
