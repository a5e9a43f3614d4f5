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
from pipelines.cluster.cli import WORKFLOW
from pipelines.compile import Manifests, compile_pipeline
from pipelines.options import MOUNT, PipelineOptions, Threads
from pipelines.placement import NEEDS, Placement, load_placement

GPU_STEPS = {"finetune", "distill", "evaluate"}
UNCACHED = {"check_recipe", "register", "summarize"}
SETTLED = "{{$.inputs.parameters['pipelinechannel--check-recipe-%s']}}"
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
    return compiled(folder, placement=load_placement("gke-h100"), image="registry.example.com/d@sha256:1")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("bare")
    placement = Placement(
        retries=0,
        claim=None,
        run_as_user=None,
        run_as_group=None,
        tracking="",
        image_pull_policy="Always",
        image_pull_secrets=("registry",),
        secrets=(
            {"name": "store", "env": {"KEY": "key"}},
            {"name": "hub", "env": {"HF_TOKEN": "token"}, "steps": ("resolve_base",), "optional": False},
        ),
    )
    return compiled(folder, placement=placement, threads=Threads(finetune=3, others=6))


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


def parameters(pipeline: dict) -> dict[str, dict]:
    return pipeline["root"]["inputDefinitions"]["parameters"]


def test_a_run_needs_no_typing_and_every_parameter_is_described(plain, with_gpu):
    defaults = {
        "recipe": "world",
        "overrides": [],
        "data_revision": "",
        "distill_on": "step",
        "gpus": 0,
        "nodes": 1,
        "code_revision": IMAGE,
        "workspace": MOUNT,
        "tracking_uri": "",
    }
    found = parameters(plain[0])
    assert {name: parameter["defaultValue"] for name, parameter in found.items()} == defaults
    assert all(parameter["description"] for parameter in found.values())
    assert parameters(with_gpu[0])["gpus"]["defaultValue"] == 8


@pytest.mark.slow
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
    given = loop["finetune"]["inputs"]["parameters"]
    for name, part in {"teacher": "teacher", "recipe": "recipe", "data_revision": "revision"}.items():
        assert f'["{part}"]' in given[name]["parameterExpressionSelector"], "a loop gets nothing else of a step"
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
        assert inputs["code_revision"]["componentInputParameter"].endswith("code_revision"), name
        if name in ("check_recipe", "summarize"):
            assert inputs["data_revision"]["componentInputParameter"].endswith("data_revision")
        else:
            assert "revision" in str(inputs["data_revision"])
            assert "check-recipe" in str(inputs["data_revision"]), "the one that the check found"


def before(pipeline: dict, step: str) -> set[str]:
    """All tasks that must be over before a step starts, those of an inner level with those of its own."""
    levels = {name: spec["dag"]["tasks"] for name, spec in pipeline["components"].items() if "dag" in spec}
    for level, members in levels.items():
        if step in members:
            direct = set(members[step].get("dependentTasks", []))
            outer = next(
                (
                    task
                    for inner in levels.values()
                    for task, spec in inner.items()
                    if spec["componentRef"]["name"] == level
                ),
                None,
            )
            direct |= {outer} if outer else set()
            return direct.union(*(before(pipeline, name) for name in direct))
    return set()


def test_nothing_on_a_gpu_starts_before_recipe_and_data_are_checked(plain, with_gpu):
    for pipeline in (plain[0], with_gpu[0]):
        for step in GPU_STEPS:
            assert {"check-recipe", "build-data", "resolve-base"} <= before(pipeline, step), step
    cpu_only = {name for name, c in containers(with_gpu[0]).items() if "accelerator" not in c["resources"]}
    assert {"check_recipe", "build_data", "resolve_base"} <= cpu_only


