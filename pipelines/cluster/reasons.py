"""Why a request was refused, and why pods do not run: in one line, with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kubernetes.client import ApiException

from danceopd.errors import ExitCode, UserError
from pipelines.cluster.connect import message_of, one_line

ACCELERATORS = ("gpu", "gaudi", "tpu")
IMAGE_TROUBLE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
VOLUME_TROUBLE = {"FailedMount", "FailedAttachVolume", "FailedMapVolume"}
# What the kubelet says when a pod outgrew its own limits on scratch space (1.34, pkg/kubelet/eviction/helpers.go); when
# its node ran low instead ("The node was low on resource"), another pod may have filled it.
OUTGREW = re.compile(r"exceeds the limit|exceeds the total limit|exceeded its local ephemeral storage limit")
CONFIG_TROUBLE = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


# How the API server words a missing right (1.34, apiserver/pkg/endpoints/handlers/responsewriters/errors.go).
_RIGHT = re.compile(r'is forbidden: User ".*" cannot ')


def refused(error: ApiException, namespace: str, what: str) -> UserError:
    """The server's refusal as an error a user can mend.

    Args:
        error: its answer.
        namespace: that was asked.
        what: the object it was about, such as `Job danceopd-distill`.
    """
    said = one_line(message_of(error))
    if error.status == 401:
        text = f"the cluster does not know who asks ({said}); log in again, or name another --context"
    elif error.status == 403 and "exceeded quota" in said:
        text = f"{what}: over the quota of namespace {namespace}: {said}; ask for less, or wait"
    elif error.status == 403 and "violates PodSecurity" in said:
        text = f"{what}: namespace {namespace} admits only restricted pods: {said}"
    elif error.status == 403 and "being terminated" in said:
        text = f"{what}: namespace {namespace} is being deleted; name another by --namespace"
    elif error.status == 403 and _RIGHT.search(said):
        text = (
            f"{what}: forbidden in namespace {namespace}: {said}; bind the role danceopd-launcher to this account "
            "(manifests/base/roles.yaml; for Kubeflow's own accounts manifests/kubeflow)"
        )
    elif error.status == 403:
        text = f"{what}: refused by a rule of the cluster: {said}; change what the rule names, or ask who set it"
    elif error.status == 400 and "unknown field" in said:
        text = f"{what}: a misspelt or unknown field: {said}"
    elif error.status == 404 and f'namespaces "{namespace}"' in said:
        text = (
            f"namespace {namespace}: no such namespace; --namespace names another one, the overlay of your platform "
            "(kubectl apply -k manifests/overlays/...) makes danceopd"
        )
    elif error.status == 404 and ("page not found" in said or "requested resource" in said):
        text = f"{what}: the cluster does not know this kind; install Kubeflow Trainer, or use --kind Job"
    elif error.status == 404:
        text = f"{what}: not in namespace {namespace}; `danceopd job status` lists what is"
    else:
        text = f"{what}: the cluster says {error.status}: {said}"
    return UserError(text)


def trouble(pods: list[dict], events: list[dict]) -> str:
    """Why a job's pods do not run, or did not run to the end; empty if nothing is wrong.

    Args:
        pods: of the job, newest last, as JSON.
        events: warnings about the job and its pods, oldest first, as JSON.
    """
    live = [pod for pod in pods if _phase(pod) in ("Pending", "Running")]
    for pod in live:
        found = next(_waiting(pod), "") or _unscheduled(pod) or _not_started(pod, events)
        if found:
            return found
    if not live and (kept_out := _no_pods(events)):
        return kept_out
    return next(filter(None, (_ended(pod) for pod in reversed(pods))), "")


def exit_codes(pods: list[dict]) -> list[int]:
    """Exit codes of the containers that failed, newest pod last."""
    return [state["exitCode"] for pod in pods for state in _terminated(pod) if state["exitCode"] != 0]


def interrupted(pod: dict) -> bool:
    """Whether a pod was ended from outside (preempted, evicted, drained) or gave way with exit code 75.

    One that was evicted because it outgrew its own limit was not: it would end the same way again.
    """
    status = pod.get("status", {})
    if _outgrew(pod):
        return False
    taken = any(c["type"] == "DisruptionTarget" and c["status"] == "True" for c in status.get("conditions") or [])
    return taken or status.get("reason") in ("Evicted", "Preempting") or ExitCode.INTERRUPTED in exit_codes([pod])


def ended_badly(pods: list[dict]) -> dict[str, str]:
    """What each pod that is over ended with, if badly, by name."""
    return {pod["metadata"]["name"]: _ended(pod) for pod in pods if _phase(pod) == "Failed"}


def being_ended(pods: list[dict]) -> str:
    """That a running pod was told to end from outside, while it saves itself; empty if none was."""
    for pod in pods:
        taken = _disruption(pod)
        if _phase(pod) == "Running" and (taken or "deletionTimestamp" in pod["metadata"]):
            return f"interrupted ({taken or 'its pod is being deleted'}); it goes on from its last checkpoint"
    return ""


def pattern(reason: str) -> str:
    """A reason without what changes while it stays the same: numbers, and the random ends of pods' names."""
    return re.sub(r"-[a-z0-9]{5}\b|\d+", "", reason)


