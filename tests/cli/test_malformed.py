"""Malformed inputs of every reader, generated with fixed seeds: each ends in one line and code 2, and leaves no file.

Text that people write (recipes, studies, placements, import settings, lists of pictures and prompts, benchmarks, values
of `--set`) is spoilt in every way the reports of other tools know; Parquet and tar files have bytes overturned.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import random
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danceopd.cli import main as cli
from danceopd.data.world import world_records

LONGEST = 60  # seconds; a reader that hangs is a failure, not a wait
RECIPE = """
name: café
model: {base: world, height: 64, width: 64}
data: {world: {t2i: {train: 3, test: 1}}}
tasks: {t2i: {teacher: base, needs_source: false, metrics: [psnr]}}
teachers: {base: {kind: base}}
distill: {lr: 1.0e-3, steps: 1, batch: 2}
register_as: {model: café}
"""
STUDY = """
name: tiny
recipe: world
seeds: [0]
budget: {steps: 1}
records: 2
variants: {one: {set: [distill.lr=0.1]}}
set: [register_as.license=café]
"""
LINE = {"task": "t2i", "prompt": "a café", "file_name": "a.png", "text": "a café"}
GENEVAL = {"tag": "single", "include": [{"class": "café", "count": 1}], "prompt": "a café"}
IMGEDIT = {"1": {"id": "a.png", "prompt": "a café", "edit_type": "style"}}


def json_text(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def spoilt_encodings(text: str) -> dict[str, bytes]:
    rng = random.Random(text)
    return {
        "latin-1": text.encode("latin-1", "replace"),
        "cp1252": (text + " “").encode("cp1252", "replace"),
        "utf-16": text.encode("utf-16"),
        "utf-16 without a mark": text.encode("utf-16-le"),
        "utf-32": text.encode("utf-32"),
        "a NUL": text.encode().replace(b"a", b"\0", 1),
        "half a character": text.encode() + b"\xf0\x9f\x8e",
        "noise": bytes(rng.randrange(256) for _ in range(200)) + b"\xff",
    }


def spoilt_yaml(text: str) -> dict[str, bytes]:
    first = text.strip().splitlines()[0]
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
        for name, before in zip("bcdefgh", "abcdefg", strict=True)
    )
    more = {
        "nothing": "",
        "a list": "- a\n- b",
        "a word": "word",
        "cut short": text + "\nx: [1, {",
        "a key twice": f"{text}\n{first}",
        "octal": text + "\nx: 0100",
        "base 60": text + "\nx: 10:00",
        "a bomb of aliases": bomb,
        "a circle": "a: &a {b: *a}",
        "depth": "x: " + "[" * 300,
        "a tab": "\tx: 1",
        "an object of Python's": "x: !!python/object/apply:os.system [true]",
        "a control character": text + "\nx: \x07",
        "no such day": "x: 2024-02-31",
        "a field too many": text + "\nx: 1",
        "two documents": f"{text}\n---\n{text}",
    }
    return spoilt_encodings(text) | {name: content.encode() for name, content in more.items()}


def spoilt_json(value) -> dict[str, bytes]:
    text = json_text(value)
    more = {
        "cut short": text[: len(text) // 2],
        "a key twice": text[:-1] + ', "prompt": "x", "prompt": "y"}',
        "half a surrogate": text[:-1] + ', "x": "\\ud83c"}',
        "depth": text[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}",
        "a long number": text[:-1] + f', "x": {"9" * 5000}}}',
        "a list": "[1]",
        "quotes of Python's": text.replace('"', "'"),
        "a comment": "// x\n" + text if len(text) < 60 else text + " // x",
    }
    return spoilt_encodings(text) | {name: content.encode() for name, content in more.items()}


def spoilt_csv(text: str) -> dict[str, bytes]:
    names, row = text.splitlines()
    more = {
        "nothing": "",
        "a name twice": f"{names},prompt,prompt\n{row},x,y\n",
        "a name too few": f"{names},\n{row},x\n",
        "too many cells": f"{names}\n{row},x\n",
        "an open quote": f'{names}\n"{row}\n',
    }
    return spoilt_encodings(text) | {name: content.encode() for name, content in more.items()}


Reader = tuple[dict[str, bytes], Callable[[Path, bytes], list[str]]]


def write(place: Path, data: bytes) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return place


def picture_folder(name: str) -> Callable[[Path, bytes], Path]:
    def make(home: Path, data: bytes) -> Path:
        write(home / "in" / name, data)
        write(home / "in" / "a.png", next(iter(world_records({"t2i": {"train": 1}}))).target)
        return home / "in"

    return make


def student(home: Path) -> Path:
    return write(home / "student" / "danceopd.json", b'{"height": 64, "width": 64}').parent


def build(place: Path, home: Path) -> list[str]:
    data = json.dumps({"inputs": [str(place)]})
    return ["data", "build", "--set", f"data={data}", "--out", str(home / "out"), "--workspace", str(home / "ws")]


listed, table = picture_folder("metadata.jsonl"), picture_folder("metadata.csv")
CSV = "file_name,text\na.png,a café"
READERS: dict[str, Reader] = {
    "recipe": (spoilt_yaml(RECIPE), lambda home, data: ["recipe", "check", str(write(home / "r.yaml", data))]),
    "study": (spoilt_yaml(STUDY), lambda home, data: ["study", str(write(home / "s.yaml", data))]),
    "placement": (
        spoilt_yaml("claim: null\nqueue: café"),
        lambda home, data: [
            *("pipeline", "compile", "--placement", str(write(home / "p.yaml", data))),
            *("--out", str(home / "out.yaml")),
        ],
    ),
    "import settings": (
        spoilt_yaml("layout: folder\nlicense: café"),
        lambda home, data: ["data", "import", "--spec", str(write(home / "i.yaml", data)), "--out", str(home / "out")],
    ),
    "--set": (
        {n: d for n, d in spoilt_yaml("[café").items() if b"\0" not in d and n not in ("nothing", "a word")},
        lambda home, data: [
            "recipe",
            "check",
            "world",
            "--set",
            "distill.lr=" + data.decode("utf-8", "surrogateescape"),
        ],
    ),
    "metadata.jsonl of a folder": (
        spoilt_json(LINE | {"file_name": "gone.png"}),
        lambda home, data: ["data", "import", "folder", str(listed(home, data)), "--out", str(home / "out")],
    ),
    "metadata.csv of a folder": (
        spoilt_csv(CSV.replace("a.png", "gone.png")),
        lambda home, data: ["data", "import", "folder", str(table(home, data)), "--out", str(home / "out")],
    ),
    "metadata.jsonl of an input": (spoilt_json(LINE), lambda home, data: build(listed(home, data), home)),
    "metadata.csv of an input": (
        spoilt_csv("task,prompt\nt2i,a café"),
        lambda home, data: build(table(home, data), home),
    ),
    "batch file": (
        spoilt_json({"prompt": "a café"}),
        lambda home, data: ["generate", str(student(home)), "--prompts", str(write(home / "b.jsonl", data))],
    ),
    "batch table": (
        spoilt_csv("prompt,name\na café,x"),
        lambda home, data: ["generate", str(student(home)), "--prompts", str(write(home / "b.csv", data))],
    ),
    "geneval": (
        spoilt_json(GENEVAL),
        lambda home, data: [
            *("data", "import-benchmark", "geneval", str(write(home / "g.jsonl", data))),
            *("--task", "t2i", "--out", str(home / "out")),
        ],
    ),
    "imgedit": (
        spoilt_json(IMGEDIT) | {"an entry that is none": b'{"1": 2}'},
        lambda home, data: [
            *("data", "import-benchmark", "imgedit", str(write(home / "i.json", data))),
            *("--task", "edit", "--out", str(home / "out")),
        ],
    ),
    "job manifest": (
        {n: d for n, d in spoilt_yaml("kind: Job\nmetadata: {name: café}").items() if n != "a field too many"},
        lambda home, data: ["job", "submit", str(write(home / "j.yaml", data)), "--only", "x"],
    ),
}
CASES = [(reader, how) for reader, (spoilt, _) in READERS.items() for how in spoilt]


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """What the commands import, before a clock runs."""
    for module in (
        "danceopd.studies.run",
        "danceopd.inference.batch_files",
        "pipelines.compile",
        "pipelines.cluster.cli",
    ):
        importlib.import_module(module)
    cli.root_command()


class Hung(BaseException):
    """A reader took too long."""


def run(monkeypatch, capsys, home: Path, arguments: list[str]) -> tuple[int, str, set[str]]:
    """Exit code, stderr and new files of a command."""

    def ring(*_):
        raise Hung

    monkeypatch.chdir(home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["danceopd", *arguments])
    # A command sets logging up anew, for this test's stderr.
    monkeypatch.setattr(logging.getLogger(), "handlers", list(logging.getLogger().handlers))
    before = {str(p) for p in home.rglob("*")}
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(LONGEST)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        signal.alarm(0)
    return stop.value.code, capsys.readouterr().err, {str(p) for p in home.rglob("*")} - before


def check(code: int, err: str, made: set[str]) -> None:
    assert code == 2, err
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("danceopd: ")] == err.splitlines()[-1:], err
    assert len(err.splitlines()[-1]) < 2000
    assert made == set()


def test_there_are_enough_of_them():
    assert len(CASES) > 200
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize(("reader", "how"), CASES)
def test_malformed_text_is_one_line(tmp_path, monkeypatch, capsys, reader, how):
    spoilt, command = READERS[reader]
    check(*run(monkeypatch, capsys, tmp_path, command(tmp_path, spoilt[how])))


def parquet() -> bytes:
    rows = [
        {"id": str(n), "task": "t2i", "prompt": f"p{n}", "source": None, "target": {"bytes": r.target, "path": None}}
        for n, r in enumerate(world_records({"t2i": {"train": 4}}))
    ]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=2)
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for number, record in enumerate(world_records({"t2i": {"train": 4}})):
            for name, data in ((f"{number}.png", record.target), (f"{number}.txt", record.prompt.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return out.getvalue()


def overturn(data: bytes, seed: int) -> bytes:
    """Some bytes changed, cut off or doubled."""
    rng, spoilt = random.Random(seed), bytearray(data)
    for _ in range(rng.choice([1, 8, 64])):
        spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
    cut = rng.randrange(len(spoilt))
    return bytes([spoilt, spoilt[:cut], spoilt[cut:], spoilt[:cut] * 2][rng.randrange(4)])


ARCHIVES = {
    "an input of Parquet": (parquet, "r.parquet", lambda place, home: build(place, home)),
    "an import of tar": (
        tar,
        "a.tar.gz",
        lambda place, home: ["data", "import", "webdataset", str(place), "--out", str(home / "out")],
    ),
}


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_with_overturned_bytes_is_whole_or_one_line(tmp_path, monkeypatch, capsys, kind, seed):
    make, name, command = ARCHIVES[kind]
    place = write(tmp_path / name, overturn(make(), seed))
    code, err, made = run(monkeypatch, capsys, tmp_path, command(place, tmp_path))
    assert "Traceback" not in err
    if code != 0:  # a byte that nothing depends on may be another
        check(code, err, made)
