"""What surrounds a step's call: one-line errors, notes, and the summary made of them."""

from __future__ import annotations

import logging

import pytest
import yaml

from components.running import (
    NO_LAST_WORD,
    RUN_ID,
    failures,
    notes_folder,
    read_notes,
    read_recipe,
    running,
)
from danceopd.config.load import load_recipe
from danceopd.errors import Interrupted, UserError
from danceopd.files import write_atomic, write_json
from danceopd.tracking.mlflow_store import ENVIRONMENT

RECIPE = load_recipe("world")


@pytest.fixture(autouse=True)
def one_run(monkeypatch):
    """A run of its own, no MLflow store, and the loggers as they were afterwards."""
    monkeypatch.setenv(RUN_ID, "run-1")
    monkeypatch.setenv(ENVIRONMENT, "http://127.0.0.1:9")  # the discard port, where nothing listens
    loggers = [logging.getLogger(name) for name in ("danceopd", "components")]
    before = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_a_step_that_ends_well_notes_its_results(tmp_path, capsys):
    with running("finetune", RECIPE.model_dump_json(), str(tmp_path / "new"), "local") as step:
        assert step.recipe == RECIPE
        step.results["scores"] = [1, 2]
        logging.getLogger("danceopd.finetune").info("step 7")
    [note] = read_notes(tmp_path / "new")
    assert (note["step"], note["state"], note["scores"]) == ("finetune local", "done", [1, 2])
    assert " finetune local | step 7\n" in capsys.readouterr().err


def test_a_user_error_ends_the_process_with_its_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, running("distill", RECIPE.model_dump_json(), str(tmp_path)):
        raise UserError("teacher 'x': broken")
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "started" not in line]
    assert len(lines) == 1 and lines[0].endswith("distill | failed: teacher 'x': broken")
    assert failures(read_notes(tmp_path)) == ["distill: teacher 'x': broken"]


def test_any_other_error_goes_through_and_is_noted(tmp_path):
    with pytest.raises(ZeroDivisionError), running("distill", RECIPE.model_dump_json(), str(tmp_path)):
        raise ZeroDivisionError("by zero")
    assert failures(read_notes(tmp_path)) == ["distill: ZeroDivisionError: by zero"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{", "recipe: neither valid YAML nor JSON"),
        ("wrold", "recipe 'wrold': neither a file nor a shipped recipe; shipped: "),
        ("[]", "recipe: a recipe is a YAML mapping, this is list"),
        ('{"nme": 1}', "recipe: "),
    ],
)
def test_a_bad_recipe(tmp_path, capsys, recipe, message):
    with pytest.raises(SystemExit), running("check-recipe", recipe, str(tmp_path)):
        pytest.fail("the body must not run")
    assert f"check-recipe | failed: {message}" in capsys.readouterr().err


def test_a_recipe_is_given_by_name_file_or_text(tmp_path):
    path = write_atomic(tmp_path / "mine.yaml", yaml.safe_dump(RECIPE.model_dump(mode="json")))
    for given in ("world", str(path), path.read_text(), RECIPE.model_dump_json(), " world\t"):
        assert read_recipe(given) == RECIPE
        assert read_recipe(given, ["seed=5"]).seed == 5


def test_a_workspace_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit), running("distill", RECIPE.model_dump_json(), str(tmp_path / "file")):
        pytest.fail("the body must not run")
    assert "cannot be made" in capsys.readouterr().err


def test_a_workspace_without_write_access(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("components.running.os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SystemExit), running("distill", RECIPE.model_dump_json(), str(tmp_path)):
        pytest.fail("the body must not run")
    assert "no permission to write" in capsys.readouterr().err


def test_runs_do_not_see_each_others_notes(tmp_path, monkeypatch):
    with running("distill", RECIPE.model_dump_json(), str(tmp_path)):
        pass
    monkeypatch.setenv(RUN_ID, "run-2")
    assert read_notes(tmp_path) == [] and len(read_notes(tmp_path, "run-1")) == 1


def test_a_step_that_was_killed_is_told_from_one_that_ended(tmp_path):
    write_json(notes_folder(tmp_path) / "distill.json", {"step": "distill", "seconds": 0, "state": "running"})
    assert failures(read_notes(tmp_path)) == [f"distill: {NO_LAST_WORD}"]


def test_a_step_that_was_interrupted_says_so_and_asks_to_be_retried(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, running("distill", RECIPE.model_dump_json(), str(tmp_path)):
        raise Interrupted("interrupted after step 3 of 8")
    assert caught.value.code == 75
    [note] = read_notes(tmp_path)
    assert note["state"] == "interrupted"
    assert failures([note]) == ["distill: interrupted after step 3 of 8"]
    assert "distill | interrupted after step 3 of 8" in capsys.readouterr().err


def test_ctrl_c_in_a_step_that_cannot_save_is_no_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, running("evaluate", RECIPE.model_dump_json(), str(tmp_path)):
        raise KeyboardInterrupt
    assert caught.value.code == 75
    [note] = read_notes(tmp_path)
    assert note["state"] == "interrupted" and "run again, it goes on from what is saved" in note["error"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_retried_step_leaves_one_note(tmp_path):
    with pytest.raises(SystemExit), running("distill", RECIPE.model_dump_json(), str(tmp_path)):
        raise UserError("once")
    with running("distill", RECIPE.model_dump_json(), str(tmp_path)):
        pass
    assert failures(read_notes(tmp_path)) == []
