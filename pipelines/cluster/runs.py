"""The pipeline run a job was submitted from: it owns the job, and its cancellation is the job's.

A step's pod gets the same SIGTERM when its node is drained and when its run is cancelled. The run itself tells the two
apart: Kubeflow Pipelines cancels one by setting its deadline to nothing, Argo by asking it to shut down.
"""

from __future__ import annotations

from kubernetes.client import ApiException

from pipelines.cluster.connect import Cluster, persist
from pipelines.cluster.reasons import refused

GROUP, VERSION, PLURAL = "argoproj.io", "v1alpha1", "workflows"


def owner_reference(cluster: Cluster, name: str) -> dict | None:
    """A reference to the run; None if it is gone.

    Raises:
        UserError: if it may not be read.
    """
    run = _read(cluster, name)
    if run is None:
        return None
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "Workflow", "name": name, "uid": run["metadata"]["uid"]}


def was_cancelled(cluster: Cluster, name: str) -> bool:
    """Whether the run was cancelled, or is gone.

    Raises:
        UserError: if it may not be read.
    """
    run = _read(cluster, name)
    if run is None or "deletionTimestamp" in run["metadata"]:
        return True
    spec = run.get("spec", {})
    return spec.get("activeDeadlineSeconds") == 0 or spec.get("shutdown") in ("Stop", "Terminate")


def _read(cluster: Cluster, name: str) -> dict | None:
    call = cluster.objects.get_namespaced_custom_object
    try:
        return persist(cluster, call, GROUP, VERSION, cluster.namespace, PLURAL, name)
    except ApiException as error:
        if error.status == 404:
            return None
        raise refused(error, cluster.namespace, f"Workflow {name}") from error
