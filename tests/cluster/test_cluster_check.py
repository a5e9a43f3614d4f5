"""`danceopd cluster check`: a line for each thing, right about what is there, and nothing changed by looking."""

from __future__ import annotations

import pytest
import yaml
from test_cluster_cli import kubeconfig  # noqa: F401
from test_manifests import MANIFESTS
from typer.testing import CliRunner

from pipelines.cluster import check as room
from pipelines.cluster.check import Wanted, check
from pipelines.cluster.check_cli import app

KINDS = {
    "namespaces",
    "persistentvolumeclaims",
    "serviceaccounts",
    "priorityclasses",
    "secrets",
    "configmaps",
    "deployments",
    "nodes",
    "localqueues",
    "trainingruntimes",
}
HOST = "danceopd-mlflow.danceopd.svc.cluster.local:5000"


@pytest.fixture
def furnished(api):
    """A server whose namespace has all that a run needs."""
    api.kinds |= KINDS
    api.put("namespaces", {"metadata": {"name": "danceopd", "labels": {}}})
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "200Gi"}}}
    api.put(
        "persistentvolumeclaims",
        {"metadata": {"name": "danceopd-workspace"}, "spec": claim, "status": {"phase": "Bound"}},
    )
    done = {"conditions": [{"type": "Complete", "status": "True"}]}
    api.put("jobs", {"metadata": {"name": "danceopd-prepare"}, "spec": {}, "status": done})
    for name in ("danceopd", "pipeline-runner"):
        api.put("serviceaccounts", {"metadata": {"name": name}})
    api.rights = {("pipeline-runner", g, r, verb) for g, r, verbs in room.RIGHTS for verb in verbs}
    api.put("priorityclasses", {"metadata": {"name": "danceopd-training"}, "value": 1000})
    api.put("secrets", {"metadata": {"name": "danceopd-hub"}, "data": {"token": "czNjcmV0"}})
    api.put("configmaps", {"metadata": {"name": "danceopd-tracking"}, "data": {"uri": f"http://{HOST}"}})
    container = {"name": "mlflow", "image": "m:1", "args": ["--port=5000", f"--allowed-hosts=localhost:5000,{HOST}"]}
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [container]}}
    spec = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
    api.put("deployments", {"metadata": {"name": "danceopd-mlflow"}, "spec": spec, "status": {"availableReplicas": 1}})
    api.put("nodes", {"metadata": {"name": "n1"}, "status": {"allocatable": {"nvidia.com/gpu": "8"}}})
    api.put("nodes", {"metadata": {"name": "n2"}, "status": {"allocatable": {"cpu": "8"}}})
    api.groups |= {"argoproj.io": ["v1alpha1"], "kueue.x-k8s.io": ["v1beta2"], "trainer.kubeflow.org": ["v1alpha1"]}
    api.put("localqueues", {"metadata": {"name": "gpus"}})
    api.put("trainingruntimes", yaml.safe_load((MANIFESTS / "trainer" / "training-runtime.yaml").read_text()))
    return api


def lines(cluster, **wanted) -> dict[str, tuple[str, str]]:
    return {line.what: (line.state, line.said) for line in check(cluster, Wanted(**wanted))}


def test_a_furnished_namespace_lacks_nothing_and_is_left_as_it_was(furnished, cluster):
    before = dict(furnished.objects)
    found = lines(cluster)
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["API"][1].startswith("Kubernetes 1.34.9 at http://127.0.0.1")
    assert found["claim danceopd-workspace"][1] == "ReadWriteMany, bound, 200Gi"
    assert found["GPU nodes"][1] == "1 of 2 nodes have nvidia.com/gpu, at most 8 each"
    assert furnished.objects == before
    asked = {verb for _, resource, verb in furnished.calls if resource != "localsubjectaccessreviews"}
    assert asked <= {"get", "list"}, "a review makes no object"


def test_the_rights_it_asks_about_are_the_roles():
    role = yaml.safe_load((MANIFESTS / "launcher" / "role.yaml").read_text())
    granted = {
        (g, r, v) for rule in role["rules"] for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]
    }
    assert {(g, r, v) for g, r, verbs in room.RIGHTS for v in verbs} == granted


