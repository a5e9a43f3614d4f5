"""The same job is the same whoever made it, and a field the API does not know is refused, not dropped."""

from __future__ import annotations

import copy
import json

import pytest

from danceopd.errors import UserError
from pipelines.cluster import jobs
from pipelines.cluster.objects import JobPlan, manifests
from pipelines.cluster.sameness import APPLIED, same_spec

NAME = "danceopd-distill"
PLAN = JobPlan("distill", gpus=8)


def by_kubectl(api, document: dict) -> dict:
    """Make it as `kubectl apply` does: with the text it applied, and the server's defaults."""
    made = copy.deepcopy(document)
    made["metadata"]["annotations"] = {APPLIED: json.dumps(document)}
    return api.put("jobs", defaulted(made))


def defaulted(document: dict) -> dict:
    """What an API server adds to a Job (1.34, pkg/apis/batch/v1/defaults.go), and how it writes quantities."""
    made = copy.deepcopy(document)
    pod = made["spec"]["template"]["spec"]
    made["spec"] |= {"suspend": False, "completions": 1, "parallelism": 1, "manualSelector": False}
    made["spec"]["template"]["metadata"]["labels"]["batch.kubernetes.io/job-name"] = NAME
    pod |= {"dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler"}
    pod["containers"][0]["terminationMessagePath"] = "/dev/termination-log"
    pod["containers"][0]["resources"]["limits"]["cpu"] = "8000m"
    return made


def test_a_file_that_kubectl_applied_is_adopted(api, cluster):
    document, *services = manifests(PLAN)
    made = by_kubectl(api, document)
    handle = jobs.submit(cluster, document, services)
    assert handle.adopted and handle.uid == made["metadata"]["uid"]
    changed, *_ = manifests(JobPlan("distill", gpus=4))
    with pytest.raises(UserError, match="is under way with another specification"):
        jobs.submit(cluster, changed)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda pod: None, True),
        (lambda pod: pod["containers"][0]["resources"]["limits"].update(cpu="9"), False),
        (lambda pod: pod["containers"][0]["args"].append("--set"), False),
        (lambda pod: pod.update(nodeSelector={"a": "b"}), False),
    ],
)
def test_one_without_a_note_is_compared_with_what_the_server_made_of_it(change, same):
    document, *_ = manifests(PLAN)
    there = defaulted(document)
    change(document["spec"]["template"]["spec"])
    assert same_spec(there, document["spec"]) == same


@pytest.mark.parametrize(
    ("kind", "where", "field"),
    [
        ("Job", lambda spec: spec["template"]["spec"]["containers"][0], "spec.template.spec.containers[0].imagePolicy"),
        ("Job", lambda spec: spec, "spec.imagePolicy"),
        ("TrainJob", lambda spec: spec["trainer"], "spec.trainer.imagePolicy"),
    ],
)
def test_a_misspelt_field_is_refused(api, cluster, kind, where, field):
    document, *_ = manifests(JobPlan("distill", kind=kind))
    where(document["spec"])["imagePolicy"] = "Always"
    with pytest.raises(UserError, match=r"a misspelt or unknown field: .*unknown field") as refusal:
        jobs.submit(cluster, document)
    assert f'"{field}"' in str(refusal.value) and api.of("jobs") == api.of("trainjobs") == []


def test_a_misspelt_field_of_a_service_is_refused(api, cluster):
    document, service = manifests(JobPlan("distill", nodes=2))
    service["spec"]["clusterIp"] = "None"
    with pytest.raises(UserError, match=r'unknown field "spec\.clusterIp"'):
        jobs.submit(cluster, document, [service])
