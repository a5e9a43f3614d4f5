"""`import danceopd`: light, and the dozen names a script needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import danceopd

SLOW = {"torch", "diffusers", "transformers", "pydantic", "numpy", "PIL"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_importing_the_package_imports_nothing_slow():
    loaded = run("import danceopd, sys; danceopd.__version__, dir(danceopd); print(*sys.modules)").split()
    assert not SLOW & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize("name", danceopd.__all__)
def test_every_name_is_there(name):
    found = getattr(danceopd, name)
    assert found == danceopd.__version__ or callable(found)
    assert name in dir(danceopd)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(danceopd.__file__).read_text())
    imports = {
        alias.asname: (node.module.removeprefix("danceopd."), alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    assert imports == danceopd._NAMES
    assert sorted(danceopd.__all__) == sorted(["__version__", *danceopd._NAMES])


def test_a_wrong_name_says_the_right_ones():
    with pytest.raises(AttributeError, match=r"no 'load_bacbone'; it has .*load_backbone"):
        danceopd.load_bacbone  # noqa: B018
    with pytest.raises(ImportError):
        from danceopd import nothing_of_the_kind  # noqa: F401


def test_a_module_is_not_shadowed_by_a_name():
    """`distill` is a module: a function of that name would come and go with the order of imports."""
    rooms = {path.stem for path in Path(danceopd.__file__).parent.iterdir()}
    assert not rooms & set(danceopd._NAMES)
