"""`danceopd job`: from a kubeconfig or a pod, the exit codes a step relies on, and what a signal does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubernetes import config
from typer.testing import CliRunner

from danceopd.errors import UserError
from danceopd.tracking.journal import RUN
from pipelines.cluster import cli, connect
from pipelines.cluster.objects import JobPlan, manifests, to_yaml

ROOT = Path(__file__).resolve().parents[2]
NAME = "danceopd-distill"


@pytest.fixture
def kubeconfig(api, tmp_path, monkeypatch) -> Path:
    path = tmp_path / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "users": [{"name": "me", "user": {}}],
                "clusters": [{"name": "here", "cluster": {"server": api.address}}],
                "contexts": [
                    {"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "danceopd"}},
                    {"name": "bare", "context": {"cluster": "here", "user": "me"}},
                ],
            }
        )
    )
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr(config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.delenv(cli.WORKFLOW, raising=False)
    return path


@pytest.fixture
def manifest(tmp_path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(to_yaml(manifests(JobPlan("distill", nodes=2))))
    return str(path)


def invoke(*arguments: str, text: str | None = None):
    return CliRunner().invoke(cli.app, list(arguments), input=text)


# ---------------------------------------------------------------------------------------------------------- connecting


def test_outside_the_kubeconfig_says_where_and_the_option_wins(kubeconfig):
    assert connect.connect().namespace == "danceopd"
    assert connect.connect("other").namespace == "other"
    assert connect.connect(context="bare").namespace == "danceopd"


def test_an_unknown_context_or_no_kubeconfig_is_one_line(kubeconfig, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no cluster: .*nope.* name a kubeconfig by KUBECONFIG"):
        connect.connect(context="nope")
    monkeypatch.setattr(config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    result = invoke("status")
    assert result.exit_code == 2 and result.stderr.startswith("danceopd: no cluster: ")


def test_inside_the_pods_own_account_is_used(api, tmp_path, monkeypatch):
    from kubernetes.config import incluster_config

    for name, text in {"token": "t0ken", "ca.crt": "certificate", "namespace": "team-a"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(connect, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setattr(connect.client, "ApiClient", lambda settings: settings)
    monkeypatch.setattr(incluster_config.InClusterConfigLoader.__init__, "__defaults__", (True, os.environ))
    loader = incluster_config.InClusterConfigLoader(str(tmp_path / "token"), str(tmp_path / "ca.crt"))
    monkeypatch.setattr(connect.config, "load_incluster_config", loader.load_and_set)
    cluster = connect.connect()
    assert (cluster.namespace, cluster.api.host) == ("team-a", "https://10.0.0.1:443")


# ------------------------------------------------------------------------------------------------------------ commands


def test_submit_status_logs_and_cancel(api, kubeconfig, manifest):
    assert invoke("submit", manifest).stdout == f"Job {NAME}: submitted\n"
    assert invoke("submit", manifest).stdout == f"Job {NAME}: found, and followed\n"
    api.pod(NAME)
    api.say(f"{NAME}-0", "step 1")
    assert invoke("status", NAME).stdout == f"Job {NAME}: pending (1 of 2 pods)\n"
    assert invoke("status").stdout.splitlines()[-1].split()[:3] == [NAME, "Job", "pending"]
    assert invoke("logs", NAME).stdout == "step 1\n"
    assert invoke("cancel", NAME).stdout == f"Job {NAME}: deleted\n"
    assert api.of("jobs") == api.of("services") == []
    assert invoke("cancel", NAME, "--if-there").stdout == f"{NAME}: not there\n"
    assert invoke("cancel", NAME).exit_code == 2


def test_logs_are_followed_to_the_end(api, kubeconfig, manifest):
    invoke("submit", manifest)
    api.pod(NAME, phase="Succeeded")
    api.say(f"{NAME}-0", "step 1", "step 2")
    api.condition(NAME, "Complete")
    result = invoke("logs", NAME, "--follow")
    assert result.stdout == "step 1\nstep 2\n" and result.stderr == f"Job {NAME}: succeeded\n"


def test_a_rendered_job_can_be_piped_into_submit(api, kubeconfig):
    rendered = invoke("render", "finetune", "local_edit", "--gpus", "1", "--set", "seed=2")
    assert invoke("submit", "-", text=rendered.stdout).stdout == "Job danceopd-finetune-local-edit: submitted\n"
    [container] = api.of("jobs")[0]["spec"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["finetune", "local_edit"] and container["args"][-2:] == ["--set", "seed=2"]


def end(api, code: int = 0, **how):
    def act():
        if code:
            api.ended(NAME, code, **how)
            return api.condition(NAME, "Failed")
        api.pod(NAME, phase="Succeeded")
        return api.condition(NAME, "Complete")

    return act


@pytest.mark.parametrize(
    ("code", "how", "exits"),
    [(0, {}, 0), (1, {}, 1), (137, {"reason": "OOMKilled"}, 1), (2, {"message": "danceopd: recipe: bad"}, 2)],
)
def test_waiting_ends_as_the_job_does(api, kubeconfig, manifest, code, how, exits):
    api.acts = [lambda: api.pod(NAME) and api.job(NAME, ready=1), end(api, code, **how)]
    result = invoke("submit", manifest, "--wait")
    assert result.exit_code == exits
    if exits == 2:
        assert result.stderr.splitlines()[-1] == f"danceopd: Job {NAME}: failed: recipe: bad"


def test_the_log_is_on_standard_output_and_the_status_beside_it(api, kubeconfig, manifest):
    api.say(f"{NAME}-0", "step 1")
    api.acts = [lambda: api.pod(NAME) and api.job(NAME, ready=1), end(api)]
    result = invoke("submit", manifest, "--wait")
    assert result.stdout == "step 1\n" and f"Job {NAME}: succeeded" in result.stderr


def test_an_unreachable_api_is_exit_code_75(api, kubeconfig, manifest, monkeypatch):
    api.fail("create", "jobs", *[(503, "not ready")] * 50)
    monkeypatch.setattr(connect.Cluster.__init__, "__defaults__", (0.2, 0.02))
    result = invoke("submit", manifest)
    assert result.exit_code == 75 and "gave no answer" in result.stderr and "try again" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: Pod\nmetadata: {name: x}", "name one job by --only; it holds: none"),
        (
            "kind: Job\nmetadata: {name: a}\n---\nkind: Job\nmetadata: {name: b}",
            "name one job by --only; it holds: a, b",
        ),
        ("a: [", "not valid YAML"),
        ("kind: Job\nmetadata: {name: a}\napiVersion: batch/v2", "is not a job; give a Job (batch/v1)"),
    ],
)
def test_manifests_that_hold_no_one_job(kubeconfig, tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    result = invoke("submit", str(tmp_path / "m.yaml"))
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_one_of_several_jobs_is_chosen_with_its_service(tmp_path):
    documents = [*manifests(JobPlan("distill", nodes=2)), *manifests(JobPlan("evaluate"))]
    (tmp_path / "m.yaml").write_text(to_yaml(documents))
    job, services = cli.read_manifest(str(tmp_path / "m.yaml"), only=NAME)
    assert job["metadata"]["name"] == NAME and len(services) == 1
    assert cli.read_manifest(str(tmp_path / "m.yaml"), only="danceopd-evaluate")[1] == []


def test_a_folder_without_a_kustomization_or_a_tool_to_build_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"neither a YAML file nor a folder with a kustomization\.yaml"):
        cli.read_manifest(str(tmp_path))
    (tmp_path / "kustomization.yaml").write_text("resources: []")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs kustomize or kubectl on the PATH"):
        cli.read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "job step: 'dance' is not known; choose one of: distill, evaluate, finetune"),
        (["distill", "--kind", "Pod"], "job kind: 'Pod' is not known; choose one of: Job, TrainJob"),
        (["finetune"], "finetune takes the name of one teacher"),
        (["distill", "a"], "finetune takes the name of one teacher, and no other step does"),
        (["evaluate", "--nodes", "2"], "evaluate runs on one node"),
        (["distill", "--nodes", "0"], "job nodes 0: at least 1"),
        (["distill", "--gpus", "-1"], "job gpus -1, retries 3: 0 or more"),
        (["distill", "--workspace", "/tmp/x"], "job workspace /tmp/x: the volume is mounted at /workspace"),
        (["distill", "--name", "No_Good"], "job name 'No_Good': lower case letters"),
        (["distill", "--node-selector", "pool"], "--node-selector 'pool': write it as label=value"),
        (
            ["distill", "--kind", "TrainJob", "--toleration", "x"],
            "a TrainJob's nodes are chosen by its TrainingRuntime",
        ),
    ],
)
def test_bad_plans_are_one_line(arguments, message):
    result = invoke("render", *arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_a_job_that_a_runs_step_renders_belongs_to_the_run(kind, monkeypatch):
    monkeypatch.delenv(RUN, raising=False)
    assert RUN not in invoke("render", "distill", "--kind", kind).stdout
    monkeypatch.setenv(RUN, "run-1")
    assert f"- name: {RUN}\n" in (text := invoke("render", "distill", "--kind", kind).stdout) and "value: run-1" in text


def test_rendering_to_a_file(tmp_path):
    out = tmp_path / "job.yaml"
    assert invoke("render", "distill", "--out", str(out)).stdout == f"{out}\n"
    assert out.read_text() == invoke("render", "distill").stdout


# ------------------------------------------------------------------------------------------------- signals and the run


def step(manifest: str, **variables: str) -> subprocess.Popen:
    """What a pipeline's step runs, as a process of its own."""
    code = "from pipelines.cluster.cli import app; app()"
    command = [sys.executable, "-c", code, "submit", manifest, "--wait"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(check) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline, "did not happen within 60 s"
        time.sleep(0.02)


def stop_while_it_watches(api, process: subprocess.Popen) -> tuple[int, str]:
    until(lambda: ("batch", "jobs", "watch") in api.calls)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def put_run(api, **spec) -> dict:
    return api.put("workflows", {"metadata": {"name": "run-1"}, "spec": spec})


@pytest.mark.slow
def test_a_step_that_is_stopped_leaves_its_job_and_the_next_adopts_it(api, kubeconfig, manifest):
    run = put_run(api)
    code, errors = stop_while_it_watches(api, step(manifest, ARGO_WORKFLOW="run-1"))
    assert code == 75 and "runs on; submit it again to follow it" in errors
    [job] = api.of("jobs")
    assert job["metadata"]["ownerReferences"][0]["uid"] == run["metadata"]["uid"]
    api.acts = [lambda: api.pod(NAME) and api.job(NAME, ready=1), end(api)]
    process = step(manifest, ARGO_WORKFLOW="run-1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "found, and followed" in errors
    assert [j["metadata"]["uid"] for j in api.of("jobs")] == [job["metadata"]["uid"]]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [{"activeDeadlineSeconds": 0}, {"shutdown": "Terminate"}, {"shutdown": "Stop"}])
def test_a_step_whose_run_is_cancelled_deletes_its_job(api, kubeconfig, manifest, spec):
    put_run(api, **spec)
    code, errors = stop_while_it_watches(api, step(manifest, ARGO_WORKFLOW="run-1"))
    assert code == 75 and "deleted, since its run was cancelled" in errors
    assert api.of("jobs") == api.of("services") == []


@pytest.mark.slow
def test_a_step_that_is_cancelled_while_it_submits_leaves_nothing(api, kubeconfig, manifest):
    put_run(api, activeDeadlineSeconds=0)
    api.fail("create", "services", *[(503, "not ready")] * 100)
    process = step(manifest, ARGO_WORKFLOW="run-1")
    until(lambda: ("", "services", "create") in api.calls)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and api.of("jobs") == []


def test_a_run_that_may_not_be_read_is_said_before_anything_is_made(api, kubeconfig, manifest, monkeypatch):
    monkeypatch.setenv(cli.WORKFLOW, "run-1")
    api.forbid("get", "workflows")
    result = invoke("submit", manifest)
    assert result.exit_code == 2 and "Workflow run-1: forbidden" in result.stderr
    assert api.of("jobs") == []


@pytest.mark.slow
def test_a_step_that_is_stopped_before_it_submitted_says_that_nothing_runs(api, kubeconfig, manifest):
    put_run(api)
    api.fail("create", "jobs", *[(503, "not ready")] * 100)
    process = step(manifest, ARGO_WORKFLOW="run-1")
    until(lambda: ("batch", "jobs", "create") in api.calls)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "was not submitted yet; nothing runs" in errors and "runs on" not in errors


@pytest.fixture
def elsewhere(tmp_path, api) -> str:
    """A job for a namespace of its own, as kustomize builds it."""
    api.namespace = "team-a"
    document, *_ = manifests(JobPlan("distill"))
    document["metadata"]["namespace"] = "team-a"
    path = tmp_path / "job.yaml"
    path.write_text(to_yaml([document]))
    return str(path)


def test_a_manifest_goes_to_the_namespace_it_names(api, kubeconfig, elsewhere):
    assert invoke("submit", elsewhere).exit_code == 0
    assert api.of("jobs")[0]["metadata"]["namespace"] == "team-a"
    assert invoke("submit", elsewhere, "--namespace", "team-a").exit_code == 0


def test_an_option_may_not_say_otherwise(api, kubeconfig, elsewhere):
    result = invoke("submit", elsewhere, "--namespace", "danceopd")
    assert result.exit_code == 2 and f"--namespace danceopd: {NAME} is for namespace team-a; leave it" in result.stderr
    assert api.of("jobs") == []


def test_the_command_is_mounted():
    from importlib.metadata import EntryPoint

    assert EntryPoint("job", "pipelines.cluster.cli:app", "danceopd.commands").load() is cli.app
    assert 'job = "pipelines.cluster.cli:app"' in (ROOT / "pyproject.toml").read_text()


def test_another_yaml_file_is_not_rendered_over(tmp_path):
    out = tmp_path / "job.yaml"
    for text in ("name: mine\n", "kind: Job\nmetadata: {name: mine}\n"):
        out.write_text(text)
        done = invoke("render", "distill", "--out", str(out))
        assert (done.exit_code, out.read_text()) == (2, text)
        assert "job.yaml: is there already, and no older output of this command" in done.stderr
    out.unlink()
    for _ in range(2):
        assert invoke("render", "distill", "--out", str(out)).exit_code == 0
    assert invoke("render", "distill", "--out", str(tmp_path / "job.txt")).exit_code == 2
