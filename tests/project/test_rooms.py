"""The house: which rooms there are, and that imports point down its floors, never up and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "danceopd"
FORBIDDEN = {
    "danceopd": {"kfp", "kubernetes", "components", "pipelines", "benchmarks"},
    "components": {"kubernetes", "pipelines", "benchmarks"},
    "pipelines": {"benchmarks"},
    "benchmarks": {"kfp", "kubernetes", "components", "pipelines"},
}
# From the ground up; what stands in one line may not import each other.
FLOORS = (
    "errors",
    "devices launch",
    "text",
    "files",
    "config",
    "backbones",
    "tracking",
    "flow",
    "data",
    "training",
    "methods",
    "evaluation",
    "workspace",
    "distill finetune",
    "preflight",
    "inference",
    "export",
    "registry",
    "serving",
    "steps",
    "pretraining studies",
    "cli",
    "__main__",
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}


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


def modules() -> dict[str, Path]:
    """Every module of the package by its name below it."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def inner_imports(source: str, known: dict[str, Path]) -> set[str]:
    """The package's own modules a source imports, the deepest that each name stands for."""
    names = {name.removeprefix("danceopd.") for name in imports(source) if name.startswith("danceopd.")}
    names |= {name.rpartition(".")[0] for name in names}
    return names & (set(known) - {""})


def climbs(name: str, source: str, known: dict[str, Path]) -> set[str]:
    """What a module imports from its own floor's neighbours or from above."""
    mine = name.split(".")[0]
    others = {found for found in inner_imports(source, known) if found.split(".")[0] != mine}
    return {found for found in others if FLOOR[found.split(".")[0]] >= FLOOR[mine]}


def test_the_root_holds_the_rooms_and_nothing_else():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__"} == set(FLOOR)


def test_imports_point_down_the_floors():
    known = modules()
    found = {name: up for name, path in known.items() if name and (up := climbs(name, path.read_text(), known))}
    assert not found


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    below = {name: inner_imports(path.read_text(), known) - {name} for name, path in known.items() if name}
    # A package's own file only lists what its modules hold, so who imports the package imports none of them for it.
    left = {name: {n for n in names if known[n].name != "__init__.py"} for name, names in below.items()}
    while free := [name for name, names in left.items() if not names & set(left)]:
        for name in free:
            del left[name]
    assert not left, "these import each other in a circle"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("flow.fields", "from danceopd import steps"),
        ("distill", "def f():\n    from danceopd.finetune import finetune"),
    ],
)
def test_the_check_of_floors_sees_every_form(name, source):
    assert climbs(name, source, modules())
