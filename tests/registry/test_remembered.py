"""A registration is recalled while its store is the very file it was, and asked for in every other case."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing

import pytest

from danceopd.registry.register import Registration
from danceopd.registry.remembered import keep, recall
from danceopd.tracking.mlflow_store import DATABASE, default_tracking_uri

ANSWER = Registration(True, "3", ["champion"], [], "2", "run")
ASKED = {"student": "s", "evaluation": "e"}


def write(database, value):
    with closing(sqlite3.connect(database)) as store:
        store.execute("create table if not exists versions (number integer)")
        store.execute("insert into versions values (?)", (value,))
        store.commit()


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "workspace"
    folder.mkdir()
    write(folder / DATABASE, 3)
    keep(folder, default_tracking_uri(folder), ASKED, ANSWER)
    return folder


def test_the_same_question_of_the_same_store_is_answered(workspace):
    assert recall(workspace, default_tracking_uri(workspace), ASKED) == ANSWER


def test_another_question_is_not(workspace):
    assert recall(workspace, default_tracking_uri(workspace), ASKED | {"evaluation": "other"}) is None


def test_a_store_that_changed_or_is_gone_is_asked(workspace):
    write(workspace / DATABASE, 4)
    assert recall(workspace, default_tracking_uri(workspace), ASKED) is None
    (workspace / DATABASE).unlink()
    assert recall(workspace, default_tracking_uri(workspace), ASKED) is None


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_a_store_that_is_written_to_is_asked(workspace, suffix):
    (workspace / f"{DATABASE}{suffix}").write_bytes(b"x")
    assert recall(workspace, default_tracking_uri(workspace), ASKED) is None


def test_a_store_elsewhere_is_always_asked(workspace):
    keep(workspace, "http://localhost:5000", ASKED, ANSWER)
    assert recall(workspace, "http://localhost:5000", ASKED) is None


def test_a_moved_workspace_asks_its_store_which_settles_addresses(workspace, tmp_path):
    moved = shutil.move(workspace, tmp_path / "moved")
    assert recall(moved, default_tracking_uri(moved), ASKED) is None
