"""A distillation step and its job: submitted, followed, adopted by the step's next pod, deleted on cancel."""

from __future__ import annotations

import os
import signal
import threading
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from components.running import RUN_ID
from components.training import Way, hand_over, job_commands, job_name
from danceopd.errors import Interrupted
from pipelines.cluster.cli import WORKFLOW, app

pytestmark = pytest.mark.slow
JOB = {"image": "danceopd:dev", "cpu": 2, "memory": 4, "gpu": "nvidia.com/gpu", "toleration": ["nvidia.com/gpu"]}


@pytest.fixture
def in_a_run(api, tmp_path, monkeypatch) -> Path:
    """The environment of a step's pod; the folder for manifests."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "users": [{"name": "me", "user": {}}],
        "clusters": [{"name": "here", "cluster": {"server": api.address}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "danceopd"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    root = Path(__file__).resolve().parents[2]
    with (root / "pyproject.toml").open("rb") as file:  # an older installation may not have the command yet
        [commands] = tomllib.load(file)["project"]["entry-points"].values()
    written = "\n".join(["[danceopd.commands]", *(f"{name} = {place}" for name, place in commands.items())])
    (tmp_path / "here-0.dist-info").mkdir()
    (tmp_path / "here-0.dist-info" / "entry_points.txt").write_text(written)
    for name, value in {
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        RUN_ID: "run-1",
        WORKFLOW: "w-1",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}",
    }.items():
        monkeypatch.setenv(name, value)
    api.put("workflows", {"metadata": {"name": "w-1"}, "spec": {}})
    return tmp_path


def submit(folder: Path) -> None:
    manifest, workspace = folder / "job.yaml", Path("/workspace")
    render, follow = job_commands(Way("Job", 2, 8), JOB, workspace / "r.yaml", workspace, job_name(), manifest)
    assert CliRunner().invoke(app, render[2:]).exit_code == 0
    hand_over("job", follow)


def stopped(api, folder: Path) -> None:
    """A step whose pod is told to end while it follows its job."""

    def stop() -> None:
        deadline = time.monotonic() + 60
        while ("batch", "jobs", "watch") not in api.calls and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(Interrupted):
        submit(folder)
    thread.join()
    api.calls.clear()


def test_the_steps_next_pod_adopts_the_job_and_shows_its_log_and_a_cancelled_run_takes_it_along(api, in_a_run, capfd):
    stopped(api, in_a_run)
    [job] = api.of("jobs")
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert job["spec"]["completions"] == 2 and container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert job["metadata"]["ownerReferences"][0]["name"] == "w-1"
    assert len(api.of("services")) == 1
    api.say(f"{job_name()}-0", "step 1 of 8")
    api.acts = [
        lambda: api.pod(job_name()),
        lambda: api.pod(job_name(), phase="Succeeded") and api.condition(job_name(), "Complete"),
    ]
    submit(in_a_run)
    shown = capfd.readouterr()
    assert "step 1 of 8" in shown.out and "found, and followed" in shown.err and "succeeded" in shown.err
    assert [j["metadata"]["uid"] for j in api.of("jobs")] == [job["metadata"]["uid"]], "one job, not two"
    api.remove("jobs", job_name())
    api.calls.clear()
    api.put("workflows", {"metadata": {"name": "w-1"}, "spec": {"activeDeadlineSeconds": 0}})
    stopped(api, in_a_run)
    assert api.of("jobs") == api.of("services") == []
