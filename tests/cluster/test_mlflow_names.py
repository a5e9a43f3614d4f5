"""MLflow refuses every name it was not told ("Invalid Host header"): all that is written anywhere is on its list."""

from __future__ import annotations

import re

import pytest
from test_manifests import FOLDERS, ROOT, built, needs_kustomize, of_kind
from test_manifests_policies import fits

ADDRESS = re.compile(r"https?://([\w.-]+:5000)\b")
ELSEWHERE = {"mlflow:5000", "HOST:5000"}  # a server of somebody else's, in an example of a message


def allowed(folder: str) -> set[str]:
    [server] = of_kind(folder, "Deployment")
    [text] = [
        a for a in server["spec"]["template"]["spec"]["containers"][0]["args"] if a.startswith("--allowed-hosts=")
    ]
    return set(text.partition("=")[2].split(","))


@needs_kustomize
@pytest.mark.parametrize("folder", ["base", "overlays/local"])
def test_every_address_of_ours_is_one_that_mlflow_accepts(folder):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "manifests").rglob("*.md")]
    pages += [*(ROOT / "manifests").rglob("*.yaml"), *(ROOT / ".github").rglob("*.y*ml")]
    named = {name: page for page in pages for name in ADDRESS.findall(page.read_text())}
    assert len(named) >= 4
    assert {name: str(page) for name, page in named.items() if name not in allowed(folder) | ELSEWHERE} == {}


@needs_kustomize
def test_the_service_has_all_of_its_names():
    names = {"danceopd-mlflow", "danceopd-mlflow.danceopd", "danceopd-mlflow.danceopd.svc"}
    names |= {"danceopd-mlflow.danceopd.svc.cluster.local", "localhost", "127.0.0.1"}
    assert allowed("base") == {f"{name}:5000" for name in names}


def lets_in(policy: dict, namespace: dict[str, str], pod: dict[str, str]) -> bool:
    """Whether an ingress policy of the namespace danceopd lets a pod of another one in."""
    for peer in (p for rule in policy["spec"]["ingress"] for p in rule["from"]):
        wanted = peer["podSelector"].get("matchExpressions", [])
        has = fits(peer["podSelector"], pod) and all(e["operator"] == "Exists" and e["key"] in pod for e in wanted)
        if has and "namespaceSelector" in peer and fits(peer["namespaceSelector"], namespace):
            return True
    return False


@needs_kustomize
@pytest.mark.parametrize(
    ("namespace", "pod", "enters"),
    [
        ({"kubernetes.io/metadata.name": "kubeflow"}, {"pipelines.kubeflow.org/v2_component": "true"}, True),
        ({"kubernetes.io/metadata.name": "kubeflow"}, {"app.kubernetes.io/part-of": "danceopd"}, True),
        ({"app.kubernetes.io/part-of": "kubeflow-profile"}, {"pipelines.kubeflow.org/v2_component": "true"}, True),
        ({"app.kubernetes.io/part-of": "kubeflow-profile"}, {"app": "notebook"}, False),
        ({"kubernetes.io/metadata.name": "other"}, {"pipelines.kubeflow.org/v2_component": "true"}, False),
    ],
)
def test_runs_in_kubeflows_namespaces_reach_mlflow_and_others_do_not(namespace, pod, enters):
    [policy] = [p for p in of_kind("base", "NetworkPolicy") if p["metadata"]["name"] == "mlflow"]
    assert lets_in(policy, namespace, pod) == enters


@needs_kustomize
@pytest.mark.parametrize("folder", ["kubeflow/standalone", "kubeflow/profile"])
def test_kubeflows_namespaces_get_what_a_run_needs_and_nothing_that_touches_other_pods(folder):
    kinds = {(d["kind"], d["metadata"]["name"]) for d in built(folder)}
    assert {
        ("PersistentVolumeClaim", "danceopd-workspace"),
        ("ServiceAccount", "danceopd"),
        ("Role", "danceopd-launcher"),
        ("RoleBinding", "danceopd-launcher"),
        ("ConfigMap", "danceopd-tracking"),
        ("PriorityClass", "danceopd-training"),
    } <= kinds
    assert not {kind for kind, _ in kinds} & {"Namespace", "NetworkPolicy", "Deployment", "StatefulSet"}
    [server] = [d["data"]["uri"] for d in built(folder) if d["kind"] == "ConfigMap"]
    assert ADDRESS.fullmatch(server)[1] in allowed("base")


@needs_kustomize
@pytest.mark.parametrize(
    ("folder", "account"), [("kubeflow/standalone", "pipeline-runner"), ("kubeflow/profile", "default-editor")]
)
def test_the_right_to_submit_is_bound_to_the_account_that_steps_run_as(folder, account):
    """KFP 2.17, manifests/kustomize: pipeline-runner, or in profiles DEFAULTPIPELINERUNNERSERVICEACCOUNT."""
    [binding] = of_kind(folder, "RoleBinding")
    [subject] = binding["subjects"]
    assert subject["name"] == account and subject["namespace"] == binding["metadata"]["namespace"]
    spaces = {d["metadata"].get("namespace") for d in built(folder) if d["kind"] != "PriorityClass"}
    assert spaces == {subject["namespace"]}


def test_there_are_folders_to_hold_to_this():
    assert {"kubeflow/standalone", "kubeflow/profile"} <= set(FOLDERS)
