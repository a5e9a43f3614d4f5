"""The `register` step: a student that fails a gate ends it, and so the run, as failed; a challenger does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from kfp import dsl

from components.cards import write_card
from components.register import register
from components.running import RUN_ID, read_notes
from components.summary import write_summary
from danceopd import steps
from danceopd.config.load import load_recipe
from danceopd.errors import ExitCode
from danceopd.files import write_json
from danceopd.registry.register import Registration
from danceopd.workspace import STEP, open_product

RECIPE = load_recipe("world")
GATE = {"task": "t2i", "metric": "valid", "value": 0.9, "limit": 0.95, "interval": None, "rule": "retain 0.95"}
REASON = "t2i.valid is 0.9, its gate is 0.95"
SHORT = "t2i valid: 90.0 %, 5.0 points short of its gate at 95.0 % (retain 0.95)"


@pytest.fixture(autouse=True)
def a_run(monkeypatch):
    monkeypatch.setenv(RUN_ID, "run-1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port, where nothing listens


@pytest.fixture
def run_step(tmp_path, monkeypatch):
    """Runs the step on an evaluation that passed or not, with what the registry came to."""

    def card(name: str):
        place = tmp_path / name
        write_json(place / STEP, {"step": name, "key": name, "digest": name, "facts": {}, "seconds": 1})
        artifact = dsl.Artifact(name=name, uri=str(tmp_path / "cards" / name))
        write_card(artifact, open_product(place), name)
        return artifact

    def run(passed: bool, registration: Registration):
        monkeypatch.setattr(steps, "register_student", lambda *_: registration)
        metrics = {"gates": [GATE | {"passed": passed}], "units": {"valid": "rate"}, "passed": passed}
        write_json(tmp_path / "evaluation" / "metrics.json", metrics)
        cards = {name: card(name) for name in ("base", "data", "student", "evaluation")}
        given = SimpleNamespace(workspace=str(tmp_path / "ws"), tracking_uri="", data_revision="", code_revision="")
        return register.python_func(RECIPE.model_dump_json(), teachers=[card("a")], **cards, **vars(given))

    return run


def test_a_student_that_fails_a_gate_fails_the_step_in_one_line(run_step, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_step(False, Registration(False, None, [], [REASON], None, None))
    assert caught.value.code == ExitCode.NOT_REGISTERED
    told = [line for line in capsys.readouterr().err.splitlines() if "short of its gate" in line]
    assert len(told) == 1 and told[0].endswith(f"register | failed: not registered: {SHORT}")
    [note] = read_notes(tmp_path / "ws")
    assert (note["state"], note["registration"]["registered"]) == ("failed", False)
    write_summary(str(tmp_path / "ws"), "FAILED", str(tmp_path / "summary.md"))
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# DanceOPD run: FAILED") and f"- register: not registered: {SHORT}\n" in summary
    assert f"- reasons: {REASON}\n" in summary and f"what to try\n\n- {SHORT}\n- try: " in summary


@pytest.mark.parametrize("reasons", [[], ["worse than the champion"]])
def test_a_challenger_is_no_failure(run_step, tmp_path, reasons):
    done = run_step(True, Registration(True, "3", ["challenger"], reasons, "2", "r"))
    assert (done["version"], done["alias"]) == ("3", ["challenger"])
    assert [note["state"] for note in read_notes(tmp_path / "ws")] == ["done"]


def test_an_evaluation_that_did_not_pass_without_a_failed_gate_says_so(run_step, capsys):
    with pytest.raises(SystemExit):
        run_step(True, Registration(False, None, [], ["the evaluation did not pass"], None, None))
    assert "failed: not registered: the evaluation did not pass" in capsys.readouterr().err
