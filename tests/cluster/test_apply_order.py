"""The `kubectl apply` commands of the docs, in their order, on an API server that validates strictly."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from strict_fields import unknown_field
from test_manifests import MANIFESTS, ROOT, built, needs_kustomize, pod_specs

PAGE = (ROOT / "docs" / "operator.md").read_text()
README = (MANIFESTS / "README.md").read_text()
CLUSTER_WIDE = {"Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor"}
ADDED = {"trainer.kubeflow.org": "Trainer", "kueue.x-k8s.io": "Kueue", "monitoring.coreos.com": "Prometheus operator"}
OWN = ("Deployment", "StatefulSet", "Job", "CronJob", "TrainingRuntime")


@dataclass
class StrictServer:
    """Takes objects as a real one does: kinds it knows, namespaces there are, no unknown field, no changed claim.

    Attributes:
        added: what is installed beside Kubernetes itself.
        namespaces: that there are.
        objects: by kind, namespace and name.
    """

    added: set[str] = field(default_factory=set)
    namespaces: set[str] = field(default_factory=lambda: {"default", "kube-system"})
    objects: dict[tuple[str, str, str], dict] = field(default_factory=dict)

    def apply(self, documents: list[dict], namespace: str = "default") -> None:
        """Take every object, in kustomize's order; then every pod must find what it names."""
        for document in documents:
            self._take(document, namespace)
        for document in documents:
            if document["kind"] in OWN:
                self._pods_find_all(document, document["metadata"].get("namespace", namespace))

    def _take(self, document: dict, namespace: str) -> None:
        kind, metadata = document["kind"], document["metadata"]
        owner = ADDED.get(document["apiVersion"].split("/")[0])
        assert owner is None or owner in self.added, f"no matches for kind {kind}"
        assert not (found := unknown_field(document)), f"{kind} {metadata['name']}: unknown field {found}"
        where = "" if kind in CLUSTER_WIDE else metadata.get("namespace", namespace)
        assert where == "" or where in self.namespaces, f"{kind} {metadata['name']}: namespace {where} not found"
        if kind == "Namespace":
            self.namespaces.add(metadata["name"])
        key = kind, where, metadata["name"]
        if kind == "PersistentVolumeClaim" and key in self.objects:
            assert self.objects[key]["spec"] == document["spec"], f"claim {metadata['name']}: spec is immutable"
        if kind == "TrainJob":  # Trainer's webhook (2.2, pkg/webhooks/trainjob_webhook.go)
            assert ("TrainingRuntime", where, document["spec"]["runtimeRef"]["name"]) in self.objects
        self.objects[key] = document

    def _pods_find_all(self, document: dict, namespace: str) -> None:
        who = f"{document['kind']} {document['metadata']['name']}"
        for spec in pod_specs(document):
            needed = {("ServiceAccount", namespace, spec["serviceAccountName"])}
            needed.add(("PriorityClass", "", spec["priorityClassName"]))
            needed |= {("PersistentVolumeClaim", namespace, c) for c in _claims(spec)}
            needed |= {(kind, namespace, name) for kind, name in _configured_by(spec)}
            assert needed <= set(self.objects), f"{who} waits for {needed - set(self.objects)}"


def _claims(spec: dict) -> set[str]:
    return {v["persistentVolumeClaim"]["claimName"] for v in spec.get("volumes", []) if "persistentVolumeClaim" in v}


def _configured_by(spec: dict) -> set[tuple[str, str]]:
    """The Secrets and ConfigMaps without which no container of the pod is made."""
    sources = [v.get("valueFrom", {}) for c in spec["containers"] for v in c.get("env", [])]
    found = {("Secret", s["secretKeyRef"]["name"]) for s in sources if _needed(s.get("secretKeyRef"))}
    found |= {("ConfigMap", s["configMapKeyRef"]["name"]) for s in sources if _needed(s.get("configMapKeyRef"))}
    found |= {("ConfigMap", v["configMap"]["name"]) for v in spec.get("volumes", []) if _needed(v.get("configMap"))}
    return found


def _needed(reference: dict | None) -> bool:
    return bool(reference) and not reference.get("optional")


