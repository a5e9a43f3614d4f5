"""The kustomize base: complete, and in step with what the pipeline mounts."""

from __future__ import annotations

from pathlib import Path

import yaml

from pipelines.options import PipelineOptions

BASE = Path(__file__).resolve().parents[2] / "manifests" / "base"
OBJECTS = {p.name: yaml.safe_load(p.read_text()) for p in BASE.glob("*.yaml")}


def of_kind(kind: str) -> dict:
    [found] = [o for o in OBJECTS.values() if o["kind"] == kind]
    return found


def test_kustomization_lists_every_file():
    assert set(of_kind("Kustomization")["resources"]) == set(OBJECTS) - {"kustomization.yaml"}


def test_the_namespace_admits_only_restricted_pods():
    namespace = of_kind("Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert namespace["name"] == of_kind("Kustomization")["namespace"]


def test_the_claim_is_the_one_the_pipeline_mounts_and_many_can_share_it():
    claim = of_kind("PersistentVolumeClaim")
    assert claim["metadata"]["name"] == PipelineOptions().workspace_claim
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_readme_names_every_file():
    text = (BASE.parent / "README.md").read_text()
    assert all(f"`{name}`" in text for name in OBJECTS if name != "kustomization.yaml")
