"""Jobs of either kind: submitted or adopted, looked at, waited for, cancelled.

A job is known by its name alone. Whoever submits the same thing again (a step whose pod was restarted, a second
terminal) finds it there and follows it; a copy of what was submitted is never made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import urllib3
from kubernetes import watch
from kubernetes.client import ApiException

from danceopd.errors import ExitCode, UserError
from danceopd.files import content_key
from pipelines.cluster.connect import TIMEOUT, Cluster, one_line, persist
from pipelines.cluster.queues import why_queued
from pipelines.cluster.reasons import being_ended, ended_badly, exit_codes, pattern, refused, trouble
from pipelines.cluster.sameness import SPEC, same_spec

PART_OF = {"app.kubernetes.io/part-of": "danceopd"}
QUEUED, PENDING, RUNNING, SUCCEEDED, FAILED, GONE = "queued", "pending", "running", "succeeded", "failed", "gone"
OVER = (SUCCEEDED, FAILED, GONE)
LOOK_EVERY = 10  # seconds, if nothing changes before
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of job.

    Attributes:
        name: as manifests say it.
        group: of the API.
        version: of the API.
        plural: as paths say it.
        selector: label that its pods carry, with the job's name.
        deletion: propagation policy. One that is deleted in the foreground stays until its pods are gone; Kubeflow
            Trainer (2.2, `trainjob_controller.go`) takes no notice of that and makes its JobSet anew meanwhile.
    """

    name: str
    group: str
    version: str
    plural: str
    selector: str
    deletion: str

    @property
    def api_version(self) -> str:
        """As manifests say it."""
        return f"{self.group}/{self.version}"


_JOB = Kind("Job", "batch", "v1", "jobs", "batch.kubernetes.io/job-name", "Foreground")
_TRAIN_JOB = Kind(
    "TrainJob", "trainer.kubeflow.org", "v1alpha1", "trainjobs", "jobset.sigs.k8s.io/jobset-name", "Background"
)
KINDS = {kind.name: kind for kind in (_JOB, _TRAIN_JOB)}
INDEX = "batch.kubernetes.io/job-completion-index"  # label and annotation of a pod: its node's rank


@dataclass(frozen=True)
class Handle:
    """A job on the cluster.

    Attributes:
        kind: of it.
        name: in its namespace.
        uid: of this very one; a later one of the same name is another.
        adopted: whether it was there before it was asked for.
    """

    kind: Kind
    name: str
    uid: str
    adopted: bool = False

    def __str__(self) -> str:
        return f"{self.kind.name} {self.name}"


@dataclass(frozen=True)
class Status:
    """How a job stands.

    Attributes:
        state: queued, pending, running, succeeded, failed or gone.
        reason: why it is not running, or why it failed, in one line.
        user_error: whether it failed over bad input, so that trying again does not help.
        pods: running pods, and those wanted.
        at: the job's resource version this was read at.
        live: names of the pods that run.
        ended: what pods that are over ended with, if badly, by name.
    """

    state: str
    reason: str = ""
    user_error: bool = False
    pods: tuple[int, int] = (0, 0)
    at: str = field(default="", compare=False)
    live: frozenset[str] = field(default=frozenset(), compare=False)
    ended: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        count = (
            f" ({self.pods[0]} of {self.pods[1]} pods)" if self.state in (PENDING, RUNNING) and any(self.pods) else ""
        )
        return f"{self.state}{count}" + (f": {self.reason}" if self.reason else "")


def kind_of(document: dict) -> Kind:
    """The kind of job a manifest is.

    Raises:
        UserError: for any other kind.
    """
    kind = KINDS.get(document.get("kind", ""))
    if kind is None or document.get("apiVersion") != kind.api_version:
        wanted = " or ".join(f"{k.name} ({k.api_version})" for k in KINDS.values())
        given = f"{document.get('kind')} ({document.get('apiVersion')})"
        raise UserError(f"{given} is not a job; give a {wanted}, and other objects to kubectl apply")
    return kind


# --------------------------------------------------------------------------------------------------------- submitting


