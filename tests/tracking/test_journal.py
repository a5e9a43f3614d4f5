"""Journals: what is written once, what a kill leaves, and who writes at all."""

from __future__ import annotations

import pytest

from danceopd.errors import Interrupted, UserError
from danceopd.tracking import journal
from danceopd.tracking.journal import DatasetUse, begin_run, end_run, ending, open_journal, read_lines, run_folder


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (journal.RUN, "RANK"):
        monkeypatch.delenv(name, raising=False)


def kinds(book) -> list[str]:
    return [line["kind"] for line in read_lines(book.folder)[0]]


def test_training_that_goes_on_leaves_no_point_model_or_picture_twice(tmp_path):
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"first")
    for _ in range(2):
        book = open_journal(tmp_path, "students-x")
        book.points(10, {"loss": 0.5, "none": None})
        book.model("student-step-10", "digest", 10, {})
        book.image("samples", 10, picture)
    book.points(10, {"loss": 0.4, "grad_norm": 1.0})
    book.points(20, {"loss": 0.3})
    lines, _ = read_lines(book.folder)
    assert kinds(book) == ["points", "model", "image", "points", "points"]
    assert [line["values"] for line in lines if line["kind"] == "points"] == [
        {"loss": 0.5},
        {"grad_norm": 1.0},
        {"loss": 0.3},
    ]
    assert book.next_step("lo") == 21 and book.next_step("system/") == 0


def test_a_line_that_a_kill_cut_off_is_passed_over_and_the_next_one_is_whole(tmp_path):
    book = open_journal(tmp_path, "x")
    book.points(1, {"loss": 1.0})
    with open(book.folder / journal.LINES, "ab") as file:
        file.write(b'{"kind": "points", "st')
    whole, end = read_lines(book.folder)
    assert len(whole) == 1
    open_journal(tmp_path, "x").points(2, {"loss": 2.0})
    later, _ = read_lines(book.folder, end)
    assert [line["step"] for line in later] == [2]


def test_files_are_kept_though_they_go_elsewhere(tmp_path):
    source = tmp_path / "report.html"
    source.write_text("<p>")
    book = open_journal(tmp_path, "x")
    book.file(source, "evaluation")
    source.unlink()
    assert (book.folder / journal.FILES / "evaluation" / "report.html").read_text() == "<p>"


def test_figures_of_a_model_name_the_dataset_read_last(tmp_path):
    open_journal(tmp_path, "x").dataset(DatasetUse("world", "d1", {"dvc": "m"}, "training", {}))
    book = open_journal(tmp_path, "x")
    book.points(1, {"psnr": 1.0}, model="m1")
    book.points(1, {"loss": 1.0})
    of = [(line["model"], line["dataset"]) for line in read_lines(book.folder)[0] if line["kind"] == "points"]
    assert of == [("m1", {"name": "world", "digest": "d1"}), (None, None)]


@pytest.mark.parametrize(
    ("raised", "status", "error"),
    [
        (None, "FINISHED", ""),
        (UserError("too small"), "FAILED", "too small"),
        (ZeroDivisionError("by zero"), "FAILED", "ZeroDivisionError: by zero"),
        (Interrupted("after step 3"), "KILLED", "after step 3"),
        (KeyboardInterrupt(), "KILLED", ""),
    ],
)
def test_how_a_block_ended(tmp_path, raised, status, error):
    book = open_journal(tmp_path, "x")
    book.start("x", "e", {}, {})
    try:
        with ending(book):
            if raised is not None:
                raise raised
    except BaseException as found:
        assert found is raised
    last = read_lines(book.folder)[0][-1]
    assert (last["kind"], last["status"], last["error"]) == ("end", status, error)


def test_no_secret_lies_in_the_workspace(tmp_path, monkeypatch):
    monkeypatch.setenv(journal.RUN, "run-1")
    params = {"store": {"api_key": "word", "base": "https://me:word@host/x?key=word"}}
    begin_run(tmp_path, "world", "e", params)
    book = open_journal(tmp_path, "x")
    book.start("x", "e", params, {})
    book.end("FAILED", "https://me:word@host/x")
    written = "".join(path.read_text() for path in run_folder(tmp_path).rglob("*") if path.is_file())
    assert "word" not in written and written.count("https://host/x") == 3


def test_what_never_started_has_no_end(tmp_path):
    with ending(open_journal(tmp_path, "x")):
        pass
    assert not (tmp_path / journal.TRACKING).exists()


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "a.png").write_bytes(b"")
    book = open_journal(tmp_path, "x")
    book.start("x", "e", {}, {})
    book.points(1, {"loss": 1.0})
    book.image("samples", 1, tmp_path / "a.png")
    book.end("FINISHED")
    assert not (tmp_path / journal.TRACKING).exists()


def test_a_run_begins_once_and_may_end_otherwise_than_it_seemed(tmp_path, monkeypatch):
    begin_run(tmp_path, "world", "e", {})
    assert not run_folder(tmp_path).exists(), "no pipeline run, no parent"
    monkeypatch.setenv(journal.RUN, "run-1")
    end_run(tmp_path, "FINISHED")
    assert not (run_folder(tmp_path) / journal.END_FILE).exists(), "never began"
    begin_run(tmp_path, "world", "e", {"seed": 1})
    before = (run_folder(tmp_path) / journal.RUN_FILE).read_text()
    begin_run(tmp_path, "other", "e", {})
    assert (run_folder(tmp_path) / journal.RUN_FILE).read_text() == before
    end_run(tmp_path, "FINISHED", {"t2i/psnr": 2.0, "none": None})
    first = (run_folder(tmp_path) / journal.END_FILE).read_text()
    end_run(tmp_path, "FINISHED")
    assert (run_folder(tmp_path) / journal.END_FILE).read_text() == first
    end_run(tmp_path, "FAILED")
    last = (run_folder(tmp_path) / journal.END_FILE).read_text()
    assert '"FAILED"' in last and '"t2i/psnr": 2.0' in last and "none" not in last
