"""How many threads a small network gets, and that idle ones are told to sleep before torch is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from danceopd.devices import small_threads, wait_briefly


def test_what_the_environment_says_of_waiting_stays(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize(("cores", "threads"), [("1", 1), ("2", 2), ("16", 2)])
def test_two_threads_where_there_are_cores_and_they_sleep_soon(monkeypatch, cores, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", cores)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert small_threads() == 1
    monkeypatch.setenv("GOMP_SPINCOUNT", "5000")
    assert small_threads() == threads


def test_the_command_line_says_it_before_torch_is_imported():
    script = (
        "import os, sys; from danceopd.cli import main; assert 'torch' not in sys.modules; "
        "main._root(False, False); print(os.environ['GOMP_SPINCOUNT'])"
    )
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "5000"), done.stderr
