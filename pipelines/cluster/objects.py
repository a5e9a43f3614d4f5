"""The manifests of a training job: a plain Job, an indexed Job over several nodes, or Kubeflow's TrainJob.

`manifests/jobs` holds what these functions make, for kubectl; a test keeps the two the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from components.image import IMAGE
from danceopd.errors import UserError, unknown_name
from danceopd.text import parse_yaml_documents, read_text
from danceopd.tracking.journal import RUN
from pipelines.cluster.queues import QUEUE

ENDINGS = (".yaml", ".yml")
MOUNT, RECIPES = "/workspace", "/etc/danceopd/recipes"
PORT = 29500  # of torch's rendezvous
LAUNCHER = ("python", "-m", "danceopd.launch", "-m", "danceopd")  # torchrun with the workers' exit codes
RUNTIME = "danceopd"  # the TrainingRuntime of manifests/base
CONTAINER, TRAINER = "danceopd", "node"  # the second is what Kubeflow Trainer looks for
RANK = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")


@dataclass(frozen=True)
class JobPlan:
    """What a job is to run, and on what.

    Attributes:
        step: finetune, distill or evaluate.
        teacher: which one, for finetune.
        recipe: name of a shipped recipe, or a file in the container (the ConfigMap's lie in /etc/danceopd/recipes).
        overrides: of the recipe, as `key.sub=value`.
        name: of the job; default: from step and teacher.
        kind: Job or TrainJob.
        image: that runs it.
        nodes: pods that train together.
        gpus: accelerators of each; 0: CPU only.
        gpu: their resource name.
        cpu: cores of each pod.
        memory: GiB of each pod.
        hours: it is ended after this long.
        retries: failures that are made good by starting again; interruptions do not count.
        claim: persistent volume claim with the workspace.
        workspace: folder on that volume, which is mounted at /workspace.
        queue: Kueue's LocalQueue that admits it; empty: none.
        node_selector: labels of the nodes it may run on.
        tolerations: keys of taints it tolerates.
        run: the pipeline run it is a part of, for MLflow; empty: none.
    """

    step: str
    teacher: str = ""
    recipe: str = "world"
    overrides: tuple[str, ...] = ()
    name: str = ""
    kind: str = "Job"
    image: str = IMAGE
    nodes: int = 1
    gpus: int = 0
    gpu: str = "nvidia.com/gpu"
    cpu: int = 4
    memory: int = 16
    hours: int = 48
    retries: int = 3
    claim: str = "danceopd-workspace"
    workspace: str = MOUNT
    queue: str = ""
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    run: str = ""

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise unknown_name("job step", self.step, STEPS)
        if self.kind not in ("Job", "TrainJob"):
            raise unknown_name("job kind", self.kind, ("Job", "TrainJob"))
        if (self.step == "finetune") != bool(self.teacher):
            raise UserError("job: finetune takes the name of one teacher, and no other step does")
        if self.step == "evaluate" and self.nodes > 1:
            raise UserError(f"job nodes {self.nodes}: evaluate runs on one node")
        for what, value in {"nodes": self.nodes, "cpu": self.cpu, "memory": self.memory, "hours": self.hours}.items():
            if value < 1:
                raise UserError(f"job {what} {value}: at least 1")
        if min(self.gpus, self.retries) < 0:
            raise UserError(f"job gpus {self.gpus}, retries {self.retries}: 0 or more")
        if not (f"{self.workspace}/").startswith(f"{MOUNT}/"):
            raise UserError(f"job workspace {self.workspace}: the volume is mounted at {MOUNT}; name a folder there")
        if not _NAME.fullmatch(self.title):
            raise UserError(
                f"job name {self.title!r}: lower case letters, digits and -, at most 52; give one by --name"
            )
        if self.kind == "TrainJob" and (self.node_selector or self.tolerations):
            raise UserError("job: a TrainJob's nodes are chosen by its TrainingRuntime (manifests/overlays)")

    @property
    def title(self) -> str:
        """The job's name."""
        return self.name or "-".join(filter(None, ("danceopd", self.step, self.teacher.replace("_", "-"))))

    @property
    def processes(self) -> int:
        """Processes per node: one per accelerator."""
        return max(1, self.gpus) if self.step != "evaluate" else 1

    @property
    def together(self) -> bool:
        """Whether several processes train it, so that a launcher starts them."""
        return self.nodes * self.processes > 1 or self.kind == "TrainJob"


STEPS = ("finetune", "distill", "evaluate")


def manifests(plan: JobPlan) -> list[dict]:
    """The objects of a job: itself first, then the Service its pods find each other by, if there are several."""
    if plan.kind == "TrainJob":
        return [train_job(plan)]
    return [job(plan), *([service(plan)] if plan.nodes > 1 else [])]


def to_yaml(documents: list[dict]) -> str:
    """As one YAML file; the same objects, the same bytes."""
    return yaml.safe_dump_all(documents, sort_keys=False, width=110)


def is_ours(path: Path) -> bool:
    """Whether a file holds this project's objects and nothing else, so that others may take their place."""
    try:
        documents = parse_yaml_documents(read_text(path), str(path))
        return all(d["metadata"]["labels"]["app.kubernetes.io/part-of"] == "danceopd" for d in documents)
    except (UserError, LookupError, TypeError):
        return False


def command(plan: JobPlan) -> dict[str, list[str]]:
    """The container's `args`, with a `command` where the image's own (`danceopd`) does not do."""
    args = [plan.step, *filter(None, [plan.teacher]), "--recipe", plan.recipe, "--workspace", plan.workspace]
    args += [word for setting in plan.overrides for word in ("--set", setting)]
    return {"command": list(LAUNCHER), "args": args} if plan.together else {"args": args}


def job(plan: JobPlan) -> dict:
    """A Job; over several nodes an indexed one, whose pods are named after their index."""
    several = {"completionMode": "Indexed", "completions": plan.nodes, "parallelism": plan.nodes}
    subdomain = {"subdomain": plan.title} if plan.nodes > 1 else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(plan),
        "spec": {
            **(several if plan.nodes > 1 else {}),
            "backoffLimit": plan.retries * plan.nodes,
            "activeDeadlineSeconds": plan.hours * 3600,
            "ttlSecondsAfterFinished": 7 * 24 * 3600,
            "podReplacementPolicy": "Failed",  # never two pods at one checkpoint folder
            "podFailurePolicy": failure_policy(CONTAINER),
            "template": {
                "metadata": {"labels": pod_labels(plan.step)},
                "spec": pod(
                    {
                        "name": CONTAINER,
                        "image": plan.image,
                        **command(plan),
                        "env": [*_rendezvous(plan), *environment(plan.cpu // plan.processes, plan.run)],
                        "resources": resources(plan),
                    },
                    plan.claim,
                    subdomain
                    | ({"nodeSelector": dict(plan.node_selector)} if plan.node_selector else {})
                    | ({"tolerations": [toleration(key) for key in plan.tolerations]} if plan.tolerations else {}),
                ),
            },
        },
    }


def service(plan: JobPlan) -> dict:
    """The headless Service that gives every pod of an indexed Job a name."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(plan) | {"name": plan.title},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the pods meet before any is ready
            "selector": {"batch.kubernetes.io/job-name": plan.title},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def train_job(plan: JobPlan) -> dict:
    """A TrainJob of Kubeflow Trainer; volumes, security and nodes are its TrainingRuntime's."""
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(plan),
        "spec": {
            "activeDeadlineSeconds": plan.hours * 3600,
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": RUNTIME},
            "trainer": {
                "image": plan.image,
                **command(plan),
                "env": environment(plan.cpu // plan.processes, plan.run),
                "numNodes": plan.nodes,
                "numProcPerNode": plan.processes,
                "resourcesPerNode": resources(plan),
            },
        },
    }


def pod(container: dict, claim: str, more: dict | None = None) -> dict:
    """A pod spec that the restricted standard admits, with workspace, recipes, scratch and shared memory."""
    return {
        "serviceAccountName": "danceopd",
        "automountServiceAccountToken": False,
        "priorityClassName": "danceopd-training",
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 300,  # to write a checkpoint
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 1000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **(more or {}),
        "containers": [
            {
                **container,
                "imagePullPolicy": "IfNotPresent",
                "terminationMessagePolicy": "FallbackToLogsOnError",  # so that a failure's last words outlive its pod
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [
                    {"name": "workspace", "mountPath": MOUNT},
                    {"name": "recipes", "mountPath": RECIPES, "readOnly": True},
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "recipes", "configMap": {"name": "danceopd-recipes", "optional": True}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        ],
    }


def failure_policy(container: str) -> dict:
    """Interruptions (from outside, or exit code 75) do not count as failures; bad input (2) is not tried again."""
    own = {"containerName": container, "operator": "In"}
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": {**own, "values": [75]}},
            {"action": "FailJob", "onExitCodes": {**own, "values": [2]}},
        ]
    }


def environment(threads: int, run: str) -> list[dict]:
    """What every training container is told."""
    server = {"name": "danceopd-tracking", "key": "uri", "optional": True}
    return [
        {"name": "OMP_NUM_THREADS", "value": str(max(1, threads))},
        {"name": "TQDM_DISABLE", "value": "1"},
        {"name": "MLFLOW_TRACKING_URI", "valueFrom": {"configMapKeyRef": server}},
        {
            "name": "HF_TOKEN",
            "valueFrom": {"secretKeyRef": {"name": "danceopd-hub", "key": "token", "optional": True}},
        },
        *([{"name": RUN, "value": run}] if run else []),
    ]


def _rendezvous(plan: JobPlan) -> list[dict]:
    """What torchrun reads when no argument says otherwise; Kubeflow Trainer sets the same for a TrainJob."""
    if not plan.together:
        return []
    values: dict[str, int | str] = {"PET_NNODES": plan.nodes, "PET_NPROC_PER_NODE": plan.processes}
    if plan.nodes == 1:
        return [{"name": name, "value": str(value)} for name, value in values.items()]
    values |= {"PET_MASTER_ADDR": f"{plan.title}-0.{plan.title}", "PET_MASTER_PORT": PORT}
    rank = {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": RANK}}}
    return [*({"name": name, "value": str(value)} for name, value in values.items()), rank]


def resources(plan: JobPlan) -> dict[str, Any]:
    """Requests and limits; memory and accelerators are the same in both, cores may be had beyond the request."""
    fixed = {"memory": f"{plan.memory}Gi", **({plan.gpu: str(plan.gpus)} if plan.gpus else {})}
    return {"requests": {"cpu": str(plan.cpu), **fixed}, "limits": {"cpu": str(2 * plan.cpu), **fixed}}


def toleration(key: str) -> dict:
    """Of a taint with this key, whatever its value."""
    return {"key": key, "operator": "Exists", "effect": "NoSchedule"}


def pod_labels(step: str) -> dict[str, str]:
    """What network policies and people find our pods by."""
    return {
        "app.kubernetes.io/name": "danceopd",
        "app.kubernetes.io/component": step,
        "app.kubernetes.io/part-of": "danceopd",
    }


def _metadata(plan: JobPlan) -> dict:
    labels = {"app.kubernetes.io/instance": plan.title} | pod_labels(plan.step)
    return {"name": plan.title, "labels": labels | ({QUEUE: plan.queue} if plan.queue else {})}
