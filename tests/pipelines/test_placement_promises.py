"""What docs/operator.md promises holds in the compiled pipeline, whichever shipped placement it is compiled for."""

from __future__ import annotations

from importlib import resources

import pytest
import yaml
from test_compile import containers, tasks
from test_retries import HOUR, attempts

from pipelines.compile import compile_pipeline
from pipelines.distillation import WAIT_HOURS
from pipelines.options import PipelineOptions
from pipelines.placement import NEEDS, PLACEMENTS, Placement, load_placement

SHIPPED = sorted(
    p.name.removesuffix(".yaml") for p in resources.files(PLACEMENTS).iterdir() if p.name.endswith(".yaml")
)


@pytest.fixture(scope="module", params=["", *SHIPPED])
def compiled(request, tmp_path_factory) -> tuple[Placement, dict, dict]:
    """A placement, and the pipeline's and the platform's document compiled for it."""
    placement = load_placement(request.param)
    image = "registry.example.com/danceopd@sha256:" + 64 * "0"
    path = compile_pipeline(tmp_path_factory.mktemp("p") / "pipeline.yaml", PipelineOptions(image, placement))
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return placement, pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_placements_ship():
    assert {"gpu", "gke-h100"} <= set(SHIPPED)


def test_every_attempt_of_every_step_has_its_whole_time(compiled):
    placement, pipeline, _ = compiled
    for step, task in tasks(pipeline).items():
        retries = placement.retries_of(step)
        assert bool(retries) == ("retryPolicy" in task), step
        if retries:
            policy, longest = task["retryPolicy"], placement.needs(step).hours * HOUR
            window = int(policy["backoffMaxDuration"].removesuffix("s"))
            pause, factor = int(policy["backoffDuration"].removesuffix("s")), int(policy["backoffFactor"])
            ran = attempts(longest, window, retries, pause, factor, WAIT_HOURS * HOUR)
            assert ran == [longest] * (retries + 1), step


def test_every_pod_is_of_the_volumes_group_has_its_volume_and_finds_mlflow(compiled):
    placement, _, platform = compiled
    assert set(platform) == {f"exec-{step.replace('_', '-')}" for step in NEEDS}
    for executor in platform.values():
        assert executor["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        assert [mount["constant"] for mount in executor["pvcMount"]] == [placement.claim]
        assert [entry["configMapName"] for entry in executor["configMapAsEnv"]] == [placement.tracking]
        assert all(entry["optional"] for entry in executor["configMapAsEnv"])
        assert int(executor["activeDeadlineSeconds"]) > 0


def test_the_image_is_named_by_its_digest_and_secrets_are_optional(compiled):
    _, pipeline, platform = compiled
    assert {"@sha256:" in container["image"] for container in containers(pipeline).values()} == {True}
    assert all(secret["optional"] for executor in platform.values() for secret in executor.get("secretAsEnv", []))
