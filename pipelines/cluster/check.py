"""What a namespace has of what a run needs, and what it lacks: looked at before the first run, and nothing changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from kubernetes import client
from kubernetes.client import ApiException
from kubernetes.utils.quantity import parse_quantity

from danceopd.tracking.mlflow_store import redact
from pipelines.cluster import queues
from pipelines.cluster.connect import Cluster, message_of, one_line, persist
from pipelines.cluster.jobs import KINDS
from pipelines.cluster.objects import RUNTIME

OK, MISSING, UNKNOWN, UNUSED = "ok", "missing", "unknown", "unused"
LEAST = (1, 31)  # podFailurePolicy is stable
CLAIM, ACCOUNT, TRACKING, PRIORITY, PREPARED = (
    "danceopd-workspace",
    "danceopd",
    "danceopd-tracking",
    "danceopd-training",
    "danceopd-prepare",
)
RUNNERS = ("pipeline-runner", "default-editor", "danceopd-launcher")  # whom steps run as: by itself, in a profile, ours
RIGHTS = (  # of manifests/launcher/role.yaml
    ("batch", "jobs", ("create", "delete", "get", "list", "watch")),
    ("trainer.kubeflow.org", "trainjobs", ("create", "delete", "get", "list", "watch")),
    ("", "services", ("create",)),
    ("", "pods", ("list",)),
    ("", "events", ("list",)),
    ("", "pods/log", ("get",)),
    ("kueue.x-k8s.io", "workloads", ("list",)),
    ("argoproj.io", "workflows", ("get",)),
)
INSIDE = re.compile(r"^https?://(?P<service>[\w-]+)(\.(?P<namespace>[\w-]+)(\.svc(\.[\w.-]+)?)?)?:(?P<port>\d+)")


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        state: ok; missing (a run will not go well); unknown (this account may not look); unused (some runs want it).
        what: was looked at.
        said: what was found, and what to do if it is missing.
    """

    state: str
    what: str
    said: str


@dataclass(frozen=True)
class Wanted:
    """What is to be checked.

    Attributes:
        claim: persistent volume claim with the workspace.
        gpu: accelerator resource.
    """

    claim: str = CLAIM
    gpu: str = "nvidia.com/gpu"


def check(cluster: Cluster, wanted: Wanted) -> Iterator[Line]:
    """Look at everything, one line each; only reads, and asks who may do what."""
    looks: tuple[tuple[str, Callable[[], Line | list[Line]]], ...] = (
        ("API", partial(_version, cluster)),
        ("namespace", partial(_namespace, cluster)),
        (f"claim {wanted.claim}", partial(_claim, cluster, wanted.claim)),
        ("workspace", partial(_writable, cluster)),
        (f"account {ACCOUNT}", partial(_account, cluster)),
        ("account of steps", partial(_runner, cluster)),
        (f"priority class {PRIORITY}", partial(_priority, cluster)),
        ("Secret danceopd-hub", partial(_hub, cluster)),
        ("MLflow", partial(_mlflow, cluster)),
        ("GPU nodes", partial(_gpus, cluster, wanted.gpu)),
        ("Kubeflow Pipelines", partial(_pipelines, cluster)),
        ("Kueue", partial(_kueue, cluster)),
        ("Trainer", partial(_trainer, cluster)),
    )
    for what, look in looks:
        try:
            found = look()
        except ApiException as error:
            if error.status not in (401, 403):
                raise
            found = Line(UNKNOWN, what, f"this account may not look ({one_line(message_of(error))})")
        yield from found if isinstance(found, list) else [found]


def _read(cluster: Cluster, call: Callable, *path: str) -> dict | None:
    """An object as JSON; None if there is none."""
    try:
        return cluster.api.sanitize_for_serialization(persist(cluster, call, *path))
    except ApiException as error:
        if error.status == 404:
            return None
        raise


def _groups(cluster: Cluster) -> Mapping[str, set[str]]:
    """The versions of each API group that the cluster serves."""
    found = persist(cluster, client.ApisApi(cluster.api).get_api_versions)
    return {group.name: {version.version for version in group.versions} for group in found.groups}


def _version(cluster: Cluster) -> Line:
    found = persist(cluster, client.VersionApi(cluster.api).get_code)
    numbers = tuple(int(re.sub(r"\D", "", part) or 0) for part in (found.major, found.minor))
    where = f"Kubernetes {found.git_version.lstrip('v')} at {redact(cluster.api.configuration.host)}"
    if numbers < LEAST:
        return Line(MISSING, "API", f"{where}; Jobs with failure rules need {LEAST[0]}.{LEAST[1]}")
    return Line(OK, "API", where)


