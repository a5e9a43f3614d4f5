"""The manifests as kustomize builds them: known fields, restricted pods, no secret, no `latest`, rights in use."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from manifest_plans import PLANS, training_runtime
from strict_fields import unknown_field

from danceopd.cli.main import app
from danceopd.config.load import load_recipe
from pipelines.cluster import jobs, logs, runs
from pipelines.cluster.objects import JobPlan, manifests
from pipelines.cluster.queues import QUEUE
from pipelines.options import PipelineOptions

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "manifests"
FOLDERS = sorted(p.parent.relative_to(MANIFESTS).as_posix() for p in MANIFESTS.rglob("kustomization.yaml"))
KUBERNETES = "1.31"
TOOL = next(([t, *a] for t, a in (("kustomize", ["build"]), ("kubectl", ["kustomize"])) if shutil.which(t)), None)
BIN = str(Path(sys.executable).parent)
FOREIGN = ("trainer.kubeflow.org/", "kueue.x-k8s.io/", "monitoring.coreos.com/", "kubeflow.org/")


def needs_kustomize(test):
    """The marks of a test that builds manifests."""
    return pytest.mark.slow(pytest.mark.skipif(TOOL is None, reason="needs kustomize or kubectl")(test))


@functools.cache
def built(folder: str) -> tuple[dict, ...]:
    done = subprocess.run([*TOOL, str(MANIFESTS / folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(folder: str, *kinds: str) -> list[dict]:
    return [d for d in built(folder) if d["kind"] in kinds]


def pod_specs(value) -> list[dict]:
    """Every pod spec, however deep; one is known by its containers."""
    if isinstance(value, list):
        return [spec for item in value for spec in pod_specs(item)]
    if not isinstance(value, dict):
        return []
    own = [value] if "containers" in value else []
    return own + [spec for item in value.values() for spec in pod_specs(item)]


def images(value) -> list[str]:
    if isinstance(value, list):
        return [image for item in value for image in images(item)]
    if not isinstance(value, dict):
        return []
    own = [value["image"]] if isinstance(value.get("image"), str) else []
    return own + [image for item in value.values() for image in images(item)]


# -------------------------------------------------------------------------------------------------------------- fields


def unknown_fields(document: dict) -> str:
    """What a strict API server would say of it; empty if nothing."""
    validate = pytest.importorskip("kubernetes_validate", reason="needs the extra `manifests`")
    try:
        validate.validate(document, KUBERNETES, strict=True)
    except validate.ValidationError as error:
        return error.message
    return ""


def trainer_problem(document: dict) -> str:
    """What Kubeflow Trainer's own models do not know is lost on the way through them."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the extra `manifests`")
    model = getattr(models, f"TrainerV1alpha1{document['kind']}")
    again = model.from_dict(document).to_dict()
    return "" if again == document else f"{again} is not {document}"


@needs_kustomize
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_server_that_validates_strictly_takes_every_object(folder):
    assert [found for d in built(folder) if (found := unknown_field(d))] == []


def test_the_strict_server_sees_an_unknown_field():
    job, train_job = (manifests(JobPlan("distill", kind=kind))[0] for kind in ("Job", "TrainJob"))
    runtime = training_runtime()
    assert unknown_field(job) == unknown_field(train_job) == unknown_field(runtime) == ""
    job["spec"]["template"]["spec"]["containers"][0]["resources"]["limit"] = {}
    train_job["spec"]["trainer"]["nodes"] = 2
    runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["backOff"] = 1
    assert unknown_field(job) == "spec.template.spec.containers[0].resources.limit"
    assert unknown_field(train_job) == "spec.trainer.nodes"
    assert unknown_field(runtime).endswith("replicatedJobs[0].template.spec.backOff")


@needs_kustomize
@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_field_is_known(folder):
    for document in built(folder):
        if not document["apiVersion"].startswith(FOREIGN):
            assert not unknown_fields(document), document["metadata"]["name"]
        elif document["apiVersion"].startswith("trainer"):
            assert not trainer_problem(document)


