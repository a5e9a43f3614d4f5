"""manifests/run_jobs.py: all that a pod says becomes the container engine's options, or is refused."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from pipelines.cluster.objects import JobPlan, manifests

SCRIPT = Path(__file__).resolve().parents[2] / "manifests" / "run_jobs.py"
MAPS = {"danceopd-recipes": {"recipe.yaml": "name: world\n"}}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_jobs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(script, job: dict, tmp_path: Path) -> list[str]:
    args = argparse.Namespace(engine="podman --runtime runc", run_option=[], image="image:1", job_args=["--set", "a=1"])
    return script.container_command(job, MAPS, tmp_path / "claim", tmp_path, args)


def test_a_job_becomes_one_command_line(script, tmp_path):
    found = words(script, manifests(JobPlan("distill"))[0], tmp_path)
    here = found.index("image:1")
    assert found[here + 1 :] == ["distill", "--recipe", "world", "--workspace", "/workspace", "--set", "a=1"]
    options = " ".join(found[:here])
    for part in (
        "podman --runtime runc run ",
        "--user 1000:0",
        "--read-only ",
        "--cap-drop ALL",
        "no-new-privileges",
        f"{tmp_path}/claim:/workspace",
        f"{tmp_path}/danceopd-recipes:/etc/danceopd/recipes:ro",
        f"/tmp:size={20 * 2**30}",
        f"/dev/shm:size={8 * 2**30}",
    ):
        assert part in options
    assert "--entrypoint" not in found
    assert (tmp_path / "danceopd-recipes" / "recipe.yaml").read_text() == "name: world\n"


def test_a_command_goes_before_the_arguments(script, tmp_path):
    found = words(script, manifests(JobPlan("distill", gpus=2))[0], tmp_path)
    assert found[found.index("--entrypoint") + 1] == "python"
    assert found[found.index("image:1") + 1 :][:4] == ["-m", "danceopd.launch", "-m", "danceopd"]


@pytest.mark.parametrize(
    ("where", "field"),
    [
        (lambda pod: pod, "hostNetwork"),
        (lambda pod: pod["containers"][0], "lifecycle"),
        (lambda pod: pod["containers"][0]["securityContext"], "privileged"),
        (lambda pod: pod["securityContext"], "sysctls"),
    ],
)
def test_what_would_be_passed_over_is_refused(script, tmp_path, where, field):
    [job] = manifests(JobPlan("distill"))
    where(job["spec"]["template"]["spec"])[field] = True
    with pytest.raises(ValueError, match=field):
        words(script, job, tmp_path)
