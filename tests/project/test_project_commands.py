"""The README's two commands are what the Makefile and continuous integration run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READY = ".venv/.ready"
COMMANDS = ("make run", "make test")


def readme_commands(text: str) -> list[str]:
    """The lines of the README's fenced shell blocks, without comments and prompts."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.split(" #")[0].removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def dry_run(*arguments: str, **environment: str) -> list[str]:
    """What `make` would run, one command a line, nothing run. `-o` takes the environment for ready."""
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=ROOT, env=clean | environment, check=True, capture_output=True, text=True)
    return done.stdout.replace("\\\n", " ").splitlines()


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def test_readme_opens_with_the_two_commands():
    commands = readme_commands((ROOT / "README.md").read_text())
    assert tuple(c for c in commands if c in COMMANDS)[:2] == COMMANDS
    unknown = [c for c in commands if c.startswith("make ") and c.split()[1] not in makefile_targets()]
    assert not unknown, f"the README names make targets that do not exist: {unknown}"


def makefile_targets() -> set[str]:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    return set(phony[1].split())


def test_every_phony_target_has_a_rule():
    text = (ROOT / "Makefile").read_text()
    for target in makefile_targets():
        assert re.search(rf"^{target}:", text, flags=re.MULTILINE), target


@needs_make
def test_make_run_runs_the_pipeline():
    assert dry_run("-o", READY, "run") == [".venv/bin/danceopd pipeline run --recipe world"]


@needs_make
def test_make_test_checks_and_tests_everything():
    commands = dry_run("-o", READY, "test")
    assert commands[:3] == [".venv/bin/ruff check .", ".venv/bin/ruff format --check .", ".venv/bin/mypy"]
    assert len(commands) == 4 and commands[3].endswith("-m pytest -n 2")


@needs_make
def test_make_unit_leaves_out_what_is_slow():
    assert dry_run("-o", READY, "unit")[0].endswith('-m pytest -n 2 -m "not slow"')


@needs_make
def test_both_commands_make_their_environment_from_the_constraints():
    for target in ("run", "test"):
        install = " ".join(dry_run("-W", "pyproject.toml", target))
        assert "-m venv .venv" in install
        assert "--constraint constraints.txt" in install and '--editable ".[dev]"' in install


@needs_make
def test_make_ignores_an_environment_that_is_active():
    everything = dry_run("-o", READY, "run", VIRTUAL_ENV="/elsewhere", PYTHONPATH="/elsewhere")
    assert "/elsewhere" not in " ".join(everything)
    unexported = re.search(r"^unexport (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    assert {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"} <= set(unexported)


@needs_make
def test_an_old_python_is_refused_in_one_line(tmp_path):
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", f"PYTHON={old}", "test"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer; name one by PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_the_image_has_the_name_the_components_use():
    from components.image import IMAGE

    assert f"--tag {IMAGE}" in dry_run("image")[0]
    assert (
        "--build-arg TORCH_INDEX=https://example.com/whl" in dry_run("image", "TORCH_INDEX=https://example.com/whl")[0]
    )


def test_ci_runs_the_test_command_and_stops_at_an_error():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert lines[-1] == "make test"
    assert not [line for line in lines[1:-1] if not line.startswith("cd ")], "make test is all it runs"
