"""A step as a part of its pipeline run: named for all it starts, delivered when it costs little."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from components import tracked as room
from components.tracked import end_tracked, tracked
from danceopd.config.load import load_recipe
from danceopd.tracking import delivery, journal
from danceopd.tracking.mlflow_store import ENVIRONMENT

RECIPE = load_recipe("world")
NOBODY = "http://127.0.0.1:9"  # the discard port, where nothing listens


@pytest.fixture(autouse=True)
def place(monkeypatch):
    for name in (journal.RUN, "RANK", ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def delivered(monkeypatch) -> list[tuple[str | None, str]]:
    """Which run was delivered to which store."""
    calls: list[tuple[str | None, str]] = []
    monkeypatch.setattr(room.delivery, "deliver", lambda _, uri: calls.append((journal.current_run(), uri)))
    return calls


def run_file(workspace, run: str, name: str = journal.RUN_FILE) -> dict:
    return json.loads((journal.run_folder(workspace, run) / name).read_text())


@pytest.mark.slow
def test_a_step_and_what_it_starts_belong_to_its_run(tmp_path):
    with tracked(RECIPE, tmp_path, "run-1", ""):
        child = [sys.executable, "-c", f"import os; print(os.environ[{journal.RUN!r}])"]
        assert subprocess.run(child, capture_output=True, text=True, check=True).stdout == "run-1\n"
    assert journal.RUN not in os.environ
    about = run_file(tmp_path, "run-1")
    assert (about["name"], about["experiment"]) == ("world", RECIPE.register_as.experiment)
    assert about["params"]["distill.steps"] == str(RECIPE.distill.steps)


def test_a_step_without_a_run_has_no_parent(tmp_path):
    with tracked(RECIPE, tmp_path, "", ""):
        assert journal.current_run() is None
    assert not (tmp_path / journal.TRACKING).exists()


@pytest.mark.parametrize(
    ("given", "environment", "wanted"),
    [
        (NOBODY, "", [("run-1", NOBODY)]),
        ("", NOBODY, [("run-1", NOBODY)]),
        ("", "", []),
        ("sqlite:////tmp/x/mlflow.db", "", []),
    ],
)
def test_a_server_hears_of_a_step_at_its_end_though_it_failed(
    tmp_path, monkeypatch, delivered, given, environment, wanted
):
    monkeypatch.setenv(ENVIRONMENT, environment)
    with pytest.raises(ZeroDivisionError), tracked(RECIPE, tmp_path, "run-1", given):
        raise ZeroDivisionError
    assert delivered == wanted


@pytest.mark.parametrize(("good", "status"), [(True, "FINISHED"), (False, "FAILED")])
def test_the_summary_ends_the_parent(tmp_path, delivered, good, status):
    with tracked(RECIPE, tmp_path, "run-1", ""):
        pass
    end_tracked(tmp_path, "run-1", good, "")
    assert run_file(tmp_path, "run-1", journal.END_FILE)["status"] == status
    assert delivered == [("run-1", f"sqlite:///{tmp_path}/mlflow.db")]


def test_a_step_that_was_killed_is_ended_with_its_run(tmp_path, delivered):
    with tracked(RECIPE, tmp_path, "run-1", ""):
        for name in ("killed", "ended"):
            journal.open_journal(tmp_path, name).start(name, "e", {}, {})
        journal.open_journal(tmp_path, "ended").end("FINISHED")
    journal.open_journal(tmp_path, "alone").start("of a command", "e", {}, {})
    end_tracked(tmp_path, "run-1", False, "")
    folders = [journal.run_folder(tmp_path, "run-1") / name for name in ("killed", "ended")]
    last = [journal.read_lines(folder)[0][-1]["status"] for folder in folders]
    assert last == ["KILLED", "FINISHED"]
    assert len(journal.read_lines(journal.run_folder(tmp_path) / "alone")[0]) == 1


def test_a_run_whose_store_is_away_ends_well_and_waits(tmp_path, caplog):
    with tracked(RECIPE, tmp_path, "run-1", NOBODY):
        book = journal.open_journal(tmp_path, "students-x")
        book.start("distill", "e", {}, {})
    assert [path.parent.name for path in delivery.pending(tmp_path)] == ["run-1"]
    assert caplog.text.count("1 journal(s) stay in the workspace") == 1
