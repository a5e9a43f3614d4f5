"""The local runner's output: the steps' lines, whole, and nothing of the frame around them."""

from __future__ import annotations

import builtins
import io
import logging
import threading
import warnings

import pytest
from kfp.local import logging_utils

from pipelines.steplog import StepLog, readable_steps


def lines(out: io.StringIO) -> list[str]:
    return out.getvalue().splitlines()


def test_the_frame_is_dropped_and_steps_lines_stay():
    out = io.StringIO()
    with readable_steps(out):
        logging.info("Executing task 'x'")
        with logging_utils.indented_print():
            print("[KFP Executor 2026-01-01 10:00:00,000 INFO]: Got executor_input:\n", end="")
            for part in ('{\n    "inputs": {\n', '    "a": {}\n    }\n', "}\n"):
                print(part, end="")
            print("12:00 finetune | step 1\n", end="")
            print("[KFP Executor 2026-01-01 10:00:00,000 WARNING]: careful\n", end="")
            print("Traceback:\n", end="")
            print("  File x\n", end="")
            print("\n")
        logging_utils.print_horizontal_line()
    assert lines(out) == [
        "12:00 finetune | step 1",
        "[KFP Executor 2026-01-01 10:00:00,000 WARNING]: careful",
        "Traceback:",
        "  File x",
    ]


def test_lines_of_two_threads_stay_whole():
    out, turn = io.StringIO(), threading.Barrier(2, timeout=10)
    log = StepLog(out)

    def step(name: str) -> None:
        for number in range(20):
            turn.wait()
            log.write("    ")
            turn.wait()
            log.write(f"{name} ")
            turn.wait()
            log.write(f"{number}\n")

    workers = [threading.Thread(target=step, args=(name,)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    written = lines(out)
    for name in ("a", "b"):
        assert [line for line in written if line.startswith(name)] == [f"{name} {n}" for n in range(20)]
    assert len(written) == 40


def test_a_reused_step_is_said_and_a_failure_only_once():
    out = io.StringIO()
    root = logging.getLogger()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    root.addHandler(handler)
    try:
        with readable_steps(out):
            logging.info("Task distill cache hit (key=abc); skipping execution.")
            logging.error("Task 'finetune' finished with status FAILURE")
            logging.error("Task for-loop failed with exception: x")
    finally:
        root.removeHandler(handler)
    assert lines(out) == ["distill | nothing changed: reused"]
    assert records == ["Task for-loop failed with exception: x"]


def test_what_the_runner_changed_is_put_back():
    root, before = logging.getLogger(), builtins.print
    state = (root.level, root.handlers[:], root.filters[:])
    with pytest.raises(KeyError), readable_steps(io.StringIO()):
        builtins.print = lambda *args: None
        root.handlers[:] = []
        root.setLevel(logging.DEBUG)
        raise KeyError
    assert builtins.print is before
    assert (root.level, root.handlers[:], root.filters[:]) == state


def test_the_runners_two_warnings_are_silenced_and_no_other():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with readable_steps(io.StringIO()):
            warnings.warn("You may be attemping to run a task that uses custom image", RuntimeWarning, stacklevel=1)
            warnings.warn("Task 'x': settings ['cpu_limit'] have no effect in the local runner", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert [str(w.message) for w in seen] == ["something else"]
