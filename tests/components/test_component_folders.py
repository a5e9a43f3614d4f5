"""Every component folder is held to the same: files, image, inputs, documentation, and no logic of its own."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import yaml

import components
from components.image import IMAGE

ROOT = Path(components.__file__).parent
STEPS = sorted(p.name for p in ROOT.iterdir() if (p / "component.py").is_file())
WITHOUT_DATA = {"move_champion"}
LOGIC = (ast.If, ast.For, ast.While, ast.Try, ast.FunctionDef, ast.Lambda, ast.ListComp, ast.DictComp, ast.Raise)


@pytest.fixture(params=STEPS)
def step(request) -> str:
    return request.param


def component_of(step: str):
    return getattr(importlib.import_module(f"components.{step}"), step)


def test_the_chain_is_complete():
    chain = {"build_data", "check_recipe", "distill", "evaluate", "finetune", "register", "resolve_base", "summarize"}
    assert chain | {"move_champion"} == set(STEPS)


def test_folder_holds_the_same_files(step):
    files = {p.name for p in (ROOT / step).iterdir() if p.is_file()}
    assert files == {"__init__.py", "component.py", "metadata.yaml", "README.md"}


def test_metadata(step):
    metadata = yaml.safe_load((ROOT / step / "metadata.yaml").read_text())
    assert set(metadata) == {"name", "stability", "dependencies", "tags"}
    assert metadata["name"] == step
    assert metadata["stability"] in {"alpha", "beta", "stable"}
    assert metadata["dependencies"]["kubeflow"][0]["name"] == "Pipelines"
    assert metadata["tags"]


def test_readme_names_every_input_and_output(step):
    spec = component_of(step).component_spec
    text = (ROOT / step / "README.md").read_text()
    assert text.startswith(f"# {step}\n")
    described = {line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")}
    assert described == {*(spec.inputs or {}), *(spec.outputs or {})}


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
