"""Journals in a real MLflow store on SQLite: all of it, once, whatever broke on the way there."""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path
from typing import Annotated

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from danceopd.cli.main import app
from danceopd.cli.tracking import TELLING, add_tracking
from danceopd.errors import UserError
from danceopd.tracking import delivery, journal, mlflow_store, recording
from danceopd.tracking.delivery import Courier, deliver, deliver_named, pending
from danceopd.tracking.journal import DatasetUse, Journal, begin_run, end_run, open_journal

NOBODY = "http://me:secret@127.0.0.1:9"  # the discard port, where nothing listens
DATA = DatasetUse("world", "d" * 64, {"dvc": "abc", "git": "c0de"}, "training", {"t2i": {"train": 3}})
pytestmark = pytest.mark.slow  # the first of these tests makes the store


class Store:
    """A store, and what is found in it."""

    def __init__(self, folder: Path):
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = mlflow_store.open_client(self.uri)

    def runs(self, experiment: str) -> dict:
        found = self.client.get_experiment_by_name(experiment)
        runs = [] if found is None else self.client.search_runs([found.experiment_id])
        assert len({run.info.run_name for run in runs}) == len(runs), "a run is there twice"
        return {run.info.run_name: run for run in runs}

    def images(self, run) -> list[str]:
        return [i.path for i in self.client.list_artifacts(run.info.run_id, "images") if i.path.endswith(".png")]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def place(monkeypatch):
    for name in (journal.RUN, "RANK", mlflow_store.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def experiment(request) -> str:
    return re.sub(r"\W", "-", request.node.name)


def tell(workspace: Path, experiment: str, name: str = "distill", end: str | None = "FINISHED") -> Journal:
    """A step's whole story."""
    Image.new("RGB", (8, 8), "red").save(workspace / "grid.png")
    (workspace / "report.html").write_text("<p>")
    book = open_journal(workspace, f"students-{name}")
    book.start(name, experiment, {"distill": {"lr": 0.01}, "store": {"api_key": "k"}}, {"remote": "https://a:b@c/x"})
    book.dataset(DATA)
    for step in range(1, 4):
        book.points(step, {"loss/t2i": 1 / step, "forwards@1": 5})
        book.image("samples", step, workspace / "grid.png")
    book.model("student", f"weights of {name}", 3, {"folder": "f"})
    book.points(3, {"t2i/psnr": 30.0}, model=f"weights of {name}")
    book.file(workspace / "report.html", "evaluation")
    if end:
        book.end(end, "" if end == "FINISHED" else "https://a:b@c/x broke")
    return book


def check(store: Store, run, points: int = 3) -> None:
    """All of a story is there, once."""
    client, run_id = store.client, run.info.run_id
    assert run.data.params == {"distill.lr": "0.01", "store.api_key": mlflow_store.HIDDEN}
    assert run.data.tags["remote"] == "https://c/x"
    for name in ("loss/t2i", "forwards_1"):
        assert sorted(m.step for m in client.get_metric_history(run_id, name)) == list(range(1, points + 1))
    assert len(client.get_metric_history(run_id, "t2i/psnr")) == 1
    assert len(store.images(run)) == points
    assert [f.path for f in client.list_artifacts(run_id, "evaluation")] == ["evaluation/report.html"]
    [data] = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest, data.dataset.source_type) == ("world", "d" * 36, "dvc")
    assert '"dvc": "abc"' in data.dataset.source and data.tags[0].value == "training"
    [output] = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, str(model.status), output.step) == ("student", "READY", 3)
    assert [(m.key, m.value, m.dataset_name) for m in model.metrics] == [("t2i/psnr", 30.0, "world")]


def test_a_single_commands_journal_becomes_a_run_without_parent(store, experiment, tmp_path):
    book = tell(tmp_path, experiment)
    assert deliver(tmp_path, store.uri) == delivery.Outcome(1, 0)
    [run] = store.runs(experiment).values()
    assert run.info.status == "FINISHED" and delivery.PARENT_TAG not in run.data.tags
    check(store, run)
    assert not [p for p in (book.folder / journal.FILES).rglob("*") if p.is_file()], "the store has the files"
    assert pending(tmp_path) == [] and deliver(tmp_path, store.uri) == delivery.Outcome(0, 0)


