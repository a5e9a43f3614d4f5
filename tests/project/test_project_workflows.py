"""The workflows: pinned actions, few rights, no secret in a script, and only commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from pipelines.cli import app

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def steps(file: Path) -> list[dict]:
    return [step for job in yaml.safe_load(file.read_text())["jobs"].values() for step in job["steps"]]


def scripts(file: Path) -> list[str]:
    """What the steps run, each command on one line."""
    return [step["run"].replace("\\\n", " ") for step in steps(file) if "run" in step]


def test_there_is_a_workflow_for_changes_and_one_that_retrains():
    assert [file.stem for file in FILES] == ["ci", "retrain"]
    on = yaml.safe_load(FILES[1].read_text())[True]  # YAML 1.1 reads `on` so
    assert set(on) == {"schedule", "push", "workflow_dispatch"}
    assert on["push"]["paths"] == ["data.dvc"] and len(on["schedule"][0]["cron"].split()) == 5


@every_file
def test_rights_are_few_and_jobs_end(file):
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    assert workflow["defaults"]["run"]["shell"] == "bash"  # with pipefail, which the default has not
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 360 and "permissions" not in job
    for step in steps(file):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@every_file
def test_actions_are_pinned(file):
    lines = [line.strip().removeprefix("- ") for line in file.read_text().splitlines() if "uses:" in line]
    assert lines and all(PINNED.fullmatch(line) for line in lines), lines


@every_file
def test_secrets_and_inputs_reach_scripts_by_environment_only(file):
    for script in scripts(file):
        assert "${{" not in script
    for step in steps(file):
        for name, value in step.get("env", {}).items():
            if re.search("TOKEN|COOKIE|SECRET|PASSWORD|KEY", name):
                assert value == f"${{{{ secrets.{name} }}}}"
    assert "pull_request_target" not in file.read_text()


@every_file
def test_every_command_exists(file):
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    found = 0
    for script in scripts(file):
        for target in re.findall(r"^make (\S+)", script, flags=re.MULTILINE):
            assert target in phony
            found += 1
        for path in re.findall(r"\btests/\S+", script):
            assert (ROOT / path).is_file(), path
        for name, rest in re.findall(r" pipeline (\w+) ([^|]*)", script):
            known = {o for parameter in command(name).params for o in (*parameter.opts, *parameter.secondary_opts)}
            assert set(re.findall(r"(?<![\w-])--[a-z-]+", rest)) <= known
            found += 1
    assert found


def command(name: str):
    return typer.main.get_command(app).commands[name]


def test_retraining_starts_only_if_something_changed():
    [script] = [script for script in scripts(FILES[1]) if " pipeline run " in script]
    assert "--if-changed" in script and "--follow" in script
