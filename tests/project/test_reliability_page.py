"""The page of odd inputs and situations names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
NAMED = re.findall(r"`([a-z_/]*test_[a-z_0-9]+\.py)(?:::(test_\w+))?", PAGE.read_text(encoding="utf-8"))


def test_every_row_of_the_page_names_a_test():
    rows = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "---" not in line
    ]
    heads = [line for line in rows if line.endswith("| test |")]
    assert len(heads) >= 3
    assert [line for line in rows if "test_" not in line and "cli/" not in line and line not in heads] == []


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_the_tests_exist(file, name):
    found = [path for path in TESTS.rglob(Path(file).name) if path.as_posix().endswith(file)]
    assert len(found) == 1
    if name:
        assert f"def {name}(" in found[0].read_text(encoding="utf-8")
