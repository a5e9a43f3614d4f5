"""The first run's benchmark: margins as shares, every run once, a stopped benchmark goes on."""

from __future__ import annotations

import json

import pytest

from benchmarks import first_run
from danceopd.config.load import load_recipe
from danceopd.errors import UserError

DRAWING = load_recipe("world").tasks["t2i"].gates[0].metric


def retention(student: float = 0.97) -> dict:
    """A student that is as good as its teacher everywhere but at drawing, whose gate allows 5 % less."""
    recipe = load_recipe("world")
    same = {"teacher": 1.0, "student": 1.0}
    found = {task: {gate.metric: dict(same) for gate in spec.gates} for task, spec in recipe.tasks.items()}
    found["t2i"][DRAWING]["student"] = student
    return found


def line(setting: first_run.Setting, student: float = 0.97) -> dict:
    margins = first_run.gate_margins(load_recipe("world"), {"retention": retention(student)})
    facts = {"seed": setting.seed, "instructions": setting.instructions, "threads": setting.threads}
    return facts | {"seconds": 1.0, "passed": student >= 0.95, "margins": margins, "retention": retention(student)}


@pytest.fixture
def made(monkeypatch):
    """Runs that cost nothing; the list of those made."""
    seen = []

    def run(recipe, overrides, setting, workspace):
        seen.append(setting)
        return line(setting)

    monkeypatch.setattr(first_run, "run_once", run)
    return seen


def options(tmp_path, *more: str):
    place = ["--results", str(tmp_path / "r.jsonl"), "--workspace", str(tmp_path / "ws")]
    return first_run.parser().parse_args([*place, *more])


def test_a_margin_is_the_share_of_what_the_gate_allows():
    margins = first_run.gate_margins(load_recipe("world"), {"retention": retention(0.97)})
    assert margins[f"t2i {DRAWING}"] == pytest.approx(0.4)
    assert margins["global_style psnr"] == pytest.approx(1)
    assert first_run.gate_margins(load_recipe("world"), {"retention": retention(0.94)})[f"t2i {DRAWING}"] < 0


def test_the_grid_is_seeds_times_instructions_times_threads(made, tmp_path):
    first_run.make_results(options(tmp_path, "--seeds", "1,2", "--instructions", "avx2,avx512", "--run-threads", "1,2"))
    assert len(set(made)) == len(made) == 8
    assert made[0].environment() == {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}


def test_a_run_in_the_file_is_not_made_again_unless_recipe_or_code_changed(made, tmp_path, monkeypatch):
    first = first_run.make_results(options(tmp_path, "--seeds", "1", "--instructions", "avx2"))
    again = first_run.make_results(options(tmp_path, "--seeds", "1,2", "--instructions", "avx2"))
    assert [s.seed for s in made] == [1, 2] and again[0] == first[0]
    first_run.make_results(options(tmp_path, "--seeds", "1", "--instructions", "avx2", "--set", "distill.steps=9"))
    assert len(made) == 3
    monkeypatch.setattr(first_run, "code_revision", lambda: "another")
    first_run.make_results(options(tmp_path, "--seeds", "1", "--instructions", "avx2"))
    assert len(made) == 4


def test_the_report_names_the_worst_and_fails_with_it(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(first_run, "run_once", lambda r, o, setting, w: line(setting, 0.96 if setting.seed else 0.99))
    arguments = ["--results", str(tmp_path / "r.jsonl"), "--instructions", "avx2", "--json", str(tmp_path / "j")]
    assert first_run.main([*arguments, "--seeds", "0"]) == 0
    assert first_run.main([*arguments, "--seeds", "0,1"]) == 1
    told = capsys.readouterr().out
    assert "runs of 2 that hold every gate: 2 (at least 2): held" in told
    assert "smallest margin, as a share of what its gate allows: 0.2 (at least 0.333333): MISSED" in told
    assert f"t2i {DRAWING}: student 0.975" in told and "below its teacher's 1" in told
    assert len(json.loads((tmp_path / "j").read_text())[0]["details"]["runs"]) == 2


@pytest.mark.slow
def test_a_run_that_fails_says_how_its_log_ends(tmp_path):
    setting = first_run.Setting(0, "avx2", 1)
    with pytest.raises(UserError, match=r"seed=0.*ended with code 2.*nowhere"):
        first_run.run_once("world", [f"data={{inputs: [{tmp_path}/nowhere]}}"], setting, tmp_path)


def test_the_figures_hold_the_scatter_of_seeds_and_the_range_over_cpus():
    runs = {(0, "avx2"): 0.96, (0, "avx512"): 0.98, (1, "avx2"): 0.99, (1, "avx512"): 0.99, (2, "avx2"): 1.0}
    lines = [line(first_run.Setting(seed, cpu, 1), student) for (seed, cpu), student in runs.items()]
    rows = {(row[0], row[1]): row[2:] for row in first_run.figures(lines).rows}
    # Seeds' means .97, .99 and 1: their standard deviation .0153, over the root of 3, times t = 4.30.
    assert rows["t2i", DRAWING] == ["1 ± 0", "0.9867 ± 0.038", "0.02"]
    assert first_run.figures(lines[:1]).rows[0][3] == "0.96"