def test_steps_of_a_pipeline_run_are_children_of_one_parent_that_ends_with_it(store, experiment, tmp_path, monkeypatch):
    monkeypatch.setenv(journal.RUN, "0123456789ab")
    begin_run(tmp_path, "world", experiment, {"seed": 1, "token": "t"})
    tell(tmp_path, experiment, "teacher a")
    deliver(tmp_path, store.uri)
    assert store.runs(experiment)["world 01234567"].info.status == "RUNNING"
    tell(tmp_path, experiment, "teacher b", "FAILED")
    end_run(tmp_path, "FAILED", {"t2i/psnr": 30.0})
    deliver(tmp_path, store.uri)
    runs = store.runs(experiment)
    parent = runs.pop("world 01234567")
    assert (parent.info.status, parent.data.metrics) == ("FAILED", {"t2i/psnr": 30.0})
    assert parent.data.params == {"seed": "1", "token": mlflow_store.HIDDEN}
    assert {run.data.tags[delivery.PARENT_TAG] for run in runs.values()} == {parent.info.run_id}
    assert runs["teacher b"].info.status == "FAILED" and runs["teacher b"].data.tags["error"] == "https://c/x broke"
    assert delivery.parent_run(store.client, store.uri, tmp_path) == parent.info.run_id


@pytest.mark.parametrize(("status", "entered"), [("FINISHED", []), ("FAILED", ["world nothing0"])])
def test_a_run_that_made_nothing_is_entered_only_if_it_failed(
    store, experiment, tmp_path, monkeypatch, status, entered
):
    experiment = f"{experiment}-made"
    monkeypatch.setenv(journal.RUN, "nothing0")
    begin_run(tmp_path, "world", experiment, {"seed": 1})
    end_run(tmp_path, status)
    assert deliver(tmp_path, store.uri) == delivery.Outcome(0, 0)
    assert [(name, run.info.status) for name, run in store.runs(experiment).items()] == [(n, status) for n in entered]


def test_steps_that_come_at_once_make_one_parent(store, experiment, tmp_path, monkeypatch):
    monkeypatch.setenv(journal.RUN, "together")
    begin_run(tmp_path, "world", experiment, {"seed": 1})
    store.client.create_experiment(experiment)
    found, gate = [], threading.Barrier(4)

    def come() -> None:
        gate.wait()
        found.append(delivery.parent_run(store.client, store.uri, tmp_path))

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [store.runs(experiment)["world together"].info.run_id] * 4


def test_what_a_broken_delivery_left_is_found_and_not_sent_again(store, experiment, tmp_path, monkeypatch, caplog):
    book = tell(tmp_path, experiment)
    send, calls = type(store.client).log_image, []

    def break_off(*arguments, **options):
        calls.append(send(*arguments, **options))
        if len(calls) == 2:
            raise ConnectionError("https://a:b@c/x went away")

    with monkeypatch.context() as patch:
        patch.setattr(type(store.client), "log_image", break_off)
        outcome = deliver(tmp_path, store.uri)
    assert (outcome.delivered, outcome.waiting, outcome.reason) == (0, 1, "https://c/x went away")
    [line] = [r.getMessage() for r in caplog.records if r.name == "danceopd.tracking.delivery"]
    assert "1 journal(s) stay in the workspace" in line
    assert deliver(tmp_path, store.uri) == delivery.Outcome(1, 0)
    check(store, *store.runs(experiment).values())
    (book.folder / delivery.DELIVERED).unlink()  # killed before it was noted that all is there
    assert deliver(tmp_path, store.uri) == delivery.Outcome(1, 0)
    check(store, *store.runs(experiment).values())


def test_a_store_that_is_away_costs_one_line_and_gets_it_later(store, experiment, tmp_path, caplog):
    tell(tmp_path, experiment)
    started = time.monotonic()
    with caplog.at_level(logging.INFO):
        outcome = deliver(tmp_path, NOBODY)
    assert time.monotonic() - started < 2
    assert (outcome.delivered, outcome.waiting) == (0, 1)
    [line] = caplog.messages
    assert "http://127.0.0.1:9: no server answers there; 1 journal(s) stay" in line and "secret" not in line
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9: 1 journal\(s\) still wait"):
        deliver_named(tmp_path, NOBODY)
    assert deliver_named(tmp_path, store.uri).delivered == 1
    check(store, *store.runs(experiment).values())


def test_the_next_run_delivers_what_waits_for_the_same_store(store, experiment, tmp_path, monkeypatch):
    for run, uri in (("one", store.uri), ("two", NOBODY)):
        monkeypatch.setenv(journal.RUN, run)
        begin_run(tmp_path, run, experiment, {})
        journal.run_folder(tmp_path).joinpath(delivery.STORE).write_text(mlflow_store.redact(uri))
        tell(tmp_path, experiment, f"of {run}")
    monkeypatch.setenv(journal.RUN, "three")
    assert deliver(tmp_path, store.uri).delivered == 1
    assert [path.parent.name for path in pending(tmp_path)] == ["two"], "meant for another store"
    assert set(store.runs(experiment)) == {"of one", "one one"}