def _outgrew(pod: dict) -> bool:
    status = pod.get("status", {})
    return status.get("reason") == "Evicted" and bool(OUTGREW.search(status.get("message", "")))


def _phase(pod: dict) -> str:
    return pod.get("status", {}).get("phase", "Pending")


def _containers(pod: dict) -> list[dict]:
    status = pod.get("status", {})
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _terminated(pod: dict) -> Iterator[dict]:
    yield from (c["state"]["terminated"] for c in _containers(pod) if c.get("state", {}).get("terminated"))


def _waiting(pod: dict) -> Iterator[str]:
    for container in _containers(pod):
        waiting = container.get("state", {}).get("waiting") or {}
        said = waiting.get("message") or waiting.get("reason", "")
        if waiting.get("reason") in IMAGE_TROUBLE:
            yield f"image {container.get('image')} cannot be pulled: {said}; mend the name, or add a pull secret"
        elif waiting.get("reason") in CONFIG_TROUBLE:
            yield f"the container cannot be made: {said}"


def _unscheduled(pod: dict) -> str:
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            said = condition.get("message", "no reason given")
            wanted = next((name for name in _resources(pod) if any(a in name for a in ACCELERATORS)), None)
            if wanted and (f"Insufficient {wanted}" in said or "node(s) didn't match" in said):
                return f"no node has {_resources(pod)[wanted]} free {wanted}; the scheduler says: {said}"
            return f"no node takes the pod; the scheduler says: {said}"
    return ""


def _resources(pod: dict) -> dict[str, Any]:
    limits = [c.get("resources", {}).get("limits") or {} for c in pod.get("spec", {}).get("containers", [])]
    return {name: value for each in limits for name, value in each.items()}


def _not_started(pod: dict, events: list[dict]) -> str:
    """What the kubelet, or whoever attaches volumes, warned of last about a pod that has a node but does not run."""
    if _phase(pod) != "Pending":
        return ""
    name, past = pod["metadata"]["name"], "FailedScheduling"  # it has been scheduled since
    about = [e for e in events if e["involvedObject"].get("name") == name and e.get("reason") != past]
    if not about:
        return ""
    reason, said = about[-1].get("reason"), about[-1]["message"]
    if reason in VOLUME_TROUBLE:
        return f"a volume cannot be mounted: {said}"
    return f"its node cannot start it ({reason}): {said}"


def _no_pods(events: list[dict]) -> str:
    """Why a controller may not make pods at all: quota and pod security speak through events only."""
    failed = [event["message"] for event in events if event.get("reason") == "FailedCreate"]
    if not failed:
        return ""
    said = failed[-1]
    if "exceeded quota" in said:
        return f"over the namespace's quota: {said}; ask for less, or wait"
    if "violates PodSecurity" in said:
        return f"the namespace admits only restricted pods: {said}"
    return f"pods cannot be made: {said}"


def _ended(pod: dict) -> str:
    """What a pod that is over ended with, if badly."""
    if _phase(pod) != "Failed":
        return ""
    status = pod["status"]
    if _outgrew(pod):
        return f"out of scratch space: {status['message'].strip()}; write less to /tmp, or raise its sizeLimit"
    for state in _terminated(pod):
        code, last = state["exitCode"], _last_line(state.get("message"))
        if state.get("reason") == "OOMKilled":
            memory = _resources(pod).get("memory", "not set")
            return f"out of memory: the container was OOM-killed at its limit of {memory}; ask for more, or use less"
        if interrupted(pod):
            continue
        if code != 0:
            return last.removeprefix("danceopd: ") or f"the container ended with exit code {code}"
    if interrupted(pod):
        said = status.get("message") or _disruption(pod) or "it was asked to end"
        return f"interrupted ({said}); it goes on from its last checkpoint"
    return status.get("message") or status.get("reason") or "the pod failed and does not say why"


def _disruption(pod: dict) -> str:
    conditions = pod.get("status", {}).get("conditions") or []
    return next((c.get("message", "") for c in conditions if c["type"] == "DisruptionTarget"), "")


def _last_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("danceopd: ")]
    return (own or lines or [""])[-1]
