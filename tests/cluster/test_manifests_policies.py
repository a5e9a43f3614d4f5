"""Network policies: everything is closed, what is open leads to pods that are there; and no image is `latest`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from test_manifests import FOLDERS, MANIFESTS, ROOT, built, needs_kustomize, of_kind

POD_KINDS = ("Job", "Deployment", "StatefulSet")
MADE_ELSEWHERE = {"pipelines.kubeflow.org/v2_component": "true"}  # steps of a pipeline, by Kubeflow
SERVERS = {"danceopd-mlflow": 5000, "danceopd-postgres": 5432, "danceopd-objects": 9000}


def policies() -> list[dict]:
    return [d for folder in ("base", "stores") for d in of_kind(folder, "NetworkPolicy")]


def pod_labels() -> list[dict[str, str]]:
    found = [d for folder in ("base", "stores", "overlays/local/jobs") for d in of_kind(folder, *POD_KINDS)]
    return [d["spec"]["template"]["metadata"]["labels"] for d in found]


def selectors(policy: dict) -> Iterator[dict]:
    spec = policy["spec"]
    yield spec["podSelector"]
    for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
        yield from (
            peer["podSelector"] for peer in [*rule.get("from", []), *rule.get("to", [])] if "podSelector" in peer
        )


def fits(selector: dict, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def ports(rules: list[dict], labels: dict[str, str], side: str) -> set[int]:
    """TCP ports that rules open towards (`to`) or from (`from`) pods of the namespace with these labels."""
    peers = [(rule, p) for rule in rules for p in rule.get(side, []) if "namespaceSelector" not in p]
    hit = [rule for rule, peer in peers if "podSelector" in peer and fits(peer["podSelector"], labels)]
    return {port["port"] for rule in hit for port in rule.get("ports", []) if port["protocol"] == "TCP"}


@needs_kustomize
def test_everything_is_closed_at_first():
    [closed] = [p for p in policies() if not (p["spec"].get("ingress") or p["spec"].get("egress"))]
    assert closed["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@needs_kustomize
def test_every_policy_is_about_pods_that_there_are():
    pods = pod_labels()
    for policy in policies():
        for selector in selectors(policy):
            there = any(fits(selector, labels) for labels in pods)
            assert there or selector.get("matchLabels") == MADE_ELSEWHERE, policy["metadata"]["name"]


@needs_kustomize
@pytest.mark.parametrize(
    ("client", "server"),
    [
        ("danceopd", "danceopd-mlflow"),
        ("danceopd-mlflow", "danceopd-objects"),
        ("danceopd-mlflow", "danceopd-postgres"),
    ],
)
def test_who_needs_a_server_reaches_its_port_and_nothing_else_does(client, server):
    name = "app.kubernetes.io/name"
    calls, answers = ({name: who, "app.kubernetes.io/part-of": "danceopd"} for who in (client, server))
    inward = [r for p in policies() if fits(p["spec"]["podSelector"], answers) for r in p["spec"].get("ingress", [])]
    outward = [r for p in policies() if fits(p["spec"]["podSelector"], calls) for r in p["spec"].get("egress", [])]
    anywhere = {port["port"] for rule in outward if "to" not in rule for port in rule["ports"]}
    assert ports(inward, calls, "from") == {SERVERS[server]}
    assert SERVERS[server] in ports(outward, answers, "to") | anywhere
    assert ports(inward, {name: "another"}, "from") == set()
    [service] = [
        d for folder in ("base", "stores") for d in of_kind(folder, "Service") if d["metadata"]["name"] == server
    ]
    assert [port["port"] for port in service["spec"]["ports"]] == [SERVERS[server]]


@needs_kustomize
def test_the_metadata_of_nodes_stays_out_of_reach_of_training():
    [training] = [p for p in policies() if p["metadata"]["name"] == "training"]
    [block] = [peer["ipBlock"] for rule in training["spec"]["egress"] for peer in rule["to"] if "ipBlock" in peer]
    assert block["except"] == ["169.254.0.0/16"]


def test_nothing_names_latest():
    places = [ROOT / "Dockerfile", *MANIFESTS.rglob("*.yaml"), *(ROOT / "pipelines").rglob("*.yaml")]
    wrong = re.compile(r":latest\b|newTag:\s*[\"']?latest")
    assert [p for p in places if wrong.search(p.read_text())] == [] and wrong.search("newTag: latest")


@needs_kustomize
def test_servers_have_probes_and_limits():
    for folder in (f for f in FOLDERS if not f.endswith("jobs")):
        for server in [d for d in built(folder) if d["kind"] in ("Deployment", "StatefulSet")]:
            [container] = server["spec"]["template"]["spec"]["containers"]
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
