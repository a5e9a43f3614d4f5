"""`danceopd pipeline`: the table a run ends with, one-line errors, exit codes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from pipelines import local
from pipelines.cli import app
from pipelines.summary import registration_line, retention, summary_table

METRICS = {
    "recipe": "world",
    "split": "test",
    "units": {"hit": "rate", "out": "dB", "ssim": "index"},
    "teacher_of": {"t2i": "base", "edit": "local"},
    "ceiling": {"t2i": {}, "edit": {"out": 33.25}},
    "scores": {
        "base": {"t2i": {"hit": 0.97}, "edit": {"hit": 0.01, "out": 9.5, "ssim": None}},
        "local": {"t2i": {"hit": 0.2}, "edit": {"hit": 0.99, "out": 31.0, "ssim": 0.9}},
        "student": {"t2i": {"hit": 0.95}, "edit": {"hit": 0.5, "out": 29.5, "ssim": 0.88}},
    },
    "retention": {
        "t2i": {"hit": {"teacher": 0.97, "student": 0.95, "ratio": 0.979, "difference": -0.02}},
        "edit": {
            "hit": {"teacher": 0.99, "student": 0.5, "ratio": 0.505, "difference": -0.49},
            "out": {"teacher": 31.0, "student": 29.5, "ratio": 0.95, "difference": -1.5},
            "ssim": {"teacher": 0.9, "student": 0.88, "ratio": None, "difference": None},
        },
    },
    "gates": [
        {"task": "t2i", "metric": "hit", "rule": "retain 0.95", "limit": 0.92, "value": 0.95, "passed": True},
        {"task": "edit", "metric": "hit", "rule": "retain 0.95", "limit": 0.94, "value": 0.5, "passed": False},
    ],
    "passed": False,
}
REGISTERED = {"registered": True, "version": "3", "alias": ["challenger", "champion"], "reasons": []}
REFUSED = {"registered": False, "version": None, "alias": [], "reasons": ["edit.hit is 0.5, its gate is 0.94"]}


def rows(registration: dict, metrics: dict = METRICS) -> list[str]:
    """The table's lines, each run of spaces as one."""
    out = io.StringIO()
    Console(file=out, width=110).print(summary_table(metrics, registration))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_the_table_has_a_row_a_task_and_metric_each_in_its_unit():
    table = rows(REGISTERED)
    assert "t2i hit 97.0 % 97.0 % 95.0 % 97.9 % - holds" in table
    assert "edit hit 1.0 % 99.0 % 50.0 % 50.5 % - fails" in table
    assert "out 9.5 dB 31.0 dB 29.5 dB -1.5 dB 33.2 dB" in table
    assert "ssim - 0.900 0.880 - -" in table
    assert "(taught by local)" in table


def test_a_metric_that_was_not_measured_says_so():
    unmeasured = METRICS | {"skipped": {"ssim": "no such file"}}
    assert "(not measured)" in rows(REGISTERED, unmeasured) and "(not measured)" not in rows(REGISTERED)


def test_of_a_distance_the_difference_is_kept():
    entry = {"teacher": -0.25, "student": -0.375, "ratio": None, "difference": -0.125}
    assert retention(entry, "distance") == "-0.125" and retention(entry, "dB") == "-0.1 dB"
    assert retention(entry | {"difference": None}, "distance") == retention(entry, "index") == "-"