@pytest.mark.slow
def test_the_checks_see_an_unknown_field():
    job, train_job = (manifests(JobPlan("distill", kind=kind))[0] for kind in ("Job", "TrainJob"))
    assert not unknown_fields(job) and not trainer_problem(train_job)
    job["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "x"
    train_job["spec"]["trainer"]["nodes"] = 2
    assert "imagePolicy" in unknown_fields(job) and trainer_problem(train_job)


KUEUE = {  # the fields used, of kueue.x-k8s.io/v1beta2
    "ResourceFlavor": set(),
    "ClusterQueue": {"namespaceSelector", "queueingStrategy", "preemption", "resourceGroups"},
    "LocalQueue": {"clusterQueue"},
}


@needs_kustomize
def test_the_queue_covers_what_the_jobs_ask_for():
    documents = {d["kind"]: d for d in built("queues")}
    assert {kind: set(d.get("spec", {})) for kind, d in documents.items()} == KUEUE
    queue = documents["ClusterQueue"]
    [group] = queue["spec"]["resourceGroups"]
    [flavor] = group["flavors"]
    assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]
    asked = pod_specs(of_kind("overlays/gpu-multinode/jobs", "Job"))[0]["containers"][0]["resources"]["requests"]
    assert set(asked) <= set(group["coveredResources"])
    label = of_kind("overlays/gpu-multinode/jobs", "Job")[0]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert label == documents["LocalQueue"]["metadata"]["name"]
    assert documents["LocalQueue"]["spec"]["clusterQueue"] == queue["metadata"]["name"]


# ------------------------------------------------------------------------------------------------------------ security


