"""Imports point downwards only: pipelines -> components -> danceopd <- benchmarks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "danceopd": {"kfp", "kubernetes", "components", "pipelines", "benchmarks"},
    "components": {"kubernetes", "pipelines", "benchmarks"},
    "pipelines": {"benchmarks"},
    "benchmarks": {"kfp", "kubernetes", "components", "pipelines"},
}


def imports(source: str) -> Iterator[str]:
    """Every module a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(room: str, source: str) -> set[str]:
    return {name for name in imports(source) if name.split(".")[0] in FORBIDDEN[room]}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_room_imports_nothing_from_above(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    assert {str(path): found for path in files if (found := upward(room, path.read_text()))} == {}


@pytest.mark.parametrize(
    "source", ["import kfp.dsl", "def f():\n    from kubernetes import client", "from pipelines import local as here"]
)
def test_the_check_sees_every_form(source):
    assert upward("danceopd", source)
