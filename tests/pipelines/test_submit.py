"""Runs, uploads and schedules, by kfp's own client against a server that behaves like the API."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import yaml
from kfp_server import DROP, PAGE, KfpServer, good, invoke, refused, serve

from danceopd.config.load import load_recipe
from danceopd.errors import UserError
from pipelines import compile, submit
from pipelines.placement import load_placement
from pipelines.schedules import check_cron

pytestmark = pytest.mark.usefixtures("no_settings")
RUN, UPLOAD = ("run", "--host"), ("upload", "--host")
SECRET = "t0ken-of-mine"


# ------------------------------------------------------------------------------------------------------------------ run


def test_a_run_is_made_with_the_recipe_and_the_parameters_given(kfp, package):
    out = good(
        *RUN,
        kfp.address,
        "--package",
        package,
        "--set",
        "seed=5",
        "--name",
        "first",
        "--experiment",
        "mine",
        "--tracking-uri",
        "http://mlflow:5000",
        "--param",
        "workspace=/elsewhere",
    )
    [run], [experiment] = kfp.kept["runs"], kfp.kept["experiments"]
    assert (run["display_name"], run["experiment_id"]) == ("first", experiment["experiment_id"])
    assert experiment["display_name"] == "mine"
    arguments = run["runtime_config"]["parameters"]
    assert json.loads(arguments["recipe"])["seed"] == 5
    assert arguments["tracking_uri"] == "http://mlflow:5000" and arguments["workspace"] == "/elsewhere"
    assert "data_revision" not in arguments, "the cluster sees its data, this machine may not"
    spec = run["pipeline_spec"]
    assert spec["pipeline_spec"]["pipelineInfo"]["name"] == "danceopd" and "kubernetes" in json.dumps(spec)
    assert out == f"run first: started, {kfp.address}/#/runs/details/runs-1\n"
    good(*RUN, kfp.address, "--package", package, "--experiment", "mine")
    assert len(kfp.kept["experiments"]) == 1 and len(kfp.kept["runs"]) == 2


def test_the_pipeline_is_compiled_with_the_image_given(kfp, package, monkeypatch):
    images = []

    def compiled(out, options):  # a real one takes seconds
        images.append((options.image, options.placement))
        return Path(shutil.copy(package, out))

    monkeypatch.setattr(compile, "compile_pipeline", compiled)
    good(*RUN, kfp.address, "--image", "example.com/d:1", "--placement", "gpu")
    assert images == [("example.com/d:1", load_placement("gpu"))] and len(kfp.kept["runs"]) == 1


def test_an_uploaded_pipeline_runs_by_name(kfp, package):
    good(*UPLOAD, kfp.address, "--package", package)
    good(*RUN, kfp.address, "--pipeline", "danceopd")
    assert kfp.kept["runs"][0]["pipeline_version_reference"] == {
        "pipeline_id": "pipelines-1",
        "pipeline_version_id": "versions-1",
    }
    assert "'nope' is not known; choose one of: danceopd" in refused(*RUN, kfp.address, "--pipeline", "nope")


@pytest.mark.parametrize(
    ("states", "code", "last"),
    [
        ([("RUNNING", {"finetune": "RUNNING"}), ("SUCCEEDED", {"finetune": "SUCCEEDED"})], 0, "run succeeded"),
        ([("FAILED", {"check": "SUCCEEDED", "finetune": "FAILED: out of memory"})], 1, "run failed"),
        ([("CANCELED", {})], 1, "run canceled"),
    ],
)
def test_a_followed_run_shows_its_steps_and_ends_as_it_ended(kfp, package, states, code, last):
    kfp.progress = [("PENDING", {"root": "RUNNING", "finetune-driver": "RUNNING"}), *states]
    result = invoke(*RUN, kfp.address, "--package", package, "--follow")
    assert result.exit_code == code and last in result.stdout.splitlines()
    assert "driver" not in result.stdout and "root:" not in result.stdout
    steps = [line for line in result.stdout.splitlines() if line.startswith("finetune:")]
    assert steps == [f"finetune: {tasks['finetune'].split(':')[0].lower()}" for _, tasks in states if tasks]
    assert ("finetune: out of memory" in result.stderr) == (last == "run failed")


def test_following_outlasts_a_server_that_restarts_and_not_one_that_refuses(kfp, package):
    server = submit.open_server(kfp.address)
    source, _ = submit.source_of(server, package, None)
    run = submit.start_run(server, source, {}, submit.open_experiment(server, "e"), "r")
    kfp.fail("GET", "runs", (503, "away"), (502, "away"), DROP, DROP, DROP, DROP, DROP)
    assert submit.follow(server, run, print, 10, 0.01).state == "SUCCEEDED"
    kfp.fail("GET", "runs", *[(503, "away")] * 1000)
    lost = submit.follow(server, run, print, 0.05, 0.01)
    assert lost.state == submit.LOST and "the run goes on" in lost.reasons[0]
    kfp.faults.clear()
    kfp.fail("GET", "runs", (401, "token expired"))
    with pytest.raises(UserError, match=r"token expired.*the run goes on"):
        submit.follow(server, run, print, 10, 0.01)


# --------------------------------------------------------------------------------------------------------------- upload


def test_two_uploads_are_one_pipeline_of_two_versions(kfp, package):
    assert "/version/versions-1" in good(*UPLOAD, kfp.address, "--package", package)
    assert "/version/versions-2" in good(*UPLOAD, kfp.address, "--package", package)
    assert len(kfp.kept["pipelines"]) == 1
    assert {v["pipeline_id"] for v in kfp.kept["versions"]} == {"pipelines-1"}
    assert "could not upload" in refused(*UPLOAD, kfp.address, "--package", package, "--version", "danceopd")
    assert len(kfp.kept["versions"]) == 2


def test_what_is_no_pipeline_is_not_sent(kfp, tmp_path):
    (tmp_path / "p.yaml").write_text("a: 1\n")
    for command in (RUN, UPLOAD):
        assert "not a compiled pipeline" in refused(*command, kfp.address, "--package", str(tmp_path / "p.yaml"))
    assert not kfp.kept["runs"] and not kfp.kept["pipelines"]


# ------------------------------------------------------------------------------------------------------------- schedule


def test_a_schedule_is_made_listed_paused_resumed_and_deleted(kfp, package):
    there = ("--host", kfp.address)
    create = ("schedule", "create", *there, "--package", package, "--cron", "0 3 * * 1", "--name", "weekly")
    good(*create, "--param", "workspace=/elsewhere")
    [made] = kfp.kept["recurringruns"]
    assert made["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1"
    assert (made["mode"], made["max_concurrency"], made["no_catchup"]) == ("ENABLE", 1, True)
    assert made["runtime_config"]["parameters"]["workspace"] == "/elsewhere"
    assert load_recipe("world").model_dump_json() == made["runtime_config"]["parameters"]["recipe"]
    assert "'weekly' is there already" in refused(*create)
    assert good("schedule", "list", *there).splitlines()[1].split()[:2] == ["weekly", "on"]
    good("schedule", "pause", "weekly", *there)
    assert good("schedule", "list", *there).splitlines()[1].split()[:2] == ["weekly", "paused"]
    assert made["mode"] == "DISABLE"
    good("schedule", "resume", "recurringruns-1", *there)
    assert made["mode"] == "ENABLE"
    assert "choose one of: weekly" in refused("schedule", "pause", "daily", *there)
    good("schedule", "delete", "weekly", *there)
    assert kfp.kept["recurringruns"] == []


def test_all_pages_of_schedules_are_read_and_a_name_of_two_is_refused(kfp):
    for number in range(submit.PAGE + 1):
        name = "same" if number in (0, submit.PAGE) else f"s{number}"
        kfp.make("recurringruns", {"display_name": name, "status": "ENABLED"})
    assert "2 schedules are called 'same'" in refused("schedule", "pause", "same", "--host", kfp.address)


@pytest.mark.parametrize("cron", ["daily", "* * * *", "1 2 3 4 5 6 7"])
def test_a_cron_of_another_length_is_refused(cron):
    with pytest.raises(UserError, match="write minute, hour"):
        check_cron(cron)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_token_and_a_cookie_are_sent_and_never_shown(kfp, monkeypatch):
    monkeypatch.setenv(submit.TOKEN_ENV, SECRET)
    monkeypatch.setenv(submit.COOKIE_ENV, f"session={SECRET}")
    kfp.fail("GET", "recurringruns", (403, f"Bearer {SECRET} may not list"))
    line = refused("schedule", "list", "--host", kfp.address)
    assert kfp.headers["authorization"] == f"Bearer {SECRET}" and kfp.headers["cookie"] == f"session={SECRET}"
    assert SECRET not in line and "(403: Bearer (hidden) may not list)" in line


def test_a_pod_sends_its_own_token(kfp, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("from-the-volume")
    monkeypatch.setenv(submit.KF_PIPELINES_SA_TOKEN_ENV, str(tmp_path / "token"))
    good("schedule", "list", "--host", kfp.address)
    assert kfp.headers["authorization"] == "Bearer from-the-volume"


@pytest.mark.parametrize(
    ("fault", "said", "code"),
    [
        ((401, "who are you"), "refuses to connect (401: who are you)", 2),
        ((403, "RBAC: access denied"), "Put a token into KFP_TOKEN", 2),
        ((404, "Not Found"), "there is no Kubeflow Pipelines 2 API", 2),
        ((503, "no healthy upstream"), "the server is not well (503", 75),
        (PAGE, "is it behind a login?", 2),
    ],
)
def test_a_server_that_does_not_let_us_in(kfp, fault, said, code):
    kfp.fail("GET", "healthz", fault)
    assert said in refused("schedule", "list", "--host", kfp.address, code=code)


def test_a_server_that_is_not_there(caplog):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        line = refused("schedule", "list", "--host", f"http://127.0.0.1:{taken.getsockname()[1]}", code=75)
    assert "not reachable (" in line and "Connection refused" in line
    assert not caplog.records


def test_a_dropped_answer_is_told_from_a_refusal(kfp, package):
    kfp.fail("POST", "runs", DROP)
    assert "it may have been done all the same" in refused(*RUN, kfp.address, "--package", package)
    assert len(kfp.kept["runs"]) == 1, "it is not tried twice"


@pytest.mark.parametrize("host", ["kfp.example.com", "https://me:pass@kfp.example.com", ""])
def test_an_address_that_is_none(host):
    line = refused("schedule", "list", "--host", host)
    assert line.startswith("danceopd: --host") and "pass@" not in line


def test_namespaces_fit_the_server():
    with serve(KfpServer(("alice",))) as address:
        assert "name your profile's namespace" in refused("schedule", "list", "--host", address)
        assert "not authorized in namespace bob" in refused("schedule", "list", "--host", address, "-n", "bob")
        good("schedule", "list", "--host", address, "-n", "alice")
    with serve(KfpServer()) as address:
        assert "serves one user" in refused("schedule", "list", "--host", address, "-n", "alice")


def test_namespaces_reach_every_call(package):
    kfp = KfpServer(("alice",))
    with serve(kfp) as address:
        where = ("--host", address, "-n", "alice", "--package", package)
        good("run", *where, "--follow", "--experiment", "e")
        good("upload", *where)
        good("schedule", "create", *where, "--cron", "0 0 * * *", "--experiment", "e")
    assert kfp.kept["experiments"][0]["namespace"] == "alice"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--param", "speed=1"], "--param: 'speed' is not known; choose one of: "),
        (["--param", "speed"], "write it as name=value"),
        (["--image", "x:1"], "--package and --image: give one"),
        (["--placement", "gpu"], "--package and --placement: give one"),
        (["--fresh"], "only for a run here"),
        (["--if-changed"], "name the registry"),
        (["--data", "no.dvc"], "--data: says what --if-changed compares"),
    ],
)
def test_bad_options_of_a_run_there(kfp, package, arguments, said):
    assert said in refused(*RUN, kfp.address, "--package", package, *arguments)
    assert not kfp.kept["runs"]


@pytest.mark.parametrize("arguments", [["--follow"], ["--param", "a=b"], ["--image", "x:1"], ["--placement", "gpu"]])
def test_options_of_a_server_mean_nothing_here(arguments):
    assert f"{arguments[0]}: only with --host" in refused("run", *arguments)


def test_parameters_are_filled_in_by_type():
    parameters = {
        "recipe": {"parameterType": "STRING"},
        "gpus": {"parameterType": "NUMBER_INTEGER", "defaultValue": 1},
        "note": {"parameterType": "STRING", "isOptional": True},
    }
    ours = {"recipe": "{}", "unasked": "x"}
    assert submit.fill_in(parameters, ours, ["gpus=4", "note=5"]) == {"recipe": "{}", "gpus": 4, "note": "5"}
    with pytest.raises(UserError, match="also needs recipe"):
        submit.fill_in(parameters, {}, [])


def test_parameters_of_an_uploaded_pipeline_are_those_of_its_file(package):
    spec, platform = yaml.safe_load_all(Path(package).read_text())
    assert submit.declared({"pipeline_spec": spec, "platform_spec": platform}) == submit.declared(spec)
    assert "recipe" in submit.declared(spec)


def test_pods_between_the_steps_are_not_shown_though_they_were_retried(kfp, package):
    kfp.progress = [
        (
            "SUCCEEDED",
            {name: "SUCCEEDED" for name in ("root", "executor(0)", "driver(1)", "finetune-driver(0)", "finetune")},
        )
    ]
    assert [
        line for line in good(*RUN, kfp.address, "--package", package, "--follow").splitlines() if ": succ" in line
    ] == ["finetune: succeeded"]
