"""The run's last word: right whatever Kubeflow calls its end, and no training job left behind unseen."""

from __future__ import annotations

import json
import shutil

import pytest

from components import summary
from components.running import RUN_ID, notes_folder, running
from components.summary import summary_markdown, write_summary
from danceopd.config.load import load_recipe
from danceopd.errors import UserError
from danceopd.files import write_atomic, write_json
from danceopd.tracking import journal

RECIPE = load_recipe("world")
JOB = "danceopd-distill-run1"


@pytest.fixture(autouse=True)
def a_run(monkeypatch):
    monkeypatch.setenv(RUN_ID, "run-1")


@pytest.fixture
def workspace(tmp_path, empty_store):
    """A folder with an MLflow store."""
    shutil.copy(empty_store, tmp_path)
    return tmp_path


def test_the_summary_of_a_failed_run_says_what_and_why():
    notes = [
        {"step": "resolve-base", "state": "done", "seconds": 1.0},
        {"step": "finetune local", "state": "failed", "seconds": 2.0, "error": "no better than the base"},
    ]
    text = summary_markdown(notes, "FAILED", {"code_revision": "c0de"}, {})
    assert text.startswith("# DanceOPD run: FAILED\n\n- code revision: `c0de`\n")
    assert "- finetune local: no better than the base\n" in text
    assert "| resolve-base | 1.0 | done |" in text and "Registration" not in text


def test_the_summary_of_a_good_run_has_the_registration_and_the_report(workspace):
    (workspace / "evaluation").mkdir()
    (workspace / "evaluation" / "report.md").write_text("# World: figures\n")
    registration = {"registered": True, "version": "3", "alias": ["challenger", "champion"], "champion_before": None}
    with running("register", RECIPE.model_dump_json(), str(workspace)) as step:
        step.results["registration"] = registration
        step.results["evaluation"] = str(workspace / "evaluation")
    write_summary(str(workspace), "SUCCEEDED", str(workspace / "out"), data_revision="da7a")
    text = (workspace / "out").read_text()
    assert "- alias: challenger, champion\n- champion_before: none\n" in text
    assert text.endswith("# World: figures\n") and "What failed" not in text
    assert (notes_folder(workspace) / "summary.md").read_text() == text


def test_the_summary_names_the_revision_a_step_found_unless_it_was_given(tmp_path):
    write_json(
        notes_folder(tmp_path) / "check.json",
        {"step": "check-recipe", "state": "done", "seconds": 1, "data_revision": "found"},
    )
    for given, shown in {"": "found", "given": "given"}.items():
        write_summary(str(tmp_path), "SUCCEEDED", str(tmp_path / "out"), data_revision=given)
        assert f"- data revision: `{shown}`\n" in (tmp_path / "out").read_text()


def test_a_summary_without_any_note_is_still_written(tmp_path):
    write_summary(str(tmp_path), "FAILED", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text().startswith("# DanceOPD run: FAILED")


def register_note(workspace, state: str = "done") -> None:
    note = {"step": "register", "state": state, "seconds": 1.0}
    write_json(notes_folder(workspace) / "register.json", note)


def ended_in_mlflow(workspace) -> str:
    return json.loads((journal.run_folder(workspace, "run-1") / journal.END_FILE).read_text())["status"]


@pytest.mark.parametrize(
    ("state", "registered", "good"),
    [  # MLMD's names of an execution's state, which a cluster hands on (2.17, backend/src/v2/driver/resolve.go)
        ("COMPLETE", True, True),
        ("RUNNING", True, True),
        ("CACHED", True, True),
        ("UNKNOWN", True, True),
        ("RUNNING", False, False),
        ("NEW", False, False),
        ("FAILED", True, False),
        ("CANCELED", True, False),
        ("SUCCEEDED", False, True),  # the local runner's
    ],
)
def test_a_good_run_ends_well_whatever_kubeflow_calls_it(workspace, state, registered, good):
    with running("check-recipe", RECIPE.model_dump_json(), str(workspace)):
        pass
    if registered:
        register_note(workspace)
    write_summary(str(workspace), state, str(workspace / "out"))
    word = "SUCCEEDED" if good else "FAILED"
    assert (workspace / "out").read_text().startswith(f"# DanceOPD run: {word}")
    assert ended_in_mlflow(workspace) == ("FINISHED" if good else "FAILED")


@pytest.fixture
def cancelled(tmp_path, monkeypatch) -> list[list[str]]:
    """A run that submitted a job; the commands that its summary hands over."""
    write_atomic(notes_folder(tmp_path) / f"{JOB}.yaml", "kind: Job")
    calls: list[list[str]] = []
    monkeypatch.setattr(summary, "hand_over", lambda _, words: calls.append(words))
    return calls


def test_the_job_of_a_run_that_failed_is_deleted_and_the_summary_says_so(tmp_path, cancelled):
    write_summary(str(tmp_path), "FAILED", str(tmp_path / "out"))
    assert cancelled == [["danceopd", "job", "cancel", JOB, "--if-there"]]
    assert f"## Training jobs\n\n- {JOB}: deleted with its run" in (tmp_path / "out").read_text()


def test_the_job_of_a_good_run_is_left_alone(tmp_path, cancelled):
    register_note(tmp_path)
    write_summary(str(tmp_path), "COMPLETE", str(tmp_path / "out"))
    assert cancelled == [] and f"- {JOB}: done" in (tmp_path / "out").read_text()


@pytest.mark.parametrize("error", [UserError("no cluster"), RuntimeError("ended with code 1")])
def test_a_job_that_could_not_be_deleted_is_named_and_the_summary_still_written(
    tmp_path, cancelled, monkeypatch, error
):
    def refuse(*_):
        raise error

    monkeypatch.setattr(summary, "hand_over", refuse)
    write_summary(str(tmp_path), "FAILED", str(tmp_path / "out"))
    assert f"may still hold its nodes, for it could not be deleted; run: danceopd job cancel {JOB}" in (
        (tmp_path / "out").read_text()
    )


def test_the_summary_of_a_student_that_fails_a_gate_says_what_it_lacks():
    refused = {"registered": False, "reasons": ["t2i.valid is 0.9, its gate is 0.95"]}
    note = {"step": "register", "state": "done", "seconds": 1.0, "registration": refused}
    lacks = note | {"shortfalls": ["t2i valid: 90.0 %", "try: more training"]}
    text = summary_markdown([lacks], "SUCCEEDED", {}, {})
    assert "## What the student lacks, and what to try\n\n- t2i valid: 90.0 %\n- try: more training\n" in text
    assert "lacks" not in summary_markdown([note | {"shortfalls": []}], "SUCCEEDED", {}, {})
