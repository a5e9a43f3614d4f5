"""What serves the champion: arguments that exist, reached by whom it should be, alerts on figures that there are."""

from __future__ import annotations

import re

import pytest
import typer
from test_manifests import built, needs_kustomize, of_kind, pod_specs

from danceopd.cli.main import app
from danceopd.serving.metrics import Metrics

FOLDERS = ["serving", "overlays/gpu/serving"]


def container(folder: str) -> dict:
    [spec] = pod_specs(of_kind(folder, "Deployment"))
    [found] = spec["containers"]
    return found


@needs_kustomize
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_command_takes_its_arguments_and_follows_the_alias(folder):
    name, *arguments = container(folder)["args"]
    given = typer.main.get_command(app).commands[name].make_context(name, list(arguments)).params
    assert str(given["model"]) == "models:/danceopd-world@champion"
    mounts = [m["mountPath"] for m in container(folder)["volumeMounts"]]
    assert str(given["cache"]) in mounts
    assert given["port"] == container(folder)["ports"][0]["containerPort"]


@needs_kustomize
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_pod_that_goes_is_left_time_for_the_request_in_work(folder):
    [deployment] = of_kind(folder, "Deployment")
    spec, found = deployment["spec"]["template"]["spec"], container(folder)
    pause = int(found["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = int(re.search(r"--grace=(\d+)", " ".join(found["args"]))[1])
    assert pause + grace < spec["terminationGracePeriodSeconds"]
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    [budget] = of_kind(folder, "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    probes = {name: found[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    assert "replicas" not in deployment["spec"], "the autoscaler's number is not undone by an apply"


@needs_kustomize
@pytest.mark.parametrize("folder", FOLDERS)
def test_all_of_it_is_about_the_same_pods(folder):
    [deployment] = of_kind(folder, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    [service], [budget], [policy] = (of_kind(folder, k) for k in ("Service", "PodDisruptionBudget", "NetworkPolicy"))
    [monitor] = of_kind("serving/monitoring", "ServiceMonitor")
    assert service["spec"]["selector"].items() <= labels
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in [p["name"] for p in service["spec"]["ports"]]
    [scaler] = of_kind(folder, "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def figures() -> set[str]:
    """Names of all figures that a server has."""
    metrics = Metrics(4)
    metrics.request("/v1/images/generations", 200, 1.0)
    return set(re.findall(r"^# TYPE (danceopd_\w+)", metrics.text(), re.MULTILINE))


@needs_kustomize
def test_three_alerts_are_about_figures_that_there_are():
    [rule] = of_kind("serving/monitoring", "PrometheusRule")
    alerts = [alert for group in rule["spec"]["groups"] for alert in group["rules"]]
    assert len(alerts) == 3
    for alert in alerts:
        named = set(re.findall(r"danceopd_\w+", alert["expr"]))
        assert named and named <= figures(), alert["alert"]
        assert alert["for"] and alert["labels"]["severity"] and set(alert["annotations"]) == {"summary", "description"}
    [metric] = [m for m in of_kind("overlays/gpu/serving", "HorizontalPodAutoscaler")[0]["spec"]["metrics"]]
    assert metric["pods"]["metric"]["name"] in figures()


@needs_kustomize
def test_the_key_is_a_secret_and_the_registry_a_setting():
    variables = {v["name"]: v for v in container("serving")["env"]}
    assert variables["DANCEOPD_API_KEY"]["valueFrom"]["secretKeyRef"]["optional"] is True
    assert variables["MLFLOW_TRACKING_URI"]["valueFrom"]["configMapKeyRef"]["name"] == "danceopd-tracking"
    assert not [d for d in built("serving") if d["kind"] == "Secret"]