@pytest.mark.parametrize(
    ("registration", "line"),
    [
        (REGISTERED, "registered as version 3 (challenger, champion)"),
        (REFUSED, "not registered: edit.hit is 0.5, its gate is 0.94"),
        (
            REGISTERED | {"alias": ["challenger"], "reasons": ["worse than the champion"]},
            "registered as version 3 (challenger): worse than the champion",
        ),
        (REGISTERED | {"alias": []}, "registered as version 3 (no alias)"),
    ],
)
def test_the_registration_in_one_line(registration, line):
    assert registration_line(registration) == line
    assert line in rows(registration)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nope"], "recipe 'nope': neither a file nor a shipped recipe"),
        (["--set", "nme=1"], "nme: no such field"),
        (["--set", "seed"], "write it as key.sub=value"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    result = invoke("run", "--workspace", str(tmp_path / "ws"), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "ws").exists()


def test_a_failed_step_is_exit_code_1(monkeypatch):
    def fail(recipe, workspace, fresh):
        raise local.StepFailed("finetune a: bad\nfinetune b: worse")

    monkeypatch.setattr(local, "run_local", fail)
    result = invoke("run")
    assert result.exit_code == 1
    assert result.stderr == "danceopd: finetune a: bad\ndanceopd: finetune b: worse\n"


def test_a_run_ends_with_the_table_and_where_the_report_lies(monkeypatch, tmp_path):
    seen = []

    def succeed(recipe, workspace, fresh):
        seen.append((recipe.seed, workspace, fresh))
        return local.Summary(METRICS, REGISTERED, [], tmp_path / "report.html", tmp_path)

    monkeypatch.setattr(local, "run_local", succeed)
    result = invoke("run", "--set", "seed=5", "--fresh")
    assert result.exit_code == 0
    assert seen == [(5, Path("runs/world"), True)]
    assert "registered as version 3" in result.stdout
    assert f"report   {tmp_path / 'report.html'}\n" in result.stdout


def test_a_student_that_fails_a_gate_is_exit_code_4_and_says_what_to_try(monkeypatch, tmp_path):
    lacks = ["edit hit: 50.0 %, 44.0 points short of its gate", "try: more training, --set distill.steps=1500"]
    outcome = local.Summary(METRICS, REFUSED, lacks, tmp_path / "report.html", tmp_path)
    monkeypatch.setattr(local, "run_local", lambda recipe, workspace, fresh: outcome)
    result = invoke("run")
    assert result.exit_code == 4
    assert "not registered" in result.stdout and "report.html" in result.stdout
    assert result.stderr == "".join(f"danceopd: {line}\n" for line in lacks)


def test_compile_writes_the_yaml(tmp_path):
    out, placement = tmp_path / "sub" / "p.yaml", tmp_path / "placement.yaml"
    placement.write_text("claim: volume\ngpus: 4\ngpu: {accelerator: amd.com/gpu}\n")
    result = invoke("compile", "--out", str(out), "--image", "example.com/d:1", "--placement", str(placement))
    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1 and "image example.com/d:1: a tag can be moved" in result.stderr
    text = out.read_text()
    assert "image: example.com/d:1" in text and "constant: volume" in text
    assert text.count("resourceType: amd.com/gpu") == 3


def test_compile_writes_objects_for_kubectl(tmp_path):
    arguments = ("compile", "--out", str(tmp_path / "p.yaml"), "--kubernetes-manifests", "--namespace", "team")
    assert invoke(*arguments, "--version", "v1").exit_code == 0
    pipeline, version = yaml.safe_load_all((tmp_path / "p.yaml").read_text())
    assert pipeline["metadata"] == {"name": "danceopd", "namespace": "team"}
    assert version["metadata"] == {"name": "v1", "namespace": "team"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", ""], "pipeline image: empty"),
        (["--image", "example.com:5000/d:latest"], "'latest' is another image tomorrow"),
        (["--image", "example.com:5000/d"], "'latest' is another image tomorrow"),
        (["--out", "p.txt"], "p.txt: ends in none of .yaml, .yml"),
        (["--image", "Example.com/My App:1"], "no image name; write [registry/]name[:tag][@digest]"),
        (["--image", "example.com/Danceopd:1"], "no image name"),
        (["--image", "example.com//d:1"], "no image name"),
        (["--placement", "nowhere"], "placement 'nowhere': neither a file nor a shipped placement; shipped: gke-h100"),
        (["--namespace", "a"], "add --kubernetes-manifests"),
        (["--kubernetes-manifests", "--version", "V 1"], "version 'V 1': lower case letters"),
    ],
)
def test_compile_refuses_bad_options(arguments, message):
    result = invoke("compile", *arguments)
    assert result.exit_code == 2 and result.stderr.startswith("danceopd: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
