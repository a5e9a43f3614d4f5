"""What the steps import is compiled ahead once, beside the first of them, and never again."""

from __future__ import annotations

import importlib
import sys

import pytest

from pipelines import warming
from pipelines.warming import IMPORTED, LAST, is_compiled, warm_imports


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A machine with two cores on which nothing has been imported; what can be imported there: `first`, `last`."""
    for name in ("first", "last"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(warming, "usable_cores", lambda: 2)
    return tmp_path


def test_it_is_done_once(fresh):
    with warm_imports(("first",), "last") as process:
        assert process.wait(timeout=60) == 0
    assert len(list((fresh / "cache").rglob("first*.pyc"))) == 1
    assert is_compiled("last")
    with warm_imports(("first",), "last") as process:
        assert process is None


def test_what_is_missing_is_no_failure_here(fresh):
    with warm_imports(("no_such_module",), "last") as process:
        assert process.wait(timeout=60) == 1
    assert not is_compiled("last")
    assert is_compiled("no_such_package")


def test_it_ends_with_the_block(fresh):
    (fresh / "first.py").write_text("import time; time.sleep(60)")
    with warm_imports(("first",), "last") as process:
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.parametrize(("name", "value"), [("cores", 1), ("kept", False)])
def test_one_core_and_bytecode_that_is_not_kept_leave_nothing_to_do(fresh, monkeypatch, name, value):
    if name == "cores":
        monkeypatch.setattr(warming, "usable_cores", lambda: value)
    else:
        monkeypatch.setattr(sys, "dont_write_bytecode", not value)
    with warm_imports(("first",), "last") as process:
        assert process is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IMPORTED, LAST])
def test_its_modules_are_there(name):
    assert importlib.import_module(name)
