"""Benchmarks' files, small ones of the same layout, as records and as a dataset folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from danceopd.cli.main import app
from danceopd.data.assemble import open_dataset
from danceopd.data.png import encode_png
from danceopd.errors import UserError
from danceopd.evaluation.benchmark_sets import Asked, import_benchmark

PICTURE = encode_png(np.full((12, 16, 3), 90, np.uint8))
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "bus", "count": 3}],
        "exclude": [{"class": "bus", "count": 4}],
        "prompt": "a photo of three buses",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a dog",
    },
]
IMGEDIT = {
    "1082": {"id": "animal/1.png", "prompt": "Change the shell's texture.", "edit_type": "alter"},
    "7": {"id": "animal/1.png", "prompt": "Remove the tortoise."},
}


def gedit_rows() -> list[dict]:
    row = {"task_type": "color_alter", "Intersection_exist": True, "input_image_raw": {"bytes": b"raw", "path": None}}
    return [
        row
        | {
            "key": f"k{i}",
            "instruction": f"{text} {i}",
            "instruction_language": language,
            "input_image": {"bytes": PICTURE, "path": f"{i}.png"},
        }
        for i in range(20)
        for language, text in (("en", "make it red"), ("cn", "变红"))
    ]


def write_gedit(folder: Path, rows: list[dict], form: str) -> Path:
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    if form == "parquet":
        pq.write_table(table, folder / "train-00000-of-00001.parquet")
    else:  # as datasets' save_to_disk does
        path = str(folder / "data-00000-of-00001.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        (folder / "state.json").write_text("{}")
    return folder


def imported(name: str, asked: Asked, out: Path) -> list:
    import_benchmark(name, asked, out)
    return open_dataset(out).records("test")


def test_geneval_keeps_order_tags_and_objects(tmp_path):
    prompts = tmp_path / "geneval" / "prompts"
    prompts.mkdir(parents=True)
    (prompts / "evaluation_metadata.jsonl").write_text("\n\n".join(map(json.dumps, GENEVAL)) + "\n")
    found = imported("geneval", Asked(tmp_path / "geneval", "t2i"), tmp_path / "out")
    assert [r.id for r in found] == ["geneval-00000", "geneval-00001", "geneval-00002"]
    assert [r.prompt for r in found] == [row["prompt"] for row in GENEVAL]
    assert all((r.task, r.split, r.source, r.target) == ("t2i", "test", None, None) for r in found)
    assert found[1].facts() == {
        "benchmark": "geneval",
        "kind": "counting",
        **{k: GENEVAL[1][k] for k in ("include", "exclude")},
    }


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_gedit_is_read_in_one_language_from_either_form(tmp_path, form):
    folder = write_gedit(tmp_path / "gedit", gedit_rows(), form)
    found = imported("gedit", Asked(folder, "edit"), tmp_path / "out")
    assert len(found) == 20 and {r.source for r in found} == {PICTURE}
    first = next(r for r in found if r.id == "gedit-en-k0")
    assert first.prompt == "make it red 0"
    assert first.facts() == {"benchmark": "gedit", "kind": "color_alter", "language": "en", "intersection": True}
    chinese = imported("gedit", Asked(folder, "edit", language="cn"), tmp_path / "cn")
    assert {r.prompt for r in chinese} == {f"变红 {i}" for i in range(20)}


@pytest.mark.parametrize("apart", [False, True])
def test_imgedit_finds_its_pictures_beside_or_apart(tmp_path, apart):
    folder, images = tmp_path / "b", tmp_path / ("pictures" if apart else "b")
    (images / "animal").mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    (images / "animal/1.png").write_bytes(PICTURE)
    (folder / "basic_edit.json").write_text(json.dumps(IMGEDIT))
    found = imported("imgedit", Asked(folder, "edit", images if apart else None), tmp_path / "out")
    assert {r.id: r.prompt for r in found} == {f"imgedit-{k}": v["prompt"] for k, v in IMGEDIT.items()}
    kinds = {r.id: r.facts().get("kind") for r in found}
    assert kinds == {"imgedit-1082": "alter", "imgedit-7": None} and found[0].source == PICTURE


def test_the_command_says_what_it_wrote(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(GENEVAL[0]))
    call = ["data", "import-benchmark", "geneval", str(tmp_path / "p.jsonl"), "--task", "t2i"]
    result = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "out: 1 records  content " in result.output


# --- what is wrong, in one line ---


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "line 1: not valid JSON"),
        ("[]", "line 1: not a JSON object"),
        (json.dumps(GENEVAL[0]) + '\n{"tag": "counting", "include": []}', "line 2: 'prompt' is null; it must be text"),
        ('{"include": [], "prompt": "p"}', "line 1: 'tag' is null"),
        ('{"tag": "t", "prompt": "p"}', "line 1: 'include' must be a list of objects"),
        ('{"tag": "t", "include": [{"count": 1}], "prompt": "p"}', "'include' must be a list"),
        ("", "no records"),
    ],
)
def test_a_geneval_line_that_is_wrong_is_named(tmp_path, text, said):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(text)
    refused("geneval", Asked(tmp_path, "t2i"), tmp_path, said)


def refused(name: str, asked: Asked, folder: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        import_benchmark(name, asked, folder / "out")
    assert "\n" not in str(error.value) and not (folder / "out").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"instruction": "  "}, "row 0: 'instruction' is"),
        ({"key": None}, "row 0: 'key' is null"),
        ({"task_type": None}, "row 0: 'task_type' is null"),
        ({"input_image": {"bytes": None, "path": "1.png"}}, "row 0: 'input_image' holds no picture's bytes"),
        ({"input_image": {"bytes": b"not one", "path": None}}, "'gedit-en-k0', field 'source': not a readable image"),
        ({"instruction_language": "fr"}, r"no instruction in language 'en'; there are: fr"),
    ],
)
def test_a_gedit_row_that_is_wrong_is_named(tmp_path, change, said):
    folder = write_gedit(tmp_path / "g", [gedit_rows()[0] | change], "parquet")
    refused("gedit", Asked(folder, "edit"), tmp_path, said)


def test_gedit_files_that_are_wrong_are_named(tmp_path):
    refused("gedit", Asked(tmp_path, "edit"), tmp_path, "no .parquet or .arrow files there")
    rows = [{k: v for k, v in row.items() if k != "key"} for row in gedit_rows()]
    folder = write_gedit(tmp_path / "g", rows, "arrow")
    refused("gedit", Asked(folder, "edit"), tmp_path, r"column\(s\) missing: key; found task_type")
    whole = (write_gedit(tmp_path / "h", gedit_rows(), "arrow") / "data-00000-of-00001.arrow").read_bytes()
    (folder / "data-00000-of-00001.arrow").write_bytes(whole[: len(whole) // 2])
    refused("gedit", Asked(folder, "edit"), tmp_path, "not a readable Parquet or Arrow file")
    refused("gedit", Asked(write_gedit(tmp_path / "i", gedit_rows() * 2, "parquet"), "edit"), tmp_path, "occurs twice")


@pytest.mark.parametrize(
    "text, said",
    [
        ("[]", "must be a JSON object with an entry an edit"),
        ('{"1": 3}', "entry '1': must be an object"),
        ('{"1": {"prompt": "p"}}', "entry '1': 'id' is null"),
        ('{"1": {"id": "a.png"}}', "entry '1': 'prompt' is null"),
        ('{"1": {"id": "a.png", "prompt": "p"}}', "picture a.png is not in .*; name the pictures' folder"),
        ('{"1": {"id": "../../etc/passwd", "prompt": "p"}}', "'id' leads out of"),
        ("{", "not valid JSON"),
    ],
)
def test_an_imgedit_entry_that_is_wrong_is_named(tmp_path, text, said):
    (tmp_path / "basic_edit.json").write_text(text)
    refused("imgedit", Asked(tmp_path, "edit"), tmp_path, said)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "evaluation_metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    refused("geneval", Asked(tmp_path, "t"), tmp_path, "evaluation_metadata.jsonl, line 1: UTF-16, not UTF-8")


def test_a_missing_file_and_an_unknown_benchmark_are_named(tmp_path):
    refused("geneval", Asked(tmp_path, "t"), tmp_path, "holds no evaluation_metadata.jsonl; give GenEval's")
    refused("imgedit", Asked(tmp_path / "gone", "t"), tmp_path, "is not there, nor a folder with basic_edit.json")
    refused("dpg", Asked(tmp_path, "t"), tmp_path, "'dpg' is not known; choose one of: gedit, geneval, imgedit")
