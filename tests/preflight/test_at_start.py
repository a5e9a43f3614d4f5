"""What is known before training is said before training: by `recipe check` and by every run."""

from __future__ import annotations

import os
import sys

import pytest

from danceopd.config.load import load_recipe
from danceopd.errors import UserError
from danceopd.preflight.at_start import check_splits, check_start, check_store

COUNTS = {task: {"train": 4, "val": 4, "test": 4} for task in ("t2i", "local_edit", "global_style")}


def messages(findings) -> list[str]:
    assert all(finding.level == "error" for finding in findings)
    return [finding.message for finding in findings]


def test_a_whole_run_has_nothing_to_say(tmp_path):
    recipe = load_recipe("world")
    assert check_start(recipe, COUNTS, f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}") == []
    assert check_start(recipe, None, "https://mlflow.example.com") == []


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_task_without_records_to_be_measured_on_is_named(split):
    found = messages(check_splits(load_recipe("world"), COUNTS | {"global_style": COUNTS["t2i"] | {split: 0}}))
    assert len(found) == 1 and f"task 'global_style': no records in split '{split}'" in found[0]


def test_the_split_that_is_evaluated_counts_and_teachers_that_are_not_proved_need_none():
    none = {"t2i": {"train": 4}, **{task: COUNTS[task] for task in ("local_edit", "global_style")}}
    recipe = load_recipe("world", ["evaluate.split=val", "teachers.global_style={kind: base}"])
    assert ["'t2i'" in line and "'val'" in line for line in messages(check_splits(recipe, none))] == [True]
    selecting = load_recipe("world", ["distill.select={every: 5}"])
    assert len(messages(check_splits(selecting, none))) == 2


def test_a_generated_worlds_sizes_are_known_from_the_recipe():
    recipe = load_recipe("world", ["data.world.t2i={train: 4, val: 2}"])
    assert "no records in split 'test'" in messages(check_start(recipe, None, "https://mlflow.example.com"))[0]


def test_a_store_that_cannot_be_written_is_told(tmp_path):
    assert "is a folder" in messages(check_store(f"sqlite:///{tmp_path}"))[0]
    (tmp_path / "file").write_text("")
    assert "which is a file" in messages(check_store(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}"))[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_is_told(tmp_path):
    database = tmp_path / "mlflow.db"
    database.write_text("")
    database.chmod(0o400)
    assert "cannot be written" in messages(check_store(f"sqlite:///{database}"))[0]


def test_a_batch_below_the_number_of_tasks_is_refused_in_the_recipe():
    with pytest.raises(UserError, match=r"distill.batch is 2, and each of the 3 tasks takes a sample"):
        load_recipe("world", ["distill.batch=2"])
    assert load_recipe("world", ["distill.batch=3"]).distill.batch == 3
    assert load_recipe("world", ["distill.batch=1", "distill.method=merge_average"]).distill.batch == 1


def test_recipe_check_says_it_first(monkeypatch, capsys, tmp_path):
    from danceopd.cli import main as cli

    words = ["danceopd", "recipe", "check", "world", "--set", "data.world.t2i={train: 4, val: 2}"]
    monkeypatch.setattr(sys, "argv", [*words, "--workspace", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "no records in split 'test'" in capsys.readouterr().err