def test_a_run_that_was_stopped_goes_on_as_the_same(store, experiment, tmp_path):
    tell(tmp_path, experiment, end="KILLED")
    deliver(tmp_path, store.uri)
    assert [run.info.status for run in store.runs(experiment).values()] == ["KILLED"]
    again = tell(tmp_path, experiment, end=None)
    again.points(4, {"loss/t2i": 0.1, "forwards@1": 5})
    again.image("samples", 4, tmp_path / "grid.png")
    deliver(tmp_path, store.uri)
    [run] = store.runs(experiment).values()
    assert run.info.status == "RUNNING"
    check(store, run, points=4)


def test_what_the_store_will_never_take_does_not_hold_up_the_rest(store, experiment, tmp_path, caplog):
    book = open_journal(tmp_path, "x")
    book.start("x", experiment, {}, {})
    book.model("no/such:name", "digest", 1, {})
    book.points(1, {"loss": 1.0})
    book.end("FINISHED")
    assert deliver(tmp_path, store.uri) == delivery.Outcome(1, 0)
    [run] = store.runs(experiment).values()
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert "MLflow does not take model of alone/x" in caplog.text


def test_a_long_steps_curve_is_there_while_it_runs(store, experiment, tmp_path):
    book = tell(tmp_path, experiment, end=None)
    with Courier(tmp_path, store.uri, every=0.05):
        deadline = time.monotonic() + 20
        while pending(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        [run] = store.runs(experiment).values()
    check(store, run)
    assert run.info.status == "RUNNING"
    book.end("FINISHED")
    with delivery._locked(book.folder) as mine:
        assert mine
        assert deliver(tmp_path, store.uri).reason == "another process delivers them"


@pytest.mark.parametrize("ahead", [0, 5000])
def test_an_evaluation_names_the_student_that_another_step_made(store, experiment, tmp_path, monkeypatch, ahead):
    """Also if both began in one millisecond, and if the clock that distilled is ahead."""
    monkeypatch.setattr(journal, "now", lambda: 1_700_000_000_000 + ahead)
    tell(tmp_path, experiment)
    monkeypatch.setattr(journal, "now", lambda: 1_700_000_000_000)
    book = open_journal(tmp_path, "evaluations-x")
    book.start("evaluate", experiment, {}, {})
    book.dataset(DATA)
    scores = {"student": {"t2i": {"psnr": 29.0, "broken": None}}, "base": {"t2i": {"psnr": 20.0}}}
    recording.evaluated(book, {"scores": scores}, tmp_path, "weights of distill")
    deliver(tmp_path, store.uri)
    runs = store.runs(experiment)
    [used] = store.client.get_run(runs["evaluate"].info.run_id).inputs.model_inputs
    assert used.model_id == runs["distill"].outputs.model_outputs[0].model_id
    assert runs["evaluate"].data.metrics == {"t2i/psnr": 29.0, "base/t2i/psnr": 20.0}
    found = store.client.get_logged_model(used.model_id).metrics
    assert sorted((m.value, m.run_id) for m in found) == [
        (29.0, runs["evaluate"].info.run_id),
        (30.0, runs["distill"].info.run_id),
    ]


def test_by_hand(store, experiment, tmp_path):
    def ask(workspace: Path, uri: str):
        return CliRunner().invoke(app, ["tracking", "deliver", "--workspace", str(workspace), "--tracking-uri", uri])

    assert "no journals there" in str(ask(tmp_path / "none", store.uri).exception)
    tell(tmp_path, experiment)
    assert "1 journal(s) still wait (no server answers there)" in str(ask(tmp_path, NOBODY).exception)
    done = ask(tmp_path, store.uri)
    assert done.exit_code == 0 and done.output.endswith("mlflow.db: 1 journal(s) delivered\n")
    assert "0 journal(s) delivered" in ask(tmp_path, store.uri).output


@pytest.mark.parametrize("inside", [False, True])
def test_a_single_command_delivers_at_its_end_though_it_failed(store, experiment, tmp_path, monkeypatch, inside):
    other = typer.Typer()

    @other.command()
    def distill(
        recipe: str = "world",
        overrides: Annotated[list[str], typer.Option("--set")] = [],  # noqa: B006
        workspace: Annotated[Path | None, typer.Option()] = None,
    ) -> None:
        """As the real one: it tells, and then breaks."""
        tell(workspace, experiment, end="FAILED")
        raise UserError("broke")

    add_tracking(other)
    monkeypatch.setenv(mlflow_store.ENVIRONMENT, store.uri)
    if inside:  # the step that started the command delivers
        monkeypatch.setenv(journal.RUN, "run-1")
    done = CliRunner().invoke(other, ["distill", "--workspace", str(tmp_path)])
    assert str(done.exception) == "broke"
    assert [run.info.status for run in store.runs(experiment).values()] == ([] if inside else ["FAILED"])


def test_the_commands_that_tell_are_there():
    assert {command.name or command.callback.__name__ for command in app.registered_commands} >= set(TELLING)
