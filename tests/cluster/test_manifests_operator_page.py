"""The operator's page says what the program says: its messages, its folders, its figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel

from danceopd.backbones.sd3 import SD3
from danceopd.preflight.memory import trained_parameters

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operator.md").read_text()
FAILURES = PAGE.split("## When something fails")[1].split("How a job ends")[0]


def test_every_message_is_one_that_the_code_prints():
    code = "\n".join(p.read_text() for room in ("danceopd", "pipelines") for p in (ROOT / room).rglob("*.py"))
    firsts = [row.split(" | ")[0] for row in FAILURES.splitlines() if row.startswith("| `")]
    said = [message for first in firsts for message in re.findall(r"`([^`]+)`", first)]
    assert len(said) > 20 and [message for message in said if message not in code] == []


def test_every_folder_and_file_it_names_is_there():
    page = PAGE.replace("registry.example.com/danceopd", "").replace("/opt/danceopd/", "")  # a registry, and an image
    named = set(re.findall(r"(?:manifests|danceopd|benchmarks)/[\w./-]+\w", page))
    assert len(named) > 8 and [name for name in named if not (ROOT / name).exists()] == []


def test_a_row_of_the_sizes_is_what_the_preflight_counts():
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    every = trained_parameters(network, SimpleNamespace(trainable="full"), "")
    spec = SimpleNamespace(trainable="lora", lora=SimpleNamespace(rank=128, targets=None))
    adapters = trained_parameters(network, spec, SD3.lora_targets)
    row = next(line for line in PAGE.splitlines() if line.startswith("| Stable Diffusion 3.5 medium"))
    weights, base, lora, full, sharded, small = [cell.strip() for cell in row.split("|")[2:8]]
    gib = 2**30
    assert (weights, base) == (f"{every / 1e9:.2f} G", f"{2 * every / gib:.1f}")
    assert lora == f"{16 * adapters / gib:.1f} ({adapters / 1e6:.0f} M)"
    assert [float(full), float(sharded), float(small)] == pytest.approx(
        [16 * every / gib, 2 * every / gib, 10 * every / gib], abs=0.05
    )


def test_the_cores_it_asks_for_hold_mlflow_and_one_local_job():
    folder = ROOT / "manifests" / "overlays" / "local" / "jobs"
    jobs = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*/job.yaml"))]
    asked = {cores(job["spec"]["template"]["spec"]) for job in jobs}
    base = yaml.safe_load_all((ROOT / "manifests" / "base" / "mlflow.yaml").read_text())
    mlflow = sum(cores(found["spec"]["template"]["spec"]) for found in base if found["kind"] == "Deployment")
    cluster = 1.0  # what a single node's own pods ask for, as kind and minikube ship them
    assert asked and mlflow > 0 and 2 < max(asked) + mlflow + cluster <= 4
    assert "A node with four cores" in PAGE and "two cores do not" in PAGE


def cores(pod: dict) -> float:
    """CPU that a pod's containers request."""
    asked = [str(container["resources"]["requests"]["cpu"]) for container in pod["containers"]]
    return sum(float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1) for text in asked)


def test_the_controllers_patches_are_json_that_says_what_the_page_says():
    patches = [json.loads(text) for text in re.findall(r"COMPILED_PIPELINE_SPEC_PATCH=(\{.*\})", PAGE)]
    assert len(patches) == 2
    # Argo merges `templateDefaults` into every template, and `podSpecPatch` (itself JSON) into every pod.
    assert all(patch["templateDefaults"] == {"retryStrategy": {"retryPolicy": "Always"}} for patch in patches)
    assert json.loads(patches[1]["podSpecPatch"]) == {"securityContext": {"fsGroup": 1000}}  # a pod's field in core/v1


def test_the_token_that_lasts_is_the_schedules_own_account():
    page = (ROOT / "docs" / "submitting.md").read_text()
    [account, audience] = re.findall(r"create token (\S+) --audience (\S+) --duration", page)[0]
    objects = list(yaml.safe_load_all((ROOT / "manifests" / "schedules" / "access.yaml").read_text()))
    accounts = [found["metadata"]["name"] for found in objects if found["kind"] == "ServiceAccount"]
    retrain = (ROOT / "manifests" / "schedules" / "retrain.yaml").read_text()
    assert (
        account in accounts and f"audience: {audience}" in retrain
    )  # the CronJob's own token is for the same audience


def test_the_page_says_what_kubeflows_own_plugin_does():
    said = PAGE.split("**MLflow.**")[1]
    assert "MLflow plugin (2.17) makes a parent run of its own beside ours; leave it off" in " ".join(said.split())
