"""The command line under torchrun (two processes) and accelerate launch: one product."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from subprocess import PIPE

import pytest
import torch

from danceopd.files import read_json
from danceopd.workspace import STEP

SETTINGS = [
    "data.world={t2i: {train: 12, val: 4, test: 4}, local_edit: {train: 12, val: 4, test: 4}}",
    "tasks={t2i: {teacher: base, needs_source: false, metrics: [scene_accuracy]},"
    " local_edit: {teacher: editor, needs_source: true, metrics: [preserved_psnr]}}",
    "teachers={base: {kind: base}, editor: {kind: base}}",
    "distill={steps: 3, batch: 4, lr: 0.001, rollout_steps: 3, warmup: 1, log_every: 1}",
    "evaluate={per_task: 2, steps: 2}",
]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "danceopd"],
    # On CPUs Accelerate's own launcher starts one process (more need MPI); on accelerators it starts torchrun's.
    "accelerate": [
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "{port}",
        "-m",
        "danceopd",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_processes_make_one_student(launcher, tiny_base, tmp_path):
    sets = [part for setting in [f"model.base={tiny_base}", *SETTINGS] for part in ("--set", setting)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        started = [word.format(port=probe.getsockname()[1]) for word in LAUNCHERS[launcher]]
    command = [sys.executable, "-m", *started, "distill", *sets, "--workspace", str(tmp_path / "ws")]
    if torch.accelerator.is_available():
        pytest.skip("this test is for processes without an accelerator")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=PIPE, stderr=PIPE, text=True, cwd=tmp_path, env=environment, start_new_session=True
    ) as process:
        try:
            said, noted = process.communicate(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, noted[-3000:]
    [student] = (tmp_path / "ws" / "students").iterdir()
    assert said.count(str(student)) == 1
    facts = read_json(student / STEP)["facts"]
    assert facts["steps"] == 3
    history = read_json(student / "history.json")
    assert sum(sum(bins) for bins in history[0]["sigma_histogram"].values()) == 4  # of both processes
    assert not list((tmp_path / "ws" / "students").glob(".*"))