def restricted_problems(spec: dict) -> list[str]:
    """What the restricted pod security standard forbids in a pod spec."""
    own, found = spec.get("securityContext", {}), []
    if own.get("runAsNonRoot") is not True or own.get("runAsUser", 1) == 0:
        found.append("may run as root")
    if own.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        found.append("no seccomp profile")
    found += [f"uses {name}" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret", "ephemeral", "csi"}
    found += [f"volume {v['name']}" for v in spec.get("volumes", []) if not set(v) - {"name"} <= allowed]
    for container in spec["containers"] + spec.get("initContainers", []):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            found.append("may escalate")
        if context.get("capabilities") != {"drop": ["ALL"]}:
            found.append("keeps capabilities")
        found += ["host port" for port in container.get("ports", []) if "hostPort" in port]
    return found


@needs_kustomize
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_pod_is_restricted_and_minds_its_node(folder):
    for spec in pod_specs([d for d in built(folder) if d["kind"] != "TrainJob"]):
        assert restricted_problems(spec) == []
        assert spec["automountServiceAccountToken"] is False and spec["priorityClassName"].startswith("danceopd-")
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
            if container["name"] != "node":  # a TrainJob brings its own
                assert {"cpu", "memory"} <= set(container["resources"]["requests"])
                assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_the_check_sees_what_is_forbidden():
    assert (
        len(restricted_problems({"containers": [{}], "hostNetwork": True, "volumes": [{"name": "x", "hostPath": 1}]}))
        == 6
    )


@needs_kustomize
@pytest.mark.parametrize("folder", FOLDERS)
def test_images_have_a_version_and_secrets_are_elsewhere(folder):
    for image in images(list(built(folder))):
        assert re.fullmatch(r"[\w./-]+(:[\w.-]+|@sha256:[0-9a-f]{64})", image) and not image.endswith(":latest")
    assert of_kind(folder, "Secret") == []


@needs_kustomize
@pytest.mark.parametrize("overlay", ["gpu", "gpu-multinode", "gke", "eks"])
def test_an_overlay_reaches_every_job_of_its_platform(overlay):
    more = () if overlay == "gpu" else ("trainer", "trainjobs")
    documents = [d for part in ("jobs", *more) for d in built(f"overlays/{overlay}/{part}")]
    assert set(images(list(documents))) == {"registry.example.com/danceopd:0.1.0"}
    for spec in pod_specs([d for d in documents if d["kind"] != "TrainJob"]):
        assert spec["nodeSelector"] and [t["key"] for t in spec["tolerations"]] == ["nvidia.com/gpu"]


@needs_kustomize
def test_the_local_overlay_asks_for_no_accelerator_and_no_secret():
    for spec in pod_specs(of_kind("overlays/local/jobs", "Job")):
        assert set(spec["containers"][0]["resources"]["limits"]) == {"cpu", "memory"}
    [server] = of_kind("overlays/local", "Deployment")
    variables = server["spec"]["template"]["spec"]["containers"][0]["env"]
    needed = [e["valueFrom"]["secretKeyRef"] for e in variables if "secretKeyRef" in e.get("valueFrom", {})]
    assert all(reference.get("optional") for reference in needed)


# ------------------------------------------------------------------------------------------------- agreement of parts


@pytest.mark.parametrize("folder", PLANS)
def test_job_files_are_what_the_command_renders(folder):
    written = list(yaml.safe_load_all((MANIFESTS / folder / "job.yaml").read_text()))
    assert written == manifests(PLANS[folder][0])


def test_the_runtime_is_what_train_jobs_need():
    assert yaml.safe_load((MANIFESTS / "trainer" / "training-runtime.yaml").read_text()) == training_runtime()


def test_the_recipe_is_the_shipped_one():
    assert load_recipe(str(MANIFESTS / "base" / "recipes" / "recipe.yaml")) == load_recipe("world")


@needs_kustomize
def test_the_namespace_the_claim_and_the_names_fit():
    [namespace] = of_kind("base", "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    [claim] = of_kind("base", "PersistentVolumeClaim")
    assert claim["metadata"]["name"] == PipelineOptions().placement.claim
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    made = {(d["kind"], d["metadata"]["name"]) for d in built("base")}
    for folder in ("base", *(f for f in FOLDERS if f.startswith("jobs"))):
        for spec in pod_specs([d for d in built(folder) if d["kind"] != "TrainJob"]):
            assert ("ServiceAccount", spec["serviceAccountName"]) in made
            assert ("PriorityClass", spec["priorityClassName"]) in made
            for volume in spec["volumes"]:
                if "configMap" in volume:
                    assert ("ConfigMap", volume["configMap"]["name"]) in made


def test_the_readme_names_every_folder():
    text = (MANIFESTS / "README.md").read_text()
    parts = ("/jobs", "/trainer", "/trainjobs", "/serving", "/common")  # of an overlay, or of Kubeflow's two
    shown = {f for f in FOLDERS if f.split("/")[0] != "jobs" and not f.endswith(parts)}
    assert not [folder for folder in shown if f"`{folder}" not in text]


@needs_kustomize
@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.endswith(("/jobs", "/trainjobs")) or f == "loaders"])
def test_the_command_a_folder_begins_with_selects_something(folder):
    head = (MANIFESTS / folder / "kustomization.yaml").read_text().split("apiVersion")[0]
    key, value = re.search(r"-l (\S+)=(\S+)", head).groups()
    assert [d for d in built(folder) if d["metadata"].get("labels", {}).get(key) == value], head


@needs_kustomize
@pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if f.startswith("overlays/") and not f.endswith(("trainer", "trainjobs"))]
)
def test_only_the_overlay_made_for_trainer_and_kueue_needs_them(folder):
    foreign = {d["apiVersion"].split("/")[0] for d in built(folder) if d["apiVersion"].startswith(FOREIGN)}
    wanted = {"trainer.kubeflow.org", "kueue.x-k8s.io"}
    assert foreign == (wanted if folder == "overlays/gpu-multinode" else set())


