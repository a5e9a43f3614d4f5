"""The retraining CronJob: one at a time, its own image, a command that exists, the calls its role allows."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
import yaml
from test_manifests import MANIFESTS, built, needs_kustomize, of_kind

from danceopd.errors import ExitCode
from pipelines import submit, submit_cli
from pipelines.cli import app

sys.path.append(str(Path(__file__).parents[1] / "pipelines"))
from kfp_server import KfpServer, serve

FOLDER = "schedules"


def cron_job() -> dict:
    [found] = of_kind(FOLDER, "CronJob")
    return found["spec"]


def pod() -> dict:
    return cron_job()["jobTemplate"]["spec"]["template"]["spec"]


@needs_kustomize
def test_one_at_a_time_and_nothing_is_started_twice():
    spec = cron_job()
    assert spec["concurrencyPolicy"] == "Forbid" and len(spec["schedule"].split()) == 5
    rules = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    codes = {r["action"]: r["onExitCodes"]["values"] for r in rules if "onExitCodes" in r}
    assert codes == {"Ignore": [ExitCode.INTERRUPTED], "FailJob": [ExitCode.FAILED, ExitCode.BAD_INPUT]}


@needs_kustomize
def test_the_steps_get_the_image_of_the_revision_that_asks_for_them():
    [container] = pod()["containers"]
    [variable] = [v for v in container["env"] if v["name"] == "DANCEOPD_IMAGE"]
    reference = variable["valueFrom"]["configMapKeyRef"]
    [steps] = [d["data"] for d in of_kind(FOLDER, "ConfigMap") if d["metadata"]["name"] == reference["name"]]
    assert steps[reference["key"]] == "registry.example.com/danceopd:0.1.0"
    assert container["image"] == "registry.example.com/danceopd-client:0.1.0", "no torch to compare a few hashes"
    assert container["args"][-2:] == ["--image", "$(DANCEOPD_IMAGE)"]


@needs_kustomize
def test_the_command_takes_its_arguments():
    [container] = pod()["containers"]
    group, name, *arguments = container["args"]
    context = typer.main.get_command(app).commands[name].make_context(name, arguments)
    assert group == "pipeline" and context.params["if_changed"] and context.params["follow"]
    paths = [m["mountPath"] for m in container["volumeMounts"]]
    assert {str(Path(p).parent) for p in (context.params["recipe"], context.params["data"])} <= set(paths)


@needs_kustomize
def test_the_pod_has_a_token_for_the_pipelines_and_no_other():
    [volume] = [v["projected"]["sources"] for v in pod()["volumes"] if "projected" in v]
    assert [source["serviceAccountToken"]["audience"] for source in volume] == ["pipelines.kubeflow.org"]
    token = Path(submit.KF_PIPELINES_SA_TOKEN_PATH)
    assert str(token.parent) in [m["mountPath"] for m in pod()["containers"][0]["volumeMounts"]]
    assert volume[0]["serviceAccountToken"]["path"] == token.name


@needs_kustomize
def test_what_the_pod_names_is_there():
    made = {(d["kind"], d["metadata"]["name"]) for folder in ("base", FOLDER) for d in built(folder)}
    assert ("ServiceAccount", pod()["serviceAccountName"]) in made
    assert ("PriorityClass", pod()["priorityClassName"]) in made
    assert {("ConfigMap", v["configMap"]["name"]) for v in pod()["volumes"] if "configMap" in v} <= made
    [policy] = of_kind(FOLDER, "NetworkPolicy")
    labels = cron_job()["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_data_is_the_repositorys():
    assert (MANIFESTS / FOLDER / "data-version.yaml").read_text() == (MANIFESTS.parent / "data.dvc").read_text(), (
        "data.dvc changed: cp data.dvc manifests/schedules/data-version.yaml"
    )


def test_the_role_allows_exactly_what_the_command_calls(monkeypatch, tmp_path):
    monkeypatch.setattr(submit.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "PAUSE", 0.01)
    spec = {"root": {"inputDefinitions": {"parameters": {"recipe": {"parameterType": "STRING"}}}}}
    package = tmp_path / "p.yaml"
    package.write_text(yaml.safe_dump(spec | {"pipelineInfo": {"name": "p"}}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    kfp = KfpServer(("danceopd",))
    with serve(kfp) as address:
        told = submit_cli.Submission(namespace="danceopd", package=package, follow=True)
        recipe = submit_cli.load_recipe("world")
        assert submit_cli.run_on_server(address, recipe, told, None, None, if_changed=True) == 0
    role = next(d for d in yaml.safe_load_all((MANIFESTS / FOLDER / "access.yaml").read_text()) if d["kind"] == "Role")
    assert {g for rule in role["rules"] for g in rule["apiGroups"]} == {"pipelines.kubeflow.org"}
    assert set(kfp.calls) == {(v, r) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