def submit(
    cluster: Cluster, document: dict, services: list[dict] | None = None, again: bool = False, owner: dict | None = None
) -> Handle:
    """Make the job, or adopt the one that is there already.

    One that runs or has succeeded is adopted. One that failed is replaced, unless it failed over bad input.

    Args:
        cluster: where.
        document: the job's manifest.
        services: headless services its pods need to find each other; they are deleted with the job.
        again: replace one that is over, however it ended.
        owner: owner reference: the job is deleted with this object.

    Raises:
        UserError: if the cluster refuses, or another job of this name is under way.
    """
    kind, name = kind_of(document), document["metadata"]["name"]
    wanted = _stamped(document, cluster.namespace, owner)
    while True:
        handle = _create(cluster, kind, wanted) or _adopt(cluster, kind, name, wanted, again)
        if handle is not None:
            break
    for service in services or []:
        _create_service(cluster, service, handle)
    return handle


def _stamped(document: dict, namespace: str, owner: dict | None) -> dict:
    metadata = document["metadata"]
    named = {
        **metadata,
        "namespace": namespace,
        "labels": {**PART_OF, **metadata.get("labels", {})},
        "annotations": {**metadata.get("annotations", {}), SPEC: content_key(document.get("spec"))},
    }
    return {**document, "metadata": named | ({"ownerReferences": [owner]} if owner else {})}


def _create(cluster: Cluster, kind: Kind, document: dict) -> Handle | None:
    """Make it; None if there is one of this name. Also if an answer got lost and a retry finds what the first made."""
    call, name = cluster.objects.create_namespaced_custom_object, document["metadata"]["name"]
    path = (kind.group, kind.version, cluster.namespace, kind.plural)
    try:
        made = persist(cluster, call, *path, document, field_validation="Strict")
    except ApiException as error:
        if error.status == 409:
            return None
        raise refused(error, cluster.namespace, f"{kind.name} {name}") from error
    return Handle(kind, name, made["metadata"]["uid"])


def _adopt(cluster: Cluster, kind: Kind, name: str, wanted: dict, again: bool) -> Handle | None:
    """The job that is there, or None if it made way for a new one."""
    there = _get(cluster, kind, name)
    if there is None:
        return None
    handle = Handle(kind, name, there["metadata"]["uid"], adopted=True)
    if "deletionTimestamp" in there["metadata"]:
        _wait_until_gone(cluster, handle)
        return None
    status = _status(cluster, handle, there)
    same = same_spec(there, wanted["spec"])
    if status.state not in OVER:
        if not same:
            raise UserError(
                f"{handle} is under way with another specification; cancel it first (danceopd job cancel {name}), "
                "or give this one another name"
            )
        return handle
    if same and not again and (status.state == SUCCEEDED or status.user_error):
        return handle
    cancel(cluster, handle)
    return None


def _create_service(cluster: Cluster, service: dict, owner: Handle) -> None:
    reference = {"apiVersion": owner.kind.api_version, "kind": owner.kind.name, "name": owner.name, "uid": owner.uid}
    metadata = {**service["metadata"], "namespace": cluster.namespace, "ownerReferences": [reference]}
    body = {**service, "metadata": metadata}
    try:
        persist(cluster, cluster.core.create_namespaced_service, cluster.namespace, body, field_validation="Strict")
    except ApiException as error:
        if error.status != 409:
            raise refused(error, cluster.namespace, f"Service {service['metadata']['name']}") from error


# ------------------------------------------------------------------------------------------------------------ looking


def find(cluster: Cluster, name: str) -> Handle:
    """The job of this name, of whichever kind.

    Raises:
        UserError: if there is none, or it may not be read.
    """
    found = find_if_there(cluster, name)
    if found is None:
        raise UserError(f"job {name}: not in namespace {cluster.namespace}; `danceopd job status` lists what is")
    return found


def find_if_there(cluster: Cluster, name: str) -> Handle | None:
    """The job of this name, of whichever kind; None if there is none.

    Raises:
        UserError: if it may not be read.
    """
    for kind in KINDS.values():
        there = _get(cluster, kind, name)
        if there is not None:
            return Handle(kind, name, there["metadata"]["uid"], adopted=True)
    return None


def find_all(cluster: Cluster) -> list[Handle]:
    """All of our jobs in the namespace, by name; a kind that the cluster does not know has none."""
    selector = ",".join(f"{key}={value}" for key, value in PART_OF.items())
    found = []
    for kind in KINDS.values():
        call, path = cluster.objects.list_namespaced_custom_object, (kind.group, kind.version, cluster.namespace)
        try:
            items = persist(cluster, call, *path, kind.plural, label_selector=selector)["items"]
        except ApiException as error:
            if error.status == 404:
                continue
            raise refused(error, cluster.namespace, f"{kind.plural}") from error
        found += [Handle(kind, item["metadata"]["name"], item["metadata"]["uid"], True) for item in items]
    return sorted(found, key=lambda handle: handle.name)


