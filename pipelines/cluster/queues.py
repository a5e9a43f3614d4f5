"""Why a job waits in a queue: what Kueue says of the Workload that it made for it."""

from __future__ import annotations

from kubernetes.client import ApiException

from pipelines.cluster.connect import Cluster, persist

GROUP, VERSION, PLURAL = "kueue.x-k8s.io", "v1beta2", "workloads"
QUEUE = f"{GROUP}/queue-name"  # label of a job: the LocalQueue that admits it
JOB_UID = f"{GROUP}/job-uid"  # label of a Workload: the job it was made for
NOT_ADMITTED = "its queue has not admitted it"


def why_queued(cluster: Cluster, kind: str, job: dict, events: list[dict]) -> str:
    """Why a suspended job is not admitted, in one line.

    Kueue says it in the Workload's condition QuotaReserved, and of a request that does not fit also by an event. An
    account that may not list Workloads still sees the events.

    Args:
        cluster: where.
        kind: Job or TrainJob.
        job: as JSON.
        events: warnings in the namespace, oldest first, as JSON.
    """
    queue = job["metadata"].get("labels", {}).get(QUEUE)
    if queue is None:
        return f"suspended, and no queue will start it; give it one (label {QUEUE}), or resume it"
    said = _condition(cluster, job["metadata"]["uid"]) or _event(kind, job["metadata"]["name"], events)
    return f"queue {queue}: {said or NOT_ADMITTED}"


def _condition(cluster: Cluster, uid: str) -> str:
    call = cluster.objects.list_namespaced_custom_object
    try:
        selector = f"{JOB_UID}={uid}"
        found = persist(cluster, call, GROUP, VERSION, cluster.namespace, PLURAL, label_selector=selector)["items"]
    except ApiException as error:
        if error.status in (403, 404):
            return ""
        raise
    conditions = [c for item in found for c in item.get("status", {}).get("conditions") or []]
    waits = [c for c in conditions if c["type"] == "QuotaReserved" and c["status"] == "False"]
    return waits[-1].get("message", "") if waits else ""


def _event(kind: str, name: str, events: list[dict]) -> str:
    start = f"{kind.lower()}-{name}-"
    about = [e for e in events if e["involvedObject"].get("name", "").startswith(start)]
    return about[-1]["message"] if about else ""
