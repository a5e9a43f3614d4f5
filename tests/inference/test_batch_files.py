"""Batch files: every accepted form of a row, and file, line and field of every other, all at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from danceopd.errors import UserError
from danceopd.inference.batch_files import read_rows


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    return tmp_path


def write(folder: Path, text: str | bytes, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


FULL = {
    "prompt": "mix",
    "source": ["in/a.png", "in/b.png"],
    "seed": 7,
    "steps": 3,
    "guidance": 2.5,
    "size": "96x32",
    "name": "mixed.png",
}


def test_jsonl_and_csv_say_the_same(folder):
    lines = write(folder, "\ufeff" + json.dumps(FULL) + "\n\n" + json.dumps({"prompt": 'a "ring", blue', "seed": None}))
    table = write(
        folder,
        "prompt,source,seed,steps,guidance,size,name\r\n"
        'mix,in/a.png; in/b.png,7,3,2.5,96x32,mixed\r\n"a ""ring"", blue",,,,,,\r\n',
        "p.csv",
    )
    first, second = read_rows(lines)
    assert first.sources == (folder / "in/a.png", folder / "in/b.png")
    assert (first.seed, first.steps, first.guidance, first.size, first.name) == (7, 3, 2.5, (32, 96), "mixed")
    assert (second.prompt, second.sources, second.seed, second.name) == ('a "ring", blue', (), None, None)
    assert [vars(r) | {"where": ""} for r in read_rows(table)] == [vars(r) | {"where": ""} for r in (first, second)]
    assert [row.where for row in (first, second)] == [f"{lines}, line 1", f"{lines}, line 3"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": " "}, "field 'prompt': the prompt is empty"),
        ({"prompt": "a \ud800"}, "holds half a character"),
        ({"prompt": None}, "field 'prompt': missing"),
        ({"prompt": 5}, "field 'prompt': the prompt is int, not text"),
        ({"source": "in/gone.png"}, "field 'source': .*gone.png: no such image file"),
        ({"source": "in/broken.png"}, "field 'source': .*broken.png: not a readable image"),
        ({"source": [1]}, "field 'source': .*give the path of a picture"),
        ({"seed": -1}, "field 'seed': -1; give a whole number from 0"),
        ({"seed": 1.5}, "field 'seed': 1.5; give a whole number"),
        ({"seed": True}, "field 'seed': True; give a whole number"),
        ({"seed": float("nan")}, "field 'seed': nan; give a whole number"),
        ({"steps": 0}, "field 'steps': 0; give a whole number from 1"),
        ({"steps": "many"}, "field 'steps': 'many'; give"),
        ({"guidance": 0.5}, "field 'guidance': 0.5; give a number from 1"),
        ({"guidance": float("inf")}, "field 'guidance': inf; give a number"),
        ({"size": "96"}, "field 'size': '96' is no size"),
        ({"name": "../x"}, "field 'name': '../x'; use letters"),
        ({"name": ".hidden"}, "field 'name'"),
        ({"colour": "red"}, "field 'colour' is not known; fields are: prompt, source, seed"),
    ],
)
def test_a_bad_field_is_named_with_its_line(folder, change, words):
    path = write(folder, json.dumps({"prompt": "a"}) + "\n" + json.dumps(FULL | change))
    with pytest.raises(UserError, match=f"p.jsonl, line 2, {words}|p.jsonl, line 2: {words}"):
        read_rows(path)


def test_all_bad_rows_are_told_at_once_and_many_are_counted(folder):
    bad = [
        {"prompt": "a", "seed": -1, "steps": 0},
        {"seed": 1},
        {"prompt": "b", "name": "x"},
        {"prompt": "c", "name": "X"},
    ]
    with pytest.raises(UserError) as told:
        read_rows(write(folder, "\n".join([*map(json.dumps, bad), "{", "[]", '{"prompt": ""}'])))
    text = str(told.value)
    for words in (
        "line 1, field 'seed'",
        "line 1, field 'steps'",
        "line 2, field 'prompt'",
        "line 5: not valid JSON",
        "line 6: not a JSON object",
        "; and 2 more",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.jsonl", "", "no rows"),
        ("p.txt", "a ring", "a batch file is one of .jsonl, .ndjson, .csv"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}', "line 2: not UTF-8"),
        ("p.csv", "prompt,colour\na,b\n", "line 1: column 'colour' is not known; columns are: prompt"),
        ("p.csv", "prompt,seed\na,1,2\n", "line 2: 3 cells, the first line names 2"),
        ("p.csv", "prompt,seed\na\n", "line 2: 1 cells, the first line names 2"),
        ("p.csv", 'prompt\n"a\n', "not CSV"),
        ("p.csv", "seed\n1\n", "line 2, field 'prompt': missing"),
        (
            "p.jsonl",
            '{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "X"}',
            "line 2, field 'name': 'X' is taken by",
        ),
    ],
)
def test_a_bad_file_is_refused(folder, name, text, words):
    with pytest.raises(UserError, match=words):
        read_rows(write(folder, text, name))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        read_rows(tmp_path / "none.csv")
