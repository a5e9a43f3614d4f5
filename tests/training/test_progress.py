"""Progress and plots: lines in a pod, figures on paper."""

from __future__ import annotations

import logging

from PIL import Image

from danceopd.evaluation.plots import plot_history
from danceopd.training.progress import StepProgress


def test_plain_lines_come_every_so_often_and_at_the_end(caplog):
    progress = StepProgress("distill", 7, every=3)
    with caplog.at_level(logging.INFO, "danceopd"):
        for step in progress.steps():
            progress.show(step, loss=1 / (step + 1))
    assert [line.split(" loss")[0] for line in caplog.messages] == [
        "distill step 3/7",
        "distill step 6/7",
        "distill step 7/7",
    ]


def test_a_history_becomes_a_picture(tmp_path):
    history = [
        {"step": 5 * i, "loss": {"a": 1 / i, "b": 2 / i}, "sigma_histogram": {"a": [i] * 10, "b": [1] * 10}}
        for i in (1, 2, 3)
    ]
    plot_history(history, tmp_path / "p" / "training.png")
    assert Image.open(tmp_path / "p" / "training.png").size[0] > 600


def test_a_resumed_loop_goes_on_counting_and_paces_its_own_steps_only(caplog, monkeypatch):
    now = iter([0.0, 100.0, 102.0])
    monkeypatch.setattr("danceopd.training.progress.time.monotonic", lambda: next(now))
    progress = StepProgress("distill", 7, every=7)
    with caplog.at_level(logging.INFO, "danceopd"):
        for step in progress.steps(5):
            progress.show(step, loss=1.0)
    assert caplog.messages == ["distill step 7/7 loss 1 (1000 ms per step)"]
