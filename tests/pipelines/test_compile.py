"""The compiled pipeline: valid, the same bytes each time, and each step with what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from components.image import IMAGE
from components.running import RUN_ID
from danceopd.errors import UserError
from pipelines.compile import compile_pipeline
from pipelines.options import MOUNT, NEEDS, PipelineOptions, Threads

GPU_STEPS = {"finetune", "distill", "evaluate"}
UNCACHED = {"register", "summarize"}
ROOT = Path(__file__).resolve().parents[2]


def compiled(folder: Path, **options) -> tuple[dict, dict]:
    """The pipeline's own document and the platform's."""
    path = compile_pipeline(folder / "pipeline.yaml", PipelineOptions(**options))
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def plain(plain_folder) -> tuple[dict, dict]:
    return compiled(plain_folder)


@pytest.fixture(scope="module")
def with_gpu(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("gpu")
    return compiled(folder, gpu="nvidia.com/gpu", gpu_count=2, image="registry.example.com/d@sha256:1", retries=3)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("bare")
    return compiled(folder, retries=0, workspace_claim=None, threads=Threads(finetune=3, others=6))


def containers(pipeline: dict) -> dict[str, dict]:
    executors = pipeline["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-").replace("-", "_"): spec["container"] for name, spec in executors.items()}


def tasks(pipeline: dict) -> dict[str, dict]:
    """Every task that runs a container, from all levels."""
    dags = [pipeline["root"]["dag"], *(c["dag"] for c in pipeline["components"].values() if "dag" in c)]
    found = {name: task for dag in dags for name, task in dag["tasks"].items()}
    return {n.replace("-", "_"): t for n, t in found.items() if "dag" not in pipeline["components"][f"comp-{n}"]}


def test_it_is_a_pipeline_spec_of_all_steps(plain):
    spec = json_format.ParseDict(plain[0], pipeline_spec_pb2.PipelineSpec())
    assert spec.pipeline_info.name == "danceopd"
    assert set(containers(plain[0])) == set(tasks(plain[0])) == set(NEEDS)


def test_parameters_are_typed_and_described(plain):
    parameters = plain[0]["root"]["inputDefinitions"]["parameters"]
    assert set(parameters) == {"recipe", "data_revision", "code_revision", "workspace", "tracking_uri"}
    assert all(p["parameterType"] == "STRING" and p["description"] for p in parameters.values())
    assert not any("defaultValue" in parameters[name] for name in ("recipe", "data_revision"))
    assert parameters["code_revision"]["defaultValue"] == IMAGE
    assert parameters["workspace"]["defaultValue"] == MOUNT


def test_two_compiles_give_the_same_bytes(plain, plain_folder, tmp_path):
    code = (
        "import sys, pathlib\n"
        "from pipelines.compile import compile_pipeline\n"
        "from pipelines.options import PipelineOptions\n"
        "compile_pipeline(pathlib.Path(sys.argv[1]), PipelineOptions())\n"
    )
    variables = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again.yaml")], check=True, env=variables)
    assert (plain_folder / "pipeline.yaml").read_bytes() == (tmp_path / "again.yaml").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.yaml"]


def test_teachers_fan_out_and_are_collected(plain):
    [loop] = [c["dag"]["tasks"] for n, c in plain[0]["components"].items() if n.startswith("comp-for-loop")]
    assert set(loop) == {"finetune"}
    chain = plain[0]["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    [fan] = [task for name, task in chain.items() if name.startswith("for-loop")]
    item = fan["inputs"]["parameters"]["pipelinechannel--check-recipe-Output"]["taskOutputParameter"]
    assert item["producerTask"] == "check-recipe"
    for step in ("distill", "evaluate", "register"):
        teachers = chain[step]["inputs"]["artifacts"]["teachers"]["taskOutputArtifact"]
        assert teachers["producerTask"].startswith("for-loop")
    assert "parallelismLimit" not in str(fan)


def test_the_summary_runs_whatever_happens(plain):
    task = plain[0]["root"]["dag"]["tasks"]["summarize"]
    assert task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert "taskFinalStatus" in task["inputs"]["parameters"]["status"]


def test_caching_a_step(plain):
    cached = {name for name, task in tasks(plain[0]).items() if task["cachingOptions"].get("enableCache")}
    assert cached == set(NEEDS) - UNCACHED


def test_every_step_reads_the_revisions_of_the_run(plain):
    for name, task in tasks(plain[0]).items():
        inputs = task["inputs"]["parameters"]
        for revision in {"code_revision", "data_revision"} & set(inputs):
            assert inputs[revision]["componentInputParameter"].endswith(revision), name
        assert "code_revision" in inputs


def test_accelerators_on_exactly_the_steps_that_use_one(with_gpu):
    accelerated = {n: c["resources"].get("accelerator") for n, c in containers(with_gpu[0]).items()}
    wanted = {"resourceType": "nvidia.com/gpu", "resourceCount": "2"}
    for name, accelerator in accelerated.items():
        assert (wanted.items() <= accelerator.items()) if name in GPU_STEPS else accelerator is None, name


def test_no_accelerators_unless_asked_for(plain):
    assert not any("accelerator" in container["resources"] for container in containers(plain[0]).values())


def test_the_image_is_the_same_everywhere(plain, with_gpu):
    assert {c["image"] for c in containers(plain[0]).values()} == {IMAGE}
    assert {c["image"] for c in containers(with_gpu[0]).values()} == {"registry.example.com/d@sha256:1"}
    revision = with_gpu[0]["root"]["inputDefinitions"]["parameters"]["code_revision"]
    assert revision["defaultValue"] == "registry.example.com/d@sha256:1"


def test_requests_and_limits(plain):
    for name, container in containers(plain[0]).items():
        resources, needs = container["resources"], NEEDS[name]
        assert (resources["resourceCpuRequest"], resources["resourceCpuLimit"]) == tuple(map(str, needs.cpu))
        assert resources["resourceMemoryRequest"] == f"{needs.memory[0]}Gi"
        assert resources["resourceMemoryLimit"] == f"{needs.memory[1]}Gi"


def test_retries_back_off_and_spare_the_recipe_check(plain, with_gpu):
    for pipeline, count in ((plain[0], 2), (with_gpu[0], 3)):
        policies = {name: task.get("retryPolicy") for name, task in tasks(pipeline).items()}
        assert policies.pop("check_recipe") is None
        assert all(p["maxRetryCount"] == count and p["backoffFactor"] > 1 for p in policies.values())


def test_no_retries_if_none_are_wanted(bare):
    assert not any("retryPolicy" in task for task in tasks(bare[0]).values())


def test_volume_time_limit_and_user_of_every_step(plain):
    assert {name.removeprefix("exec-").replace("-", "_") for name in plain[1]} == set(NEEDS)
    for name, executor in plain[1].items():
        [mount] = executor["pvcMount"]
        assert mount["mountPath"] == MOUNT and mount["constant"] == "danceopd-workspace"
        assert (
            int(executor["activeDeadlineSeconds"]) == 3600 * NEEDS[name.removeprefix("exec-").replace("-", "_")].hours
        )
        assert executor["securityContext"] == {"runAsNonRoot": True}
        assert executor["fieldPathAsEnv"] == [{"name": RUN_ID, "fieldPath": "metadata.labels['pipeline/runid']"}]


def test_no_volume_without_a_claim(bare):
    assert not any("pvcMount" in executor for executor in bare[1].values())


def environment(pipeline: dict) -> dict[str, dict]:
    return {n: {e["name"]: e["value"] for e in c["env"]} for n, c in containers(pipeline).items()}


def threads(pipeline: dict) -> dict[str, int]:
    return {name: int(env["OMP_NUM_THREADS"]) for name, env in environment(pipeline).items()}


def test_no_progress_bars_in_logs(plain):
    assert all(env["TQDM_DISABLE"] == "1" for env in environment(plain[0]).values())


def test_threads_follow_the_limits_on_a_cluster_and_the_cores_on_one_machine(plain, bare):
    assert threads(plain[0]) == {name: needs.cpu[1] for name, needs in NEEDS.items()}
    assert threads(bare[0]) == {name: 3 if name == "finetune" else 6 for name in NEEDS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": " "}, "pipeline image: empty"),
        ({"gpu_count": 0}, "pipeline gpu count 0: at least 1"),
        ({"retries": -1}, "pipeline retries -1: 0 or more"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        PipelineOptions(**options)


def test_a_file_that_is_not_named_as_yaml(tmp_path):
    with pytest.raises(UserError, match=r"--out .*pipeline\.json: a compiled pipeline is a \.yaml file"):
        compile_pipeline(tmp_path / "pipeline.json", PipelineOptions())
    assert list(tmp_path.iterdir()) == []