def look(cluster: Cluster, handle: Handle) -> Status:
    """How the job stands now."""
    there = _get(cluster, handle.kind, handle.name)
    if there is None or there["metadata"]["uid"] != handle.uid:
        return Status(GONE, "it was deleted")
    return _status(cluster, handle, there)


def _get(cluster: Cluster, kind: Kind, name: str) -> dict | None:
    call = cluster.objects.get_namespaced_custom_object
    try:
        return persist(cluster, call, kind.group, kind.version, cluster.namespace, kind.plural, name)
    except ApiException as error:
        if error.status == 404:
            return None
        raise refused(error, cluster.namespace, f"{kind.name} {name}") from error


def _status(cluster: Cluster, handle: Handle, there: dict) -> Status:
    spec, seen = there.get("spec", {}), there.get("status", {})
    held = {c["type"]: c for c in seen.get("conditions") or [] if c["status"] == "True"}
    at = there["metadata"].get("resourceVersion", "")
    if "Complete" in held or "SuccessCriteriaMet" in held:
        return Status(SUCCEEDED, at=at)
    pods = pods_of(cluster, handle)
    if "Failed" in held or "FailureTarget" in held:
        condition = held.get("Failed") or held["FailureTarget"]
        reason = _failure(condition, trouble(pods, _events(cluster, handle)))
        return Status(FAILED, reason, bool(exit_codes(pods)) and exit_codes(pods)[-1] == ExitCode.BAD_INPUT, at=at)
    if spec.get("suspend"):
        return Status(QUEUED, one_line(why_queued(cluster, handle.kind.name, there, _warnings(cluster))), at=at)
    live = frozenset(pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") == "Running")
    wanted = spec.get("parallelism", 1) if handle.kind.name == "Job" else spec.get("trainer", {}).get("numNodes", 1)
    state = RUNNING if len(live) == wanted else PENDING
    reason = being_ended(pods) or ("" if state == RUNNING else trouble(pods, _events(cluster, handle)))
    return Status(state, one_line(reason), pods=(len(live), wanted), at=at, live=live, ended=ended_badly(pods))


def _failure(condition: dict, reason: str) -> str:
    if condition.get("reason") == "DeadlineExceeded":
        return "it ran longer than it may (activeDeadlineSeconds); submitted again, it goes on from its last checkpoint"
    return reason or condition.get("message") or condition.get("reason") or "no reason given"


def pods_of(cluster: Cluster, handle: Handle) -> list[dict]:
    """The job's pods as JSON, oldest first."""
    selector = f"{handle.kind.selector}={handle.name}"
    return _list(cluster, cluster.core.list_namespaced_pod, "pods", label_selector=selector)


def _events(cluster: Cluster, handle: Handle) -> list[dict]:
    """Warnings about the job and what was made for it, oldest first."""
    names = (handle.name, f"{handle.name}-")
    return [
        e
        for e in _warnings(cluster)
        if e["involvedObject"].get("name") == names[0] or e["involvedObject"].get("name", "").startswith(names[1])
    ]


def _warnings(cluster: Cluster) -> list[dict]:
    return _list(cluster, cluster.core.list_namespaced_event, "events", field_selector="type=Warning")


def _list(cluster: Cluster, call: Callable, what: str, **selection: str) -> list[dict]:
    try:
        found = persist(cluster, call, cluster.namespace, **selection)
    except ApiException as error:
        raise refused(error, cluster.namespace, what) from error
    items = cluster.api.sanitize_for_serialization(found)["items"]
    return sorted(items, key=lambda item: item["metadata"].get("creationTimestamp") or "")


# ------------------------------------------------------------------------------------------------- waiting, cancelling


def statuses(cluster: Cluster, handle: Handle, look_every: float = LOOK_EVERY) -> Iterator[Status]:
    """Every status of the job, until it is over.

    Each is read afresh. The watch between two only says when to look again, so that one that was dropped, or has become
    too old (410), costs nothing.
    """
    while True:
        status = look(cluster, handle)
        yield status
        if status.state in OVER:
            return
        _wait_for_change(cluster, handle, status.at, look_every)


def _wait_for_change(cluster: Cluster, handle: Handle, version: str, seconds: float) -> None:
    kind, started = handle.kind, time.monotonic()
    options = {"field_selector": f"metadata.name={handle.name}", "resource_version": version}
    timeouts = {"timeout_seconds": max(1, round(seconds)), "_request_timeout": (TIMEOUT[0], seconds + 5)}
    call, path = cluster.objects.list_namespaced_custom_object, (kind.group, kind.version, cluster.namespace)
    try:
        for _ in watch.Watch().stream(call, *path, kind.plural, **options, **timeouts):
            return
    except ApiException as error:
        if error.status in (401, 403):
            raise refused(error, cluster.namespace, f"watching {kind.plural}") from error
        log.debug("watch ended: %s", error)
    except (urllib3.exceptions.HTTPError, ValueError) as error:  # dropped, or cut off within a line
        log.debug("watch ended: %s", error)
    if time.monotonic() - started < min(cluster.pause, seconds):
        time.sleep(min(cluster.pause, seconds))  # a server that ends each watch at once is not to be flooded


def wait(
    cluster: Cluster, handle: Handle, say: Callable[[str], Any], start_within: float, look_every: float = LOOK_EVERY
) -> Status:
    """Follow the job to its end, saying each new status once, and each reason once.

    Args:
        cluster: where.
        handle: the job.
        say: takes each status in one line.
        start_within: seconds it may take to run, queueing apart; then it is deleted. Counts anew after an interruption.
        look_every: seconds between two looks if nothing changes.

    Raises:
        UserError: if it does not start in time; the message gives the reason.
    """
    last: Status | None = None
    running = time.monotonic()
    said: set[str] = set()
    for status in statuses(cluster, handle, look_every):
        for why in () if last is None else _lost(last, status):
            if pattern(why) not in said:
                say(f"{handle}: {why}")
        if status != last:
            short = replace(status, reason="") if pattern(status.reason) in said else status
            if last is None or short.reason or str(short) != str(replace(last, reason="")):
                say(f"{handle}: {short}")
            said.add(pattern(status.reason))
        last = status
        if status.state != PENDING:
            running = time.monotonic()
        elif time.monotonic() - running > start_within:
            cancel(cluster, handle)
            why = status.reason or "its pods did not start"
            raise UserError(f"{handle} did not run within {start_within / 60:.0f} min and was deleted: {why}")
    assert last is not None  # there is a status as long as there is a job
    return last


def _lost(before: Status, now: Status) -> set[str]:
    """Why pods that ran do not any more though the job goes on, if neither status says so."""
    if now.state not in (PENDING, RUNNING) or before.reason or now.reason:
        return set()
    gone = "interrupted (its pod is gone); it goes on from its last checkpoint"
    return {now.ended.get(name) or gone for name in before.live - now.live}


def cancel(cluster: Cluster, handle: Handle) -> None:
    """Delete the job with its pods and services, and wait until they are gone. One that is gone already is fine."""
    call, kind = cluster.objects.delete_namespaced_custom_object, handle.kind
    body = {"propagationPolicy": kind.deletion, "preconditions": {"uid": handle.uid}}
    try:
        persist(cluster, call, kind.group, kind.version, cluster.namespace, kind.plural, handle.name, body=body)
    except ApiException as error:
        if error.status not in (404, 409):  # gone, or another of this name by now
            raise refused(error, cluster.namespace, str(handle)) from error
    _wait_until_gone(cluster, handle)


def _wait_until_gone(cluster: Cluster, handle: Handle) -> None:
    started, pause = time.monotonic(), cluster.pause / 4
    while (what := _left(cluster, handle)) is not None:
        if time.monotonic() - started > cluster.patience:
            raise UserError(f"{what} is being deleted, but does not go; look for a finalizer or a lost node")
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _left(cluster: Cluster, handle: Handle) -> str | None:
    """What is left of a job that was deleted: itself, or a pod that may still write to its checkpoints."""
    there = _get(cluster, handle.kind, handle.name)
    if there and there["metadata"]["uid"] == handle.uid:
        return str(handle)
    if there:  # another one of this name: the pods are its own
        return None
    pods = [p for p in pods_of(cluster, handle) if p["status"].get("phase") not in ("Succeeded", "Failed")]
    return f"{handle}'s pod {pods[0]['metadata']['name']}" if pods else None
