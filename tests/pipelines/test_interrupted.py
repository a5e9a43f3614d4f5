"""Ctrl-C in a run on this machine, with real steps in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from components.running import read_notes
from pipelines.processes import LAST_STEP, stoppable_steps

RUN = """
import sys
from pathlib import Path
from kfp import dsl
from danceopd.cli import main as cli
from pipelines import processes
from pipelines.local import run_here

@dsl.component
def wait(recipe: str, workspace: str, part: str):
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from components.running import running
    from danceopd.files import atomic_folder
    from danceopd.training.checkpoints import stop_when_asked
    from danceopd.errors import Interrupted

    with running("wait", recipe, workspace, part) as step:
        place = Path(workspace)
        with stop_when_asked() as stop, atomic_folder(place / f"product-{part}") as scratch:
            (scratch / "half").touch()
            if part == "slow":  # with a process that does not hear of it
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
            (place / f"started-{part}").touch()
            until = time.monotonic() + 60
            while not stop.asked and time.monotonic() < until:
                time.sleep(0.02)
            if part == "slow":
                time.sleep(60)
            (place / f"saved-{part}").touch()
            raise Interrupted("interrupted after step 3 of 8 and saved; the same command goes on")

@dsl.pipeline
def two(recipe: str, workspace: str, part: str):
    first = wait(recipe=recipe, workspace=workspace, part=part)
    wait(recipe=recipe, workspace=workspace, part="after").after(first)

workspace, part = sys.argv[1:]
arguments = {"recipe": "world", "workspace": workspace, "part": part}
processes.PATIENCE = 1.0

class Command:
    def main(self, **_):
        run_here(two, arguments, Path(workspace), "run")

cli.root_command = Command
cli.main()
"""


def until(true, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    """Start a run whose first step waits; returns it once that step is at work. Ctrl-C is ignored where it starts."""
    script, started = tmp_path / "run.py", []
    script.write_text(RUN)

    def begin(part: str):
        log = open(tmp_path / "log", "w")  # noqa: SIM115 (the child's)
        environment = {**os.environ, "MLFLOW_TRACKING_URI": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
        try:
            run = subprocess.Popen(
                [sys.executable, str(script), str(tmp_path), part],
                stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path, start_new_session=True,
            )  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, before)
        started.append(run)
        until((tmp_path / f"started-{part}").exists, "the step's start")
        return run, psutil.Process(run.pid).children(recursive=True)

    yield begin
    for run in started:
        if run.poll() is None:
            run.kill()
            run.wait()


def gone(processes) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def said(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text()


@pytest.mark.slow
def test_the_first_waits_until_the_running_step_has_saved(tmp_path, start):
    run, children = start("saves")
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(30) == 75, said(tmp_path)
    assert (tmp_path / "saved-saves").exists() and not (tmp_path / "product-saves").exists()
    assert not (tmp_path / "started-after").exists() and gone(children)
    [note] = read_notes(tmp_path, "run")
    assert note["state"] == "interrupted"
    last = said(tmp_path).splitlines()[-1]
    assert last.startswith("danceopd: wait saves: interrupted after step 3 of 8 and saved; the same command goes on")
    assert "Traceback" not in said(tmp_path)


@pytest.mark.slow
def test_a_second_one_ends_all_at_once_and_leaves_no_process(tmp_path, start):
    run, children = start("slow")
    assert len(children) >= 2
    os.kill(run.pid, signal.SIGINT)
    until(lambda: "Ctrl-C again ends it at once" in said(tmp_path), "the first Ctrl-C's line")
    assert run.poll() is None
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(30) == 130, said(tmp_path)
    assert gone(children)
    assert not list(tmp_path.glob("product-*")) and not list(tmp_path.glob("*.partial*"))
    assert not (tmp_path / "started-after").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_ask_as_ctrl_c_does(number):
    before = {of: signal.signal(of, signal.SIG_DFL) for of in (number, signal.SIGHUP)}  # under nohup it is ignored
    try:
        with stoppable_steps() as steps:
            os.kill(os.getpid(), number)
            assert steps.asked and steps.run(["false"]) == 75, "no step is started any more"
            assert steps.run(["true", LAST_STEP]) == 0, "but the one that sums up"
            os.kill(os.getpid(), signal.SIGHUP)  # a terminal that closes may say so twice
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        for of, handler in before.items():
            signal.signal(of, handler)


def test_a_run_that_is_to_outlive_its_terminal_does():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with stoppable_steps() as steps:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not steps.asked
    finally:
        signal.signal(signal.SIGHUP, before)
