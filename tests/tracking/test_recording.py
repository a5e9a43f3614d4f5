"""What steps write down: training histories, validated states, and the machine's load."""

from __future__ import annotations

import time

import pytest

from danceopd.tracking import journal, recording
from danceopd.tracking.journal import open_journal, read_lines


@pytest.fixture
def book(tmp_path, monkeypatch):
    for name in (journal.RUN, "RANK"):
        monkeypatch.delenv(name, raising=False)
    return open_journal(tmp_path, "students-world-1")


def points(book) -> dict[str, tuple[int, float]]:
    lines, _ = read_lines(book.folder)
    return {n: (line["step"], v) for line in lines if line["kind"] == "points" for n, v in line["values"].items()}


def test_a_history_has_one_loss_or_one_a_task(book):
    recording.entry(book, "student", {"step": 5, "loss": {"t2i": 1.0, "edit": 2.0}, "forwards_per_sample": 9.0})
    recording.entry(book, "student", {"step": 6, "loss": 0.5, "grad_norm": 0.1})
    assert points(book) == {
        "loss/t2i": (5, 1.0),
        "loss/edit": (5, 2.0),
        "forwards_per_sample": (5, 9.0),
        "loss": (6, 0.5),
        "grad_norm": (6, 0.1),
    }


def test_a_validated_state_is_a_model_with_its_figures(book):
    validation = {"score": 0.1, "figures": {"t2i": {"psnr": 30.0}}}
    recording.entry(book, "student", {"step": 5, "loss": {}, "validation": validation, "best_step": 5})
    lines, _ = read_lines(book.folder)
    model, figures = (next(line for line in lines if line["kind"] == kind) for kind in ("model", "points"))
    assert (model["name"], model["step"], model["tags"]) == ("student-step-5", 5, {"best_step": 5})
    assert figures["model"] == model["digest"] == "students-world-1-step-5"
    assert figures["values"] == {"validation/margin": 0.1, "validation/t2i/psnr": 30.0}


def test_a_teacher_has_its_scores_beside_the_bases(book, tmp_path):
    scores = {"edit": {"base": {"psnr": 1.0}, "teacher": {"psnr": 2.0}}}
    recording.model_made(
        book, "edit", tmp_path, "digest", {"kind": "finetuned", "steps": 7, "loss": 0.5, "scores": scores}
    )
    assert points(book) == {"base/edit/psnr": (7, 1.0), "teacher/edit/psnr": (7, 2.0), "final_loss": (7, 0.5)}


@pytest.mark.slow
def test_a_long_step_says_what_it_did_to_the_machine_and_a_short_one_nothing(book, tmp_path):
    with recording.SystemWatch(book, first=60):
        pass
    assert not book.folder.exists()
    for resumed in (False, True):
        before = book.next_step("system/")
        with recording.SystemWatch(open_journal(tmp_path, book.folder.name) if resumed else book, first=0, every=0.01):
            deadline = time.monotonic() + 20
            while len(read_lines(book.folder)[0]) < before + 2 and time.monotonic() < deadline:
                time.sleep(0.02)
        steps = [line["step"] for line in read_lines(book.folder)[0]]
        assert steps == list(range(len(steps))) and len(steps) >= before + 2
    found = points(book)
    assert 0 < found["system/system_memory_usage_percentage"][1] <= 100
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= set(found)