def without(plural: str, name: str):
    return lambda api: api.remove(plural, name)


def mode(api):
    api.objects["persistentvolumeclaims", "danceopd-workspace"]["spec"]["accessModes"] = ["ReadWriteOnce"]


def unwritable(api):
    api.condition("danceopd-prepare", "Failed")


def old_runtime(api):
    api.objects["trainingruntimes", "danceopd"]["spec"]["template"]["spec"]["failurePolicy"].pop("rules")


def stranger(api):
    server = api.objects["deployments", "danceopd-mlflow"]
    server["spec"]["template"]["spec"]["containers"][0]["args"] = ["--allowed-hosts=localhost:5000"]


@pytest.mark.parametrize(
    ("spoil", "what", "state", "said"),
    [
        (without("namespaces", "danceopd"), "namespace", "missing", "danceopd: not there"),
        (without("persistentvolumeclaims", "danceopd-workspace"), "claim danceopd-workspace", "missing", "wait for it"),
        (mode, "claim danceopd-workspace", "ok", "every step and job must then be on one node"),
        (without("jobs", "danceopd-prepare"), "workspace", "unknown", "only a pod can tell whether it is writable"),
        (unwritable, "workspace", "missing", "not writable for user 1000"),
        (without("serviceaccounts", "danceopd"), "account danceopd", "missing", "jobs make no pods without it"),
        (without("serviceaccounts", "pipeline-runner"), "account of steps", "missing", "steps have no account"),
        (
            lambda api: api.rights.discard(("pipeline-runner", "trainer.kubeflow.org", "trainjobs", "create")),
            "account pipeline-runner",
            "missing",
            "lacks create trainjobs; bind the role",
        ),
        (without("priorityclasses", "danceopd-training"), "priority class danceopd-training", "missing", "not there"),
        (without("secrets", "danceopd-hub"), "Secret danceopd-hub", "unused", "only gated base models need it"),
        (without("configmaps", "danceopd-tracking"), "MLflow", "unused", "write to a file in the workspace"),
        (without("deployments", "danceopd-mlflow"), "MLflow", "missing", "there is no such server"),
        (stranger, "MLflow", "missing", f"refuses this name; add {HOST} to its --allowed-hosts"),
        (without("nodes", "n1"), "GPU nodes", "unused", "none of 1 nodes has nvidia.com/gpu"),
        (lambda api: api.groups.pop("kueue.x-k8s.io"), "Kueue", "unused", "not installed"),
        (lambda api: api.groups.update({"kueue.x-k8s.io": ["v1beta1"]}), "Kueue", "missing", "need 0.15"),
        (lambda api: api.groups.pop("trainer.kubeflow.org"), "Trainer", "unused", "not installed"),
        (without("trainingruntimes", "danceopd"), "Trainer", "unused", "TrainJobs need manifests/trainer"),
        (old_runtime, "Trainer", "missing", "delete it, then apply manifests/trainer"),
    ],
)
def test_what_is_missing_is_said(furnished, cluster, spoil, what, state, said):
    spoil(furnished)
    found = lines(cluster)
    assert found[what][0] == state and said in found[what][1]
    assert [w for w, (s, _) in found.items() if s == "missing" and w != what] == []


def test_what_may_not_be_looked_at_is_no_end(furnished, cluster):
    for verb, plural in (("list", "nodes"), ("get", "namespaces"), ("get", "secrets")):
        furnished.forbid(verb, plural)
    found = lines(cluster)
    unknown = {what for what, (state, _) in found.items() if state == "unknown"}
    assert unknown == {"GPU nodes", "namespace", "Secret danceopd-hub"}


def test_the_command_ends_with_what_it_found(furnished, kubeconfig):  # noqa: F811
    result = CliRunner().invoke(app, ["check", "--namespace", "danceopd"])
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "nothing is missing"
    assert "czNjcmV0" not in result.stdout and "s3cret" not in result.stdout
    furnished.remove("persistentvolumeclaims", "danceopd-workspace")
    result = CliRunner().invoke(app, ["check", "--namespace", "danceopd"])
    assert result.exit_code == 2 and result.stdout.splitlines()[-1] == "1 missing"