def _namespace(cluster: Cluster) -> Line:
    found = _read(cluster, cluster.core.read_namespace, cluster.namespace)
    if found is None:
        return Line(
            MISSING, "namespace", f"{cluster.namespace}: not there; name one by --namespace, or apply an overlay"
        )
    level = (found["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce", "not set")
    return Line(OK, "namespace", f"{cluster.namespace} (pod security: {level})")


def _claim(cluster: Cluster, name: str) -> Line:
    what, found = (
        f"claim {name}",
        _read(cluster, cluster.core.read_namespaced_persistent_volume_claim, name, cluster.namespace),
    )
    if found is None:
        return Line(
            MISSING,
            what,
            "not there; the first step would wait for it for ever: apply an overlay or manifests/kubeflow",
        )
    modes, phase = found["spec"].get("accessModes", []), found.get("status", {}).get("phase", "Pending")
    text = f"{', '.join(modes)}, {phase.lower()}, {found['spec']['resources']['requests']['storage']}"
    if phase == "Lost":
        return Line(MISSING, what, f"{text}; its volume is gone")
    if "ReadWriteMany" not in modes:
        text += "; every step and job must then be on one node"
    return Line(OK, what, text)


def _writable(cluster: Cluster) -> Line:
    read = cluster.objects.get_namespaced_custom_object
    found = _read(cluster, read, "batch", "v1", cluster.namespace, "jobs", PREPARED)
    run = f"kubectl -n {cluster.namespace} apply -k manifests/loaders -l app.kubernetes.io/instance={PREPARED}"
    if found is None:
        return Line(UNKNOWN, "workspace", f"only a pod can tell whether it is writable: {run}")
    held = {c["type"] for c in found.get("status", {}).get("conditions") or [] if c["status"] == "True"}
    if "Complete" in held:
        return Line(OK, "workspace", "writable for user 1000, group 1000 (a pod tried)")
    if "Failed" in held:
        return Line(
            MISSING, "workspace", f"not writable for user 1000, group 1000; `danceopd job logs {PREPARED}` says why"
        )
    return Line(UNKNOWN, "workspace", f"Job {PREPARED} is not over yet")


def _account(cluster: Cluster) -> Line:
    what = f"account {ACCOUNT}"
    if _read(cluster, cluster.core.read_namespaced_service_account, ACCOUNT, cluster.namespace) is None:
        return Line(MISSING, what, "not there; jobs make no pods without it: apply an overlay or manifests/kubeflow")
    return Line(OK, what, "jobs' pods run as it, without rights")


def _runner(cluster: Cluster) -> list[Line]:
    read, found = cluster.core.read_namespaced_service_account, []
    for name in RUNNERS:
        if _read(cluster, read, name, cluster.namespace) is not None:
            lacks = _lacks(cluster, name)
            good = f"account {name}", "may submit and follow jobs"
            bad = (
                f"lacks {', '.join(lacks)}; bind the role danceopd-launcher to it (manifests/kubeflow, manifests/base)"
            )
            found.append(Line(MISSING, good[0], bad) if lacks else Line(OK, *good))
    none = f"none of {', '.join(RUNNERS)} is there; steps have no account to run as"
    return found or [Line(MISSING, "account of steps", none)]


def _lacks(cluster: Cluster, account: str) -> list[str]:
    """Rights of the role that an account does not have."""
    user = f"system:serviceaccount:{cluster.namespace}:{account}"
    review = client.AuthorizationV1Api(cluster.api).create_namespaced_local_subject_access_review
    lacks = []
    for group, resource, verbs in RIGHTS:
        name, _, part = resource.partition("/")
        for verb in verbs:
            asked = {"namespace": cluster.namespace, "group": group, "resource": name, "verb": verb}
            spec = {"user": user, "resourceAttributes": asked | ({"subresource": part} if part else {})}
            body = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "LocalSubjectAccessReview",
                "metadata": {"namespace": cluster.namespace},
                "spec": spec,
            }
            if not persist(cluster, review, cluster.namespace, body).status.allowed:
                lacks.append(f"{verb} {resource}")
    return lacks


def _priority(cluster: Cluster) -> Line:
    what = f"priority class {PRIORITY}"
    if _read(cluster, client.SchedulingV1Api(cluster.api).read_priority_class, PRIORITY) is None:
        return Line(MISSING, what, "not there; no job's pod is admitted without it: apply manifests/priorities")
    return Line(OK, what, "there")


def _hub(cluster: Cluster) -> Line:
    found = _read(cluster, cluster.core.read_namespaced_secret, "danceopd-hub", cluster.namespace)
    if found is None:
        return Line(UNUSED, "Secret danceopd-hub", "not there; only gated base models need it")
    if "token" not in (found.get("data") or {}):
        return Line(MISSING, "Secret danceopd-hub", "has no key `token`")
    return Line(OK, "Secret danceopd-hub", "there")


