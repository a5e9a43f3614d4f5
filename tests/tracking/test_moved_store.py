"""A workspace that is moved takes its MLflow store along: runs, models, versions and what waits to be delivered."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from danceopd.tracking import delivery, mlflow_store
from danceopd.tracking.journal import open_journal, run_folder
from danceopd.tracking.moved_store import settle_addresses
from danceopd.workspace import Product, portable


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv(mlflow_store.ENVIRONMENT, raising=False)
    folder = tmp_path / "before"
    folder.mkdir()
    return folder


def addresses(workspace: Path) -> str:
    with sqlite3.connect(workspace / mlflow_store.DATABASE) as store:
        return "\n".join(store.iterdump())


def log_something(workspace: Path, tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("a")
    uri = mlflow_store.default_tracking_uri(workspace)
    run = mlflow_store.log_step(uri, "one", "run", artifacts=[(tmp_path / "a.txt", "evaluation")])
    client = mlflow_store.open_client(uri)
    client.create_registered_model("m")
    client.create_model_version("m", f"{client.get_run(run).info.artifact_uri}/evaluation", run)
    experiment = client.get_run(run).info.experiment_id
    client.create_logged_model(experiment, "student", run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_moved_store_reads_and_writes_where_it_is(workspace, tmp_path, how):
    run = log_something(workspace, tmp_path)
    place = tmp_path / "elsewhere" / "after"
    place.parent.mkdir()
    if how == "moved":
        workspace.rename(place)
    else:
        shutil.copytree(workspace, place)
    kept = sorted(workspace.rglob("*"))
    uri = mlflow_store.default_tracking_uri(place)
    client = mlflow_store.open_client(uri)
    assert workspace.as_uri() not in addresses(place) and place.as_uri() in addresses(place)
    found = client.download_artifacts(run, "evaluation/a.txt", str(tmp_path))
    assert Path(found).read_text() == "a"
    assert client.get_model_version_download_uri("m", "1").startswith(place.as_uri())
    again = mlflow_store.log_step(uri, "one", "again", artifacts=[(tmp_path / "a.txt", "")])
    assert client.get_run(again).info.artifact_uri.startswith(place.as_uri())
    assert sorted(workspace.rglob("*")) == kept and workspace.exists() == (how == "copied")


def test_addresses_elsewhere_stay_and_nothing_is_done_twice(tmp_path):
    database, artifacts = tmp_path / "mlflow.db", tmp_path / "mlflow-artifacts"
    with sqlite3.connect(database) as store:
        store.execute("CREATE TABLE experiments (artifact_location TEXT)")
        store.execute("CREATE TABLE runs (artifact_uri TEXT)")
        store.executemany("INSERT INTO experiments VALUES (?)", [("file:///old/mlflow-artifacts",), ("s3://b/k",)])
        runs = ["file:///old/mlflow-artifacts/1/artifacts", "file:///old/mlflow-artifacts2/1", "s3://b/k/1", None]
        store.executemany("INSERT INTO runs VALUES (?)", [(run,) for run in runs])
    assert settle_addresses(database, artifacts) == 2
    assert settle_addresses(database, artifacts) == 0
    with sqlite3.connect(database) as store:
        found = [uri for (uri,) in store.execute("SELECT artifact_uri FROM runs")]
    assert found == [f"{artifacts.as_uri()}/1/artifacts", *runs[1:]]
    assert settle_addresses(tmp_path / "none.db", artifacts) == 0 and not (tmp_path / "none.db").exists()
    sqlite3.connect(tmp_path / "empty.db").close()
    assert settle_addresses(tmp_path / "empty.db", artifacts) == 0


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_what_waits_for_the_workspaces_own_store_is_delivered_after_a_move(workspace, tmp_path, older, monkeypatch):
    monkeypatch.setenv("DANCEOPD_RUN", "first")
    uri = mlflow_store.default_tracking_uri(workspace)
    book = open_journal(workspace, "student")
    book.start("student", "one", {}, {})
    delivery.deliver(workspace, uri)
    mark = run_folder(workspace) / delivery.STORE
    assert str(tmp_path) not in mark.read_text()
    if older:
        mark.write_text(uri)
    book.points(1, {"loss": 0.5})
    after = tmp_path / "after"
    workspace.rename(after)
    monkeypatch.setenv("DANCEOPD_RUN", "second")
    assert delivery.deliver(after, mlflow_store.default_tracking_uri(after)).delivered == 1
    client = mlflow_store.open_client(mlflow_store.default_tracking_uri(after))
    [run] = client.search_runs([client.get_experiment_by_name("one").experiment_id])
    assert run.data.metrics == {"loss": 0.5} and not workspace.exists()


def test_a_products_places_go_with_its_workspace(tmp_path):
    workspace = tmp_path / "before"
    folder, dataset = workspace / "data" / "x-1", workspace / "datasets" / "x-2"
    for made in (folder, dataset):
        made.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    assert portable(dataset, workspace) == "../../datasets/x-2"
    assert portable(outside, workspace) == str(outside)
    facts = {"dataset": portable(dataset, workspace), "pipeline": str(outside)}
    older = {"dataset": str(dataset), "pipeline": str(dataset)}
    workspace.rename(tmp_path / "after")
    moved = Product(tmp_path / "after" / "data" / "x-1", "", facts)
    assert moved.dataset.resolve() == tmp_path / "after" / "datasets" / "x-2" and moved.pipeline == outside
    assert Product(moved.folder, "", older).dataset == tmp_path / "after" / "datasets" / "x-2"
    gone = Product(moved.folder, "", {"dataset": str(tmp_path / "none" / "at" / "all")})
    assert gone.dataset == tmp_path / "none" / "at" / "all"
