"""What examples/ holds runs, and shows what it says."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

import danceopd
from danceopd.config.recipe import EvaluateRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[str]:
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.slow
def test_two_fields_become_one_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["distill_two_fields.py", "picture.png"])
    made = runpy.run_path(str(EXAMPLES / "distill_two_fields.py"), run_name="__main__")
    assert (tmp_path / "picture.png").stat().st_size > 5000

    def score(name: str, task: str, metric: str) -> float:
        records = [record for record in made["held_out"] if record.task == task]
        encoded = made["encode"](records)
        return danceopd.score_records(made[name], encoded, records, (metric,), EvaluateRecipe()).means[metric]

    assert score("draws", "global_style", "psnr") < 15 < score("darkens", "global_style", "psnr")
    assert score("darkens", "t2i", "scene_accuracy") < 0.5 < score("draws", "t2i", "scene_accuracy")
    assert score("student", "global_style", "psnr") > 20
    assert score("student", "t2i", "scene_accuracy") > 0.5


@pytest.mark.slow
def test_the_readmes_first_lines_of_python_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (EXAMPLES.parent / "README.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL) if "import danceopd" in b]
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["field"], danceopd.VelocityField)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, source in enumerate(cells(notebook, "code")):
        exec(compile(source, f"{notebook.name}, code cell {number}", "exec"), names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_plain_and_kept_without_output(notebook):
    content = json.loads(notebook.read_text())
    assert content["nbformat"] == 4 and content["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    for source in cells(notebook, "code"):
        ast.parse(source)  # no magics: what runs here runs there


def test_there_is_a_notebook():
    assert [path.stem for path in NOTEBOOKS] == ["small_world"]
