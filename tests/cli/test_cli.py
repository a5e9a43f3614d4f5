"""The command line: what it prints, and one line with exit code 2 for bad input."""

from __future__ import annotations

import sys

import pytest

from danceopd import __version__
from danceopd.cli import main as cli


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
    assert (code, "train: 3 records, 3 distinct prompts" in text) == (0, True)


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
