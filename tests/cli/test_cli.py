"""The command line: what it prints, and one line with exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from danceopd import __version__
from danceopd.cli import main as cli
from danceopd.data.assemble import assemble
from danceopd.data.world import world_records


def run(monkeypatch, capsys, *arguments):
    """Run `danceopd ARGUMENTS`: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["danceopd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version")[:2] == (0, f"danceopd {__version__}\n")


def test_a_dataset_is_built_validated_and_counted(monkeypatch, capsys, tmp_path):
    out = tmp_path / "world"
    settings = ["--set", "data.world={t2i: {train: 3, test: 1}}", "--workspace", tmp_path / "ws", "--out", out]
    code, text, _ = run(monkeypatch, capsys, "data", "build", *settings)
    assert code == 0
    assert "t2i" in text
    code, text, _ = run(monkeypatch, capsys, "data", "validate", out)
    assert (code, "4 records in 2 shards, all valid" in text) == (0, True)
    code, text, _ = run(monkeypatch, capsys, "data", "stats", out)
    assert (code, "train: 3 records in 3 groups that share pictures, 3 distinct prompts" in text) == (0, True)
    assert "cut" not in text
    limit = ["--recipe", "world", "--set", "model.max_sequence_length=8", "--workspace", tmp_path / "ws"]
    code, text, _ = run(monkeypatch, capsys, "data", "stats", out, *limit)
    assert (code, "train: 3 of 3 prompts are cut at 8 tokens" in " ".join(text.split())) == (0, True)


def test_what_lies_on_two_sides_and_what_is_ignored_is_told(monkeypatch, capsys, tmp_path):
    records = list(world_records({"t2i": {"train": 2, "test": 1}}))
    assemble([*records, replace(records[0], id="again", split="test")], tmp_path / "data")
    code, text, _ = run(monkeypatch, capsys, "data", "validate", tmp_path / "data")
    assert code == 0
    assert "on two sides of a split: 0 source(s), 1 target(s)" in text
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(records[0].target)
    (tmp_path / "in" / "a.txt").write_text("a sea")
    (tmp_path / "in" / "notes.md").write_text("x")
    settings = ["--set", "min_side=32", "--out", tmp_path / "import"]
    code, text, _ = run(monkeypatch, capsys, "data", "import", "folder", tmp_path / "in", *settings)
    assert (code, "ignored" in text, "file .md" in text) == (0, True, True)


@pytest.mark.parametrize(
    "command",
    [["data", "build"], ["data", "cache"], ["world", "build-base"], ["data", "import-benchmark", "geneval", "g"]],
)
def test_every_command_leaves_other_peoples_files(monkeypatch, capsys, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    line = {"tag": "x", "include": [], "prompt": "p"}
    (tmp_path / "g").write_text(json.dumps(line))
    monkeypatch.chdir(tmp_path)
    more = ["--task", "t2i"] if "geneval" in command else []
    code, _, err = run(monkeypatch, capsys, *command, "--out", "out", *more)
    assert code == 2
    assert "out: holds notes.txt, and no older output of this command" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]
    if command[0] == "world":
        (tmp_path / "base.json").write_text("mine")
        code, _, err = run(monkeypatch, capsys, *command, "--out", "base")
        assert (code, "base.json: is there already" in err) == (2, True)


@pytest.mark.slow
def test_without_a_home_or_a_language_names_of_any_script_are_read(tmp_path):
    place = tmp_path / "東京 café"
    assemble(world_records({"t2i": {"train": 1, "val": 1}}), place)
    environment = {"PATH": os.environ["PATH"], "LANG": "C", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, "-m", "danceopd", "data", "validate", str(place)]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "東京 café" in (done.stdout + done.stderr).decode().replace("\n", "")


@pytest.mark.parametrize("name", ["loop", "n" * 300, "a\0b"])
@pytest.mark.parametrize(
    "command",
    [
        ["data", "import", "folder", "IT", "--out", "out"],
        ["data", "import-benchmark", "geneval", "IT", "--task", "t2i", "--out", "out"],
        ["data", "validate", "IT"],
        ["data", "build", "--set", "data.world=null", "--set", "data.inputs=[IT]", "--workspace", "ws"],
        ["recipe", "check", "IT"],
        ["study", "IT"],
        ["generate", "IT", "a ring"],
        ["serve", "IT"],
        ["job", "render", "distill", "--out", "IT"],
    ],
)
def test_names_that_no_system_opens_are_one_line(monkeypatch, capsys, tmp_path, command, name):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    code, _, err = run(monkeypatch, capsys, *(part.replace("IT", name) for part in command))
    said = [line for line in err.splitlines() if line.startswith("danceopd: ")]
    assert (code, len(said), "Traceback" in err) == (2, 1, False), err
    assert [p.name for p in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device", "x"), UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), EOFError("cut")],
)
def test_an_error_that_can_be_mended_is_one_line(monkeypatch, capsys, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("danceopd.data.assemble.verify_dataset", failing)
    code, _, err = run(monkeypatch, capsys, "data", "validate", "x")
    assert (code, err.strip().count("\n")) == (2, 0)
    assert err.strip().startswith("danceopd: ")
    code, _, err = run(monkeypatch, capsys, "-v", "data", "validate", "x")
    assert "Traceback" in err  # for who asks


def test_a_bug_stays_a_bug(monkeypatch, capsys):
    def failing(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr("danceopd.data.assemble.verify_dataset", failing)
    monkeypatch.setattr(sys, "argv", ["danceopd", "data", "validate", "x"])
    with pytest.raises(KeyError):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "build", "--recipe", "wrld"], "recipe 'wrld': neither a file nor a shipped recipe"),
        (["distill", "--set", "distill.stps=1"], "distill.stps: no such field"),
        (["data", "validate", "nowhere"], "no manifest.json"),
        (["generate", "nowhere", "a ring"], "nowhere"),
        (["finetune"], "teacher"),
        (["study", "nowhere"], "study 'nowhere': neither a file nor a shipped study; shipped: "),
        (["paint"], "No such command 'paint'"),
        (["generate", "x", "y", "--steps", "0"], "--steps"),
        (["registry", "list"], "no such file; register a student first"),
        (["registry", "promote", "1", "--recipe", "wrld"], "recipe 'wrld': neither a file nor a shipped recipe"),
        (["registry", "demote"], "No such command 'demote'"),
        (["pipeline", "run", "--set", "distill.window=x"], "distill.window"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("danceopd: ")
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_that_cannot_be_one_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    world = ["--set", "data.world={t2i: {train: 1, test: 1}}"]
    for place in ("file", "file/below", "loop", "x" * 300, "a\0b"):
        code, _, err = run(monkeypatch, capsys, "data", "build", *world, "--workspace", tmp_path / place)
        lines = [line for line in err.splitlines() if line.startswith("danceopd: ")]
        assert (code, len(lines), "Traceback" in err) == (2, 1, False), place
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a place that nobody may write to")
def test_a_workspace_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    code, _, told = run(monkeypatch, capsys, "distill", "--workspace", "/sys/danceopd")
    assert code == 2 and len(told.splitlines()) == 1 and told.startswith("danceopd: ") and "/sys/danceopd" in told