def _mlflow(cluster: Cluster) -> Line:
    found = _read(cluster, cluster.core.read_namespaced_config_map, TRACKING, cluster.namespace)
    uri = ((found or {}).get("data") or {}).get("uri", "")
    if not uri:
        text = f"no ConfigMap {TRACKING} with `uri`; runs that are not told a server write to a file in the workspace"
        return Line(UNUSED, "MLflow", text)
    inside = INSIDE.match(uri)
    if inside is None:
        return Line(UNKNOWN, "MLflow", f"{redact(uri)} is outside the cluster; look there")
    return _deployed(cluster, redact(uri), inside["service"], inside["namespace"] or cluster.namespace)


def _deployed(cluster: Cluster, uri: str, name: str, namespace: str) -> Line:
    """Whether our own MLflow runs, and accepts the name it is called by; it refuses all others."""
    read = cluster.objects.get_namespaced_custom_object
    server = _read(cluster, read, "apps", "v1", namespace, "deployments", name)
    if server is None:
        return Line(MISSING, "MLflow", f"{uri}: there is no such server in namespace {namespace}; apply an overlay")
    if not server.get("status", {}).get("availableReplicas"):
        return Line(MISSING, "MLflow", f"{uri}: not ready; kubectl -n {namespace} logs deployment/{name}")
    [container, *_] = server["spec"]["template"]["spec"]["containers"]
    hosts = [a.partition("=")[2] for a in container.get("args") or [] if a.startswith("--allowed-hosts=")]
    called = uri.partition("://")[2].partition("/")[0]
    if hosts and called not in hosts[0].split(","):
        return Line(MISSING, "MLflow", f"{uri}: refuses this name; add {called} to its --allowed-hosts")
    return Line(OK, "MLflow", f"{uri}: runs, and accepts its name")


def _gpus(cluster: Cluster, resource: str) -> Line:
    nodes = cluster.api.sanitize_for_serialization(persist(cluster, cluster.core.list_node))["items"]
    counts = [int(parse_quantity(node["status"].get("allocatable", {}).get(resource, 0))) for node in nodes]
    having = [count for count in counts if count]
    if not having:
        text = f"none of {len(nodes)} nodes has {resource}; CPU steps will run, GPU steps wait for a node"
        return Line(UNUSED, "GPU nodes", text)
    return Line(OK, "GPU nodes", f"{len(having)} of {len(nodes)} nodes have {resource}, at most {max(having)} each")


def _pipelines(cluster: Cluster) -> Line:
    if "argoproj.io" not in _groups(cluster):
        return Line(UNUSED, "Kubeflow Pipelines", "not installed; jobs can be submitted all the same")
    return Line(
        OK, "Kubeflow Pipelines", "its workflows are known here; 2.16 is the least, 2.17 what it is written for"
    )


def _kueue(cluster: Cluster) -> Line:
    versions = _groups(cluster).get(queues.GROUP)
    if versions is None:
        return Line(UNUSED, "Kueue", "not installed; jobs start as soon as there is a node")
    if queues.VERSION not in versions:
        return Line(
            MISSING, "Kueue", f"serves {', '.join(sorted(versions))}; manifests/queues need 0.15 ({queues.VERSION})"
        )
    found = _custom(cluster, queues.GROUP, queues.VERSION, "localqueues")
    names = ", ".join(sorted(item["metadata"]["name"] for item in found))
    return Line(OK, "Kueue", f"queues here: {names}") if names else Line(UNUSED, "Kueue", "no queue in this namespace")


def _trainer(cluster: Cluster) -> Line:
    kind = KINDS["TrainJob"]
    if kind.group not in _groups(cluster):
        return Line(UNUSED, "Trainer", "not installed; several nodes are trained as an indexed Job (distill_on: Job)")
    runtimes = {r["metadata"]["name"]: r for r in _custom(cluster, kind.group, kind.version, "trainingruntimes")}
    if RUNTIME not in runtimes:
        return Line(UNUSED, "Trainer", f"no TrainingRuntime {RUNTIME} here; TrainJobs need manifests/trainer")
    policy: dict[str, Any] = runtimes[RUNTIME]["spec"]["template"]["spec"].get("failurePolicy", {})
    if not policy.get("rules"):
        text = "is of an earlier version and restarts over bad input; delete it, then apply manifests/trainer"
        return Line(MISSING, "Trainer", f"TrainingRuntime {RUNTIME} {text}")
    return Line(OK, "Trainer", f"TrainingRuntime {RUNTIME} is there; 2.2 is the least")


def _custom(cluster: Cluster, group: str, version: str, plural: str) -> list[dict]:
    return persist(cluster, cluster.objects.list_namespaced_custom_object, group, version, cluster.namespace, plural)[
        "items"
    ]