def blocks(page: str, title: str) -> str:
    """The shell blocks of one section, one after the other."""
    section = re.split(r"\n##+ ", page.partition(title)[2])[0]
    return "\n".join(re.findall(r"```sh\n(.*?)```", section, re.S)).replace("\\\n", " ")


def run(server: StrictServer, commands: str) -> int:
    """Do what the kubectl and `danceopd job submit` lines say; returns how many there were."""
    done = 0
    for line in commands.splitlines():
        words = shlex.split(line)
        if "apply" in words and words[0] == "kubectl":
            namespace = words[words.index("-n") + 1] if "-n" in words else "default"
            server.apply(_documents(words), namespace)
            done += 1
        elif words[:3] == ["danceopd", "job", "submit"]:
            found = built(words[3].removeprefix("manifests/"))
            server.apply([d for d in found if d["metadata"]["name"] == words[words.index("--only") + 1]])
            done += 1
    return done


def _documents(words: list[str]) -> list[dict]:
    if "-f" in words:
        name = words[words.index("-f") + 1]
        file = MANIFESTS / "base" / "secrets.example.yaml" if name == "my-secrets.yaml" else ROOT / name
        return list(yaml.safe_load_all(Path(file).read_text()))
    found = list(built(words[words.index("-k") + 1].removeprefix("manifests/")))
    if "-l" in words:
        key, _, value = words[words.index("-l") + 1].partition("=")
        found = [d for d in found if d["metadata"].get("labels", {}).get(key) == value]
    assert found, f"{shlex.join(words)} selects nothing"
    return found


SECTIONS = {
    "### On kind, without a GPU": ((), 3),
    "### On GKE with a pool of H100 nodes": (("Trainer",), 7),
    "### On premises": ((), 5),
    "### Kubeflow Pipelines": ((), 7),
}


@needs_kustomize
@pytest.mark.parametrize("title", SECTIONS)
def test_the_order_of_the_docs_works(title):
    added, commands = SECTIONS[title]
    server = StrictServer(set(added), {"default", "kube-system", "kubeflow", "your-profile"})
    assert run(server, blocks(PAGE, title)) == commands


@needs_kustomize
def test_the_readmes_order_works():
    assert run(StrictServer(), blocks(README, "# Manifests")) == 4


@needs_kustomize
@pytest.mark.parametrize("namespace", ["kubeflow", "your-profile", "danceopd"])
@pytest.mark.parametrize("added", [(), ("Trainer", "Kueue")])
def test_jobs_of_every_kind_find_what_they_need_in_every_namespace(namespace, added):
    server = StrictServer(set(added), {"default", "kubeflow", "your-profile"})
    run(server, "kubectl apply -f manifests/base/namespace.yaml\nkubectl apply -f my-secrets.yaml")
    run(server, "kubectl apply -k manifests/overlays/gpu")
    folder = {"kubeflow": "kubeflow/standalone", "your-profile": "kubeflow/profile"}.get(namespace)
    if folder:
        run(server, f"kubectl apply -k manifests/{folder}")
    run(server, f"kubectl -n {namespace} apply -k manifests/loaders")
    for kind, folder in {"Trainer": "trainer", "Kueue": "queues/local"}.items():
        if kind in added:
            run(server, f"kubectl -n {namespace} apply -k manifests/{folder}")
    server.apply([d | {"metadata": {**d["metadata"], "namespace": namespace}} for d in built("jobs/distill")])
    if "Trainer" in added:
        server.apply(
            [d | {"metadata": {**d["metadata"], "namespace": namespace}} for d in built("jobs/distill-trainjob")]
        )


@needs_kustomize
@pytest.mark.parametrize(
    ("commands", "said"),
    [
        ("kubectl apply -f my-secrets.yaml", "namespace danceopd not found"),
        ("kubectl apply -k manifests/overlays/gke", "Deployment danceopd-mlflow waits for"),
        ("kubectl apply -k manifests/overlays/gpu-multinode", "no matches for kind ClusterQueue"),
        (
            "kubectl apply -k manifests/overlays/local\nkubectl apply -k manifests/base",
            "claim danceopd-workspace: spec is immutable",
        ),
    ],
)
def test_the_strict_server_refuses(commands, said):
    with pytest.raises(AssertionError, match=said):
        run(StrictServer(), commands)
