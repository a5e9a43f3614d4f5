"""What no file of the tree may hold."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Someone's own folders. Put together here, so that this file does not name them itself.
PRIVATE = re.compile(r"(?<![\w.~/-])/(?:" + "|".join(["work", "root", r"home/\w+", r"Users/\w+"]) + ")/")


def tree_files() -> list[Path]:
    """Every file that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def private_paths(text: str) -> list[str]:
    return [text[max(0, m.start() - 20) : m.end() + 20] for m in PRIVATE.finditer(text)]


def test_no_file_names_a_folder_of_one_machine():
    found = {}
    for path in tree_files():
        data = path.read_bytes()
        if b"\0" not in data[:4096] and (hits := private_paths(data.decode(errors="ignore"))):
            found[path.relative_to(ROOT).as_posix()] = hits
    assert not found


@pytest.mark.parametrize("name", ["work", "root", "home/me", "Users/me"])
def test_the_search_finds_such_a_folder(name):
    assert private_paths(f"look in '/{name}/x'")
    assert not private_paths(f"a frame{name}/x, https://example.com/{name}/x, /workspace/x")


def test_nothing_a_run_writes_would_be_committed():
    if shutil.which("git") is None:
        pytest.skip("needs git")
    written = [".venv/x", "runs/world/x", "data/train.parquet", "danceopd/__pycache__/x.pyc", "danceopd.egg-info/x"]
    command = ["git", "check-ignore", "--no-index", *written]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("needs a git checkout")
    assert done.stdout.split() == written


def test_benchmarks_have_a_guide_and_results_for_every_script():
    folder = ROOT / "benchmarks"
    guide, results = ((folder / name).read_text() for name in ("README.md", "RESULTS.md"))
    scripts = sorted(p.stem for p in folder.glob("*.py") if '__name__ == "__main__"' in p.read_text())
    scripts = [name for name in scripts if name != "__main__" and not name.endswith("_worker")]
    assert len(scripts) >= 5
    assert not [name for name in scripts if f"`{name}.py`" not in guide], "not in benchmarks/README.md"
    assert not [name for name in scripts if f"`{name}.py`" not in results], "no results in benchmarks/RESULTS.md"


def test_no_file_of_the_tree_is_large():
    large = [p.relative_to(ROOT).as_posix() for p in tree_files() if p.stat().st_size > 6 * 2**20]
    assert not large, f"over 6 MB; data goes to DVC, weights to a hub: {large}"
