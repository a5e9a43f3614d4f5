"""Runs in a real MLflow store on SQLite: what is written comes back, and what is secret does not go in."""

from __future__ import annotations

import contextlib
import http.server
import io
import logging
import os
import socket
import threading

import pytest
from PIL import Image

from danceopd.errors import UserError
from danceopd.tracking import mlflow_store


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    environment = pytest.MonkeyPatch()
    environment.delenv(mlflow_store.ENVIRONMENT, raising=False)
    yield mlflow_store.default_tracking_uri(tmp_path_factory.mktemp("store") / "my workspace")
    environment.undo()


@pytest.fixture(scope="module")
def first_words() -> io.StringIO:
    """What is said while the store is made."""
    return io.StringIO()


@pytest.fixture(scope="module")
def client(uri, first_words):
    with contextlib.redirect_stderr(first_words), contextlib.redirect_stdout(first_words):
        return mlflow_store.open_client(uri)


def test_the_default_store_lies_in_the_workspace(tmp_path, monkeypatch):
    monkeypatch.delenv(mlflow_store.ENVIRONMENT, raising=False)
    assert mlflow_store.default_tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv(mlflow_store.ENVIRONMENT, "http://mlflow:5000")
    assert mlflow_store.default_tracking_uri(tmp_path) == "http://mlflow:5000"


def test_artifacts_lie_beside_the_database(tmp_path):
    beside = (tmp_path / "a b" / "mlflow-artifacts").as_uri()
    assert mlflow_store.artifact_location(f"sqlite:///{tmp_path}/a b/mlflow.db") == beside
    assert mlflow_store.artifact_location("http://mlflow:5000") is None


def test_flatten_names_leaves_by_their_path_and_hides_secrets():
    tree = {
        "name": "x",
        "model": {"base": "s3://key:word@host/base?X-Amz-Signature=abc", "out": (1, 2), "max_tokens": 5},
        "store": {"api_key": "k", "access_token": "t", "password": "p"},
        "gates": [{"metric": "psnr"}, {"metric": "ssim"}],
        "none": None,
    }
    assert mlflow_store.flatten(tree) == {
        "name": "x",
        "model.base": "s3://host/base",
        "model.out": "1, 2",
        "model.max_tokens": "5",
        "store.api_key": mlflow_store.HIDDEN,
        "store.access_token": mlflow_store.HIDDEN,
        "store.password": mlflow_store.HIDDEN,
        "gates.0.metric": "psnr",
        "gates.1.metric": "ssim",
        "none": "None",
    }


@pytest.mark.slow
def test_a_run_comes_back_as_it_was_logged(uri, client, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "grid.png")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "a.txt").write_text("a")
    run_id = mlflow_store.log_step(
        uri,
        "one",
        "distill",
        params={"distill": {"lr": 0.01}, **{f"p{i}": i for i in range(150)}},
        metrics={"t2i/hit@1": 0.5},
        series={"loss": [(step, 1 / (step + 1)) for step in range(1200)]},
        images={"preview": [(0, tmp_path / "grid.png"), (9, tmp_path / "grid.png")]},
        artifacts=[(tmp_path / "grid.png", ""), (tmp_path / "folder", "report")],
        tags={"code": "abc", "remote": "https://me:secret@git/x"},
    )
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "distill")
    assert run.data.params["distill.lr"] == "0.01" and len(run.data.params) == 151
    assert run.data.metrics["t2i/hit_1"] == 0.5
    curve = client.get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in sorted(curve, key=lambda m: m.step)][-1] == (1199, 1 / 1200)
    assert len(curve) == 1200
    assert (run.data.tags["code"], run.data.tags["remote"]) == ("abc", "https://git/x")
    names = {item.path for folder in (None, "report/deep", "images") for item in client.list_artifacts(run_id, folder)}
    assert {"grid.png", "report/deep/a.txt"} <= names
    assert len([n for n in names if n.startswith("images/preview+step+9") and n.endswith(".png")]) == 1
    assert run.info.artifact_uri.startswith(mlflow_store.artifact_location(uri))


@pytest.mark.slow
def test_a_run_that_breaks_off_is_marked(uri, client, tmp_path):
    with pytest.raises(OSError):
        mlflow_store.log_step(uri, "one", "broken", artifacts=[(tmp_path / "none.txt", "")])
    found = client.search_runs([client.get_experiment_by_name("one").experiment_id], "attributes.run_name = 'broken'")
    assert [run.info.status for run in found] == ["FAILED"]


@pytest.mark.slow
def test_a_deleted_experiment_is_named(uri, client):
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(UserError, match="experiment 'gone' was deleted"):
        mlflow_store.log_step(uri, "gone", "run")


@pytest.mark.slow
def test_the_current_store_is_put_back(uri, client, monkeypatch):
    mlflow = mlflow_store.import_mlflow()
    monkeypatch.setenv(mlflow_store.ENVIRONMENT, "http://elsewhere:1")
    with mlflow_store.current_store(uri):
        assert mlflow.get_tracking_uri() == uri
    assert os.environ[mlflow_store.ENVIRONMENT] == "http://elsewhere:1" == mlflow.get_tracking_uri()
    monkeypatch.delenv(mlflow_store.ENVIRONMENT)
    with pytest.raises(KeyError), mlflow_store.current_store(uri):
        raise KeyError
    assert not mlflow.is_tracking_uri_set()


@pytest.mark.slow
def test_a_store_that_is_none_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says" * 100)
    with pytest.raises(UserError, match=r"mlflow\.db does not answer: .*check MLFLOW_TRACKING_URI"):
        mlflow_store.open_client(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(UserError, match="nonsense://host/x does not answer"):
        mlflow_store.open_client("nonsense://me:secret@host/x")


class _Answering(http.server.BaseHTTPRequestHandler):
    """Answers with the code its path begins with."""

    def do_GET(self):
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()

    def log_message(self, *_):
        pass


def test_who_answers_and_who_does_not(monkeypatch):
    monkeypatch.setattr(mlflow_store, "_PATIENCE", 0.2)
    server = http.server.HTTPServer(("127.0.0.1", 0), _Answering)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"me:secret@127.0.0.1:{server.server_port}"
    for code, there in {200: True, 401: True, 404: True, 502: False, 503: False}.items():
        assert mlflow_store.answers(f"http://{address}/{code}/") == there
    assert mlflow_store.answers(f"https://{address}"), "not a certificate to trust: MLflow itself is to say so"
    server.shutdown()
    server.server_close()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert not mlflow_store.answers(f"http://127.0.0.1:{mute.getsockname()[1]}")
    assert not mlflow_store.answers("http://127.0.0.1:9")
    assert mlflow_store.answers("sqlite:///x.db") and mlflow_store.answers("postgresql://u:p@nowhere.invalid/x")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 does not answer; check MLFLOW"):
        mlflow_store.open_client("http://me:secret@127.0.0.1:9")


@pytest.mark.slow
def test_making_a_store_says_nothing(client, first_words):
    assert first_words.getvalue() == ""
    assert logging.getLogger("alembic").level >= logging.WARNING