@needs_kustomize
def test_a_train_job_over_bad_input_is_not_restarted():
    [runtime] = of_kind("trainer", "TrainingRuntime")
    jobset = runtime["spec"]["template"]["spec"]
    [rule] = jobset["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]), "JobSet's own rule for names"
    pods = jobset["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [r["onExitCodes"]["values"] for r in pods if r["action"] == "FailJob"] == [[2]]


@needs_kustomize
def test_the_loaders_commands_exist():
    commands = {d["metadata"]["name"]: pod_specs(d)[0]["containers"][0] for d in built("loaders")}
    data = commands["danceopd-load-data"]
    group = typer.main.get_command(app).commands["data"]
    given = group.commands["import"].make_context("import", list(data["args"])).params
    assert data["command"] == ["danceopd", "data", "import"] and str(given["out"]).startswith("/workspace/")
    assert given["overrides"] == [] and given["layout"] == "magicbrush"
    dataset = commands["danceopd-load-dataset"]
    given = group.commands["build"].make_context("build", list(dataset["args"])).params
    assert dataset["command"] == ["danceopd", "data", "build"] and str(given["workspace"]) == "/workspace"
    assert given["out"] is None, "where runs of the recipe look for it"
    cache = commands["danceopd-load-cache"]
    given = group.commands["cache"].make_context("cache", list(cache["args"])).params
    assert cache["command"] == ["danceopd", "data", "cache"] and str(given["out"]).startswith("/workspace/")
    assert commands["danceopd-load-base"]["command"] == ["hf", "download"] and shutil.which("hf", path=BIN)


@needs_kustomize
@pytest.mark.parametrize("name", ["danceopd-load-data", "danceopd-load-dataset", "danceopd-load-cache"])
def test_the_pods_that_load_share_the_work_without_a_gap(name):
    [job] = [d for d in built("loaders") if d["metadata"]["name"] == name]
    spec, [container] = job["spec"], pod_specs(job)[0]["containers"]
    assert spec["completionMode"] == "Indexed"
    of = container["args"][container["args"].index("--worker") + 1]
    assert of == f"$(WORKER)/{spec['completions']}"
    [worker] = [e for e in container["env"] if e["name"] == "WORKER"]
    assert worker["valueFrom"]["fieldRef"]["fieldPath"].endswith("['batch.kubernetes.io/job-completion-index']")


def test_the_role_allows_exactly_what_the_code_calls(api, cluster):
    """Every command once, against the recording server; what it was asked for is the role."""
    api.put("workflows", {"metadata": {"name": "run-1"}, "spec": {}})
    owner = runs.owner_reference(cluster, "run-1")
    for kind, plural in (("Job", "jobs"), ("TrainJob", "trainjobs")):
        document, *services = manifests(JobPlan("distill", nodes=2, kind=kind, name=kind.lower()))
        handle = jobs.submit(cluster, document, services, owner=owner)
        jobs.submit(cluster, document, services, owner=owner)
        api.pod(handle.name, phase="Failed", plural=plural)
        api.acts = [lambda name=handle.name, plural=plural: api.condition(name, "Failed", plural)]
        with logs.streaming(cluster, handle, lambda line: None):
            jobs.wait(cluster, handle, lambda line: None, 30, 1)
        jobs.find_all(cluster)
        api.objects[plural, handle.name] |= {"status": {}, "spec": {"suspend": True}}
        api.objects[plural, handle.name]["metadata"]["labels"][QUEUE] = "gpus"
        jobs.look(cluster, handle)
        jobs.cancel(cluster, handle)
    api.put(
        "pods",
        {
            "metadata": {"name": "p", "labels": {"batch.kubernetes.io/job-name": "x"}},
            "status": {
                "phase": "Succeeded",
                "containerStatuses": [
                    {
                        "name": "a",
                        "image": "a",
                        "imageID": "",
                        "ready": True,
                        "restartCount": 0,
                        "state": {"terminated": {"exitCode": 0}},
                    }
                ],
            },
        },
    )
    list(logs.read(cluster, jobs.Handle(jobs.KINDS["Job"], "x", "u")))
    role = yaml.safe_load((MANIFESTS / "launcher" / "role.yaml").read_text())
    allowed = {
        (g, r, v) for rule in role["rules"] for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]
    }
    assert set(api.calls) == allowed
