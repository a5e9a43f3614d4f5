"""Every component folder is held to the same: files, image, inputs, documentation, and no logic of its own."""

from __future__ import annotations

import ast
import inspect
import re
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from component_readme import MARKER, STEPS, component_of, readme

import components
from components.image import IMAGE

ROOT = Path(components.__file__).parent
WITHOUT_DATA = {"move_champion"}
LOGIC = (ast.If, ast.For, ast.While, ast.Try, ast.FunctionDef, ast.Lambda, ast.ListComp, ast.DictComp, ast.Raise)


@pytest.fixture(params=STEPS)
def step(request) -> str:
    return request.param


def test_the_chain_is_complete():
    chain = {"build_data", "check_recipe", "distill", "evaluate", "finetune", "register", "resolve_base", "summarize"}
    assert chain | {"move_champion"} == set(STEPS)


def test_folder_holds_the_same_files(step):
    files = {p.name for p in (ROOT / step).iterdir() if p.is_file()}
    assert files == {"__init__.py", "component.py", "metadata.yaml", "README.md"}


# As kubeflow/pipelines-components validates a component's metadata.yaml.
REQUIRED, OPTIONAL = ["name", "stability", "dependencies", "lastVerified"], {"tags", "ci", "links"}
VERSION = re.compile(r"(==|>=|<=|~=)?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


def wrong_with(metadata: dict) -> list[str]:
    """What that validation would refuse."""
    wrong = []
    if [name for name in metadata if name not in OPTIONAL] != REQUIRED:
        wrong.append(f"fields, in this order: {REQUIRED}")
    if metadata.get("stability") not in ("experimental", "alpha", "beta", "stable"):
        wrong.append("stability")
    needs = metadata.get("dependencies", {}).get("kubeflow", [])
    if not any(need["name"] == "Pipelines" for need in needs):
        wrong.append("dependencies: no Pipelines")
    wrong += [f"version of {need['name']}" for need in needs if not VERSION.fullmatch(str(need.get("version")))]
    if not isinstance(metadata.get("lastVerified"), datetime):
        wrong.append("lastVerified: a date and time")
    if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
        wrong.append("tags")
    return wrong


def metadata_of(step: str) -> dict:
    return yaml.safe_load((ROOT / step / "metadata.yaml").read_text())


def test_metadata(step):
    metadata = metadata_of(step)
    assert wrong_with(metadata) == []
    assert metadata["name"] == step and metadata["tags"]
    lowest = re.search(r'"kfp>=([\d.]+),', (ROOT.parent / "pyproject.toml").read_text())[1]
    assert metadata["dependencies"]["kubeflow"][0]["version"] == f">={lowest}.0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stability": "fine"}, "stability"),
        ({"lastVerified": "2026-11-27"}, "lastVerified: a date and time"),
        ({"dependencies": {"kubeflow": [{"name": "Pipelines", "version": ">=2.17"}]}}, "version of Pipelines"),
        ({"dependencies": {"kubeflow": [{"name": "Trainer", "version": "2.1.0"}]}}, "dependencies: no Pipelines"),
        ({"owner": "me"}, f"fields, in this order: {REQUIRED}"),
        ({"tags": [1]}, "tags"),
    ],
)
def test_the_validation_sees(change, said):
    assert wrong_with(metadata_of("distill") | change) == [said]


def test_readme_is_the_generated_one(step):
    text = (ROOT / step / "README.md").read_text()
    assert text == readme(step), "run: PYTHONPATH=. python tests/components/component_readme.py"
    assert text.partition(MARKER)[2].strip(), "say behind the marker what the step does, and what does the work"


def test_readme_names_every_input_and_output(step):
    spec = component_of(step).component_spec
    text = (ROOT / step / "README.md").read_text()
    described = {line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")}
    assert described == {*(spec.inputs or {}), *(spec.outputs or {})}
    assert not [line for line in text.splitlines() if line.startswith("| `") and line.endswith("|  |")]


def test_every_input_is_described(step):
    doc = inspect.getdoc(component_of(step).python_func)
    for name in inspect.signature(component_of(step).python_func).parameters:
        assert f"    {name}: " in doc, f"{step}: {name} is not described"


def test_image_comes_from_one_place_and_nothing_is_installed(step):
    container = component_of(step).component_spec.implementation.container
    assert container.image == IMAGE
    assert "pip install" not in " ".join(container.command)
    source = (ROOT / step / "component.py").read_text()
    assert "@dsl.component(base_image=IMAGE, install_kfp_package=False)" in source


def test_inputs_that_keep_the_cache_honest(step):
    inputs = component_of(step).component_spec.inputs
    assert "code_revision" in inputs
    assert ("data_revision" in inputs) == (step not in WITHOUT_DATA)


def test_body_holds_no_logic(step):
    tree = ast.parse((ROOT / step / "component.py").read_text())
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    inner = [node for statement in function.body for node in ast.walk(statement)]
    assert [type(node).__name__ for node in inner if isinstance(node, LOGIC)] == []
    assert len(function.body) <= 5, "docstring, imports, and one block"


def test_body_names_only_what_kfp_gives_it(step):
    """The body is pasted into the pipeline without its module, so it may use its arguments and own imports only."""
    tree = ast.parse((ROOT / step / "component.py").read_text())
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    arguments = {arg.arg for arg in function.args.args}
    inner = [node for statement in function.body for node in ast.walk(statement)]
    imported = {alias.name for node in inner if isinstance(node, ast.ImportFrom) for alias in node.names}
    stored = {node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = {node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert used <= arguments | imported | stored | {"list", "str"}