def test_every_gpu_step_carries_accelerator_selector_toleration_memory_retry_and_timeout(with_gpu):
    pipeline, platform = with_gpu
    labels = {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    for step, container in containers(pipeline).items():
        pod = platform[f"exec-{step.replace('_', '-')}"]
        assert int(pod["activeDeadlineSeconds"]) > 0
        if step not in GPU_STEPS:
            assert "accelerator" not in container["resources"] and not {"nodeSelector", "tolerations"} & set(pod), step
            continue
        assert container["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
        assert pod["nodeSelector"]["labels"] == labels and pod["tolerations"] == [taint]
        [memory] = pod["emptyDirMounts"]
        assert (memory["mountPath"], memory["medium"]) == ("/dev/shm", "Memory")
        policy = tasks(pipeline)[step]["retryPolicy"]
        assert policy["maxRetryCount"] == 2 and policy["backoffFactor"] > 1


def test_one_gpu_a_step_and_the_student_as_many_as_the_run_says(with_gpu):
    counts = {
        s: c["resources"]["accelerator"]["resourceCount"] for s, c in containers(with_gpu[0]).items() if s in GPU_STEPS
    }
    assert counts == {"finetune": "1", "evaluate": "1", "distill": SETTLED % "pod_gpus"}
    selector = with_gpu[1]["exec-distill"]["nodeSelector"]["nodeSelectorJson"]
    assert selector == {"taskOutputParameter": {"producerTask": "check-recipe", "outputParameterKey": "pod_nodes"}}


def constant(pipeline: dict, step: str, name: str):
    return tasks(pipeline)[step]["inputs"]["parameters"][name]["runtimeValue"]["constant"]


def test_the_check_knows_what_the_pod_would_take_and_the_job_takes_the_same(with_gpu):
    assert constant(with_gpu[0], "check_recipe", "placement") == {
        "accelerator": "nvidia.com/gpu",
        "cpu": "96",
        "memory": "800Gi",
        "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
    }
    assert constant(with_gpu[0], "distill", "job") == {
        "image": "registry.example.com/d@sha256:1",
        "cpu": 96,
        "memory": 800,
        "hours": 96,
        "retries": 2,
        "gpu": "nvidia.com/gpu",
        "claim": "danceopd-workspace",
        "toleration": ["nvidia.com/gpu"],
        "node-selector": ["cloud.google.com/gke-accelerator=nvidia-h100-80gb"],
    }


def test_secrets_and_pulls(bare, with_gpu):
    for name, pod in bare[1].items():
        assert pod["imagePullPolicy"] == "Always"
        assert [secret["secretName"] for secret in pod["imagePullSecret"]] == ["registry"]
        found = {secret["secretName"]: secret for secret in pod["secretAsEnv"]}
        assert set(found) == ({"store", "hub"} if name == "exec-resolve-base" else {"store"})
        assert found["store"]["keyToEnv"] == [{"secretKey": "key", "envVar": "KEY"}] and found["store"]["optional"]
    assert not bare[1]["exec-resolve-base"]["secretAsEnv"][1]["optional"]
    holders = {name for name, pod in with_gpu[1].items() if "secretAsEnv" in pod}
    assert holders == {"exec-resolve-base"}, "a token is for the step that needs it"


def test_objects_for_kubectl_hold_the_same_pipeline(plain, tmp_path):
    def objects(**names) -> tuple[dict, dict]:
        path = compile_pipeline(tmp_path / "objects.yaml", PipelineOptions(), manifests=Manifests(**names))
        return tuple(yaml.safe_load_all(path.read_text()))

    pipeline, version = objects(namespace="kubeflow")
    assert {o["apiVersion"] for o in (pipeline, version)} == {"pipelines.kubeflow.org/v2beta1"}
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "danceopd"
    assert version["spec"]["pipelineSpec"] == plain[0]
    platform = version["spec"]["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert platform == plain[1] and pipeline["metadata"]["namespace"] == "kubeflow"
    _, same = objects()
    assert same["metadata"] == {"name": version["metadata"]["name"]}, "the same content, the same version"


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
        asked = (str(needs.cpu[0]), f"{needs.memory[0]}Gi")
        if name == "distill":
            asked = (SETTLED % "pod_cpu", SETTLED % "pod_memory")
        assert (resources["resourceCpuRequest"], resources["resourceMemoryRequest"]) == asked
        assert (resources["resourceCpuLimit"], resources["resourceMemoryLimit"]) == (
            str(needs.cpu[1]),
            f"{needs.memory[1]}Gi",
        )


def test_retries_back_off_and_spare_the_recipe_check(plain):
    policies = {name: task.get("retryPolicy") for name, task in tasks(plain[0]).items()}
    assert policies.pop("check_recipe") is None
    assert policies.pop("register") is None, "a student that fails a gate would fail it again"
    assert all(p["maxRetryCount"] == 2 and p["backoffFactor"] > 1 for p in policies.values())


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
        assert executor["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        run = {"name": RUN_ID, "fieldPath": "metadata.labels['pipeline/runid']"}
        workflow = {"name": WORKFLOW, "fieldPath": "metadata.labels['workflows.argoproj.io/workflow']"}
        assert executor["fieldPathAsEnv"] == ([run, workflow] if name == "exec-distill" else [run])


def test_an_empty_form_finds_the_deployed_mlflow_and_none_is_needed(plain, bare):
    for executor in plain[1].values():
        [given] = executor["configMapAsEnv"]
        assert given["configMapName"] == "danceopd-tracking" and given["optional"] is True
        assert given["keyToEnv"] == [{"configMapKey": "uri", "envVar": "MLFLOW_TRACKING_URI"}]
    assert not any("configMapAsEnv" in executor for executor in bare[1].values())


def test_a_platform_may_choose_the_user(bare):
    assert {str(executor["securityContext"]) for executor in bare[1].values()} == {"{'runAsNonRoot': True}"}


def test_steps_that_use_an_accelerator_carry_the_queue(tmp_path):
    placement = load_placement("gpu").model_copy(update={"queue": "gpus"})
    _, platform = compiled(tmp_path, placement=placement)
    labels = {name: pod.get("podMetadata", {}).get("labels", {}) for name, pod in platform.items()}
    queued = {name for name, own in labels.items() if own == {"kueue.x-k8s.io/queue-name": "gpus"}}
    assert queued == {f"exec-{step}" for step in GPU_STEPS}


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


def test_a_file_that_is_not_named_as_yaml(tmp_path):
    with pytest.raises(UserError, match=r"pipeline\.json: ends in none of \.yaml, \.yml"):
        compile_pipeline(tmp_path / "pipeline.json", PipelineOptions())
    assert list(tmp_path.iterdir()) == []


def test_another_yaml_file_is_not_written_over(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for text in ("name: mine\n", "kind: Pipeline\n", "", "a: [", "kind: Job\napiVersion: batch/v1\n"):
        recipe.write_text(text)
        with pytest.raises(UserError, match=r"recipe\.yaml: is there already, and no older output of this command"):
            compile_pipeline(recipe, PipelineOptions())
        assert recipe.read_text() == text
    for manifests in (None, Manifests()):
        for _ in range(2):
            compile_pipeline(tmp_path / "p.yaml", PipelineOptions(), manifests=manifests)
