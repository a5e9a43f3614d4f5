"""What an API server that validates strictly says of an object: the first field it does not know.

Fields are those of the kubernetes client's own models, which are made from the API's schemas. A custom resource's are
told here for what the manifests use (the definitions of Trainer 2.2, Kueue 0.15, the Prometheus operator and Katib);
their pod templates end in the core's models again.
"""

from __future__ import annotations

import re
from typing import Any

from kubernetes.client import models

POD_TEMPLATE = "V1PodTemplateSpec"
OPEN = "object"  # anything may stand there
CUSTOM: dict[str, dict[str, Any]] = {
    "TrainJob": {
        "activeDeadlineSeconds": OPEN,
        "suspend": OPEN,
        "runtimeRef": {"apiGroup": OPEN, "kind": OPEN, "name": OPEN},
        "trainer": {
            "image": OPEN,
            "command": OPEN,
            "args": OPEN,
            "env": "list[V1EnvVar]",
            "numNodes": OPEN,
            "numProcPerNode": OPEN,
            "resourcesPerNode": "V1ResourceRequirements",
        },
    },
    "TrainingRuntime": {
        "mlPolicy": {"numNodes": OPEN, "torch": {"numProcPerNode": OPEN}},
        "template": {
            "spec": {
                "failurePolicy": {
                    "maxRestarts": OPEN,
                    "rules": [{"name": OPEN, "action": OPEN, "onJobFailureReasons": OPEN}],
                },
                "replicatedJobs": [{"name": OPEN, "replicas": OPEN, "template": "V1JobTemplateSpec"}],
            }
        },
    },
    "ResourceFlavor": {"nodeLabels": OPEN, "tolerations": OPEN},
    "ClusterQueue": {
        "namespaceSelector": "V1LabelSelector",
        "queueingStrategy": OPEN,
        "preemption": {"withinClusterQueue": OPEN},
        "resourceGroups": [
            {
                "coveredResources": OPEN,
                "flavors": [{"name": OPEN, "resources": [{"name": OPEN, "nominalQuota": OPEN}]}],
            }
        ],
    },
    "LocalQueue": {"clusterQueue": OPEN},
    "ServiceMonitor": {
        "selector": "V1LabelSelector",
        "endpoints": [{"port": OPEN, "path": OPEN, "interval": OPEN}],
    },
    "PrometheusRule": {
        "groups": [
            {
                "name": OPEN,
                "rules": [{"alert": OPEN, "expr": OPEN, "for": OPEN, "labels": OPEN, "annotations": OPEN}],
            }
        ]
    },
    "Experiment": {
        "objective": {"type": OPEN, "objectiveMetricName": OPEN, "additionalMetricNames": OPEN},
        "algorithm": {"algorithmName": OPEN},
        "parallelTrialCount": OPEN,
        "maxTrialCount": OPEN,
        "maxFailedTrialCount": OPEN,
        "parameters": [
            {"name": OPEN, "parameterType": OPEN, "feasibleSpace": {"min": OPEN, "max": OPEN, "list": OPEN}}
        ],
        "trialTemplate": {
            "primaryContainerName": OPEN,
            "trialParameters": [{"name": OPEN, "description": OPEN, "reference": OPEN}],
            "trialSpec": {"apiVersion": OPEN, "kind": OPEN, "spec": "V1JobSpec"},
        },
    },
}


def unknown_field(document: dict) -> str:
    """The path of the first field that is not known; empty if all are."""
    kind = document["kind"]
    if kind in CUSTOM:
        fields = {"apiVersion": OPEN, "kind": OPEN, "metadata": "V1ObjectMeta", "spec": CUSTOM[kind]}
        return _unknown(document, fields, "")
    group = document["apiVersion"].rpartition("/")[2]
    return _unknown(document, f"{group[0].upper()}{group[1:]}{kind}", "")


def _unknown(value: Any, fields: Any, path: str) -> str:
    if isinstance(fields, list):
        found = (_unknown(item, fields[0], f"{path}[{n}]") for n, item in enumerate(value))
        return next(filter(None, found), "")
    if isinstance(fields, str):
        return _unknown_of_type(value, fields, path)
    for name, inner in value.items() if isinstance(value, dict) else ():
        here = f"{path}.{name}".lstrip(".")
        if name not in fields:
            return here
        if found := _unknown(inner, fields[name], here):
            return found
    return ""


def _unknown_of_type(value: Any, kind: str, path: str) -> str:
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        return _unknown(value, [inner[1]], path)
    if inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        found = (_unknown(item, inner[1], f"{path}.{name}") for name, item in value.items())
        return next(filter(None, found), "")
    model = getattr(models, kind, None)
    if model is None:  # a plain value
        return ""
    types = {model.attribute_map[name]: inner for name, inner in model.openapi_types.items()}
    return _unknown(value, types, path)
