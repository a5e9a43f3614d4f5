"""Whatever lies in an input is kept, refused by name, or told as ignored; nothing is left out without a word."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import write_tar
from PIL import Image

from benchmarks.importing import omniedit_row
from danceopd.data.assemble import read_input
from danceopd.data.importers.folders import DECODED, UNDECODED
from danceopd.data.importers.run import run_import
from danceopd.data.importers.spec import load_spec
from danceopd.errors import UserError

FORMATS = {
    ".jpg": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".ppm": "PPM",
    ".avif": "AVIF",
}


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((72, 72), Image.Resampling.NEAREST).save(out, kind)
    return out.getvalue()


def imported(place, out, layout="folder", *overrides, tasks=("*=t2i",)):
    return run_import(load_spec(layout, [str(place)], None, ["duplicates=null", *overrides], list(tasks)), out)


def told(report) -> dict[str, int]:
    return {what: entry["count"] for what, entry in report["ignored"].items()}


def refused(report) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in report["dropped"].get("refused", {}).items()}


@pytest.mark.parametrize("seed", range(6))
def test_kept_refused_and_ignored_are_all_files_of_a_folder(tmp_path, seed):
    rng, home, attached = random.Random(seed), tmp_path / "in", 0
    folders = [home, home / "a [1]", home / "a [1]" / "deep", home / "café 東京"]
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(24):
        folder, stem = rng.choice(folders), f"{number:02d}.x" if rng.random() < 0.2 else f"{number:02d}"
        suffix = rng.choice([*DECODED, *UNDECODED])
        suffix = suffix.upper() if rng.random() < 0.3 else suffix
        (folder / f"{stem}{suffix}").write_bytes(picture(100 * seed + number, FORMATS.get(suffix.lower(), "PNG")))
        beside = rng.choice([".txt", ".TXT", ".caption", ".json", ".JSON", None])
        if beside is not None:
            text = json.dumps({"caption": "a sea", "width": 72}) if "json" in beside.lower() else "a sea\r\n"
            (folder / f"{stem}{beside}").write_text(text)
            attached += 1
    for name in ("readme.md", "._00.png", ".DS_Store", "lost.txt", "notes", "list.csv", "x.safetensors", "lost.json"):
        (rng.choice(folders) / name).write_text("x")
    total = sum(len(files) for _, _, files in os.walk(home))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.png").write_bytes(picture(9))
    (elsewhere / "linked.txt").write_text("a hill")
    (home / "link").symlink_to(elsewhere)
    (home / "loop").symlink_to(home)
    report = imported(home, tmp_path / "out")
    files = {what: count for what, count in told(report).items() if not what.startswith("column")}
    assert report["kept"] + sum(refused(report).values()) == report["rows"] == 25
    assert report["rows"] + attached + 1 + sum(files.values()) == total + 2
    assert files == {
        "a system's file": 2,
        "caption or fields of no picture": 2,
        "file .md": 1,
        "file (no ending)": 1,
        "file .csv": 1,
        "file .safetensors": 1,
    }


@pytest.mark.parametrize("suffix", DECODED)
def test_pictures_of_every_ending_are_taken(tmp_path, suffix):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a{suffix}").write_bytes(picture(1, FORMATS.get(suffix, "PNG")))
    (tmp_path / "in" / "a.Txt").write_bytes(b"\xef\xbb\xbfa sea\r\n")
    assert imported(tmp_path / "in", tmp_path / "out")["kept"] == 1
    (record,) = read_input(str(tmp_path / "out"))
    assert record.prompt == "a sea"


@pytest.mark.parametrize("suffix", UNDECODED)
def test_pictures_that_are_not_decoded_are_refused_by_name(tmp_path, suffix):
    (tmp_path / "in").mkdir()
    for name, data in ((f"a{suffix}", b"\x00\x00\x00\x18ftypheic"), ("b.png", picture(1))):
        (tmp_path / "in" / name).write_bytes(data)
        (tmp_path / "in" / name).with_suffix(".txt").write_text("a sea")
    report = imported(tmp_path / "in", tmp_path / "out")
    assert (report["kept"], refused(report)) == (1, {"picture-unknown-format": 1})
    assert f"a{suffix}" in report["dropped"]["refused"]["picture-unknown-format"]["examples"][0]


METADATA = {
    "metadata.jsonl": '\ufeff{"file_name": "a.png", "text": "a\u2028sea"}\r\n{"file_name": "b.png", "text": "two"}',
    "metadata.csv": "file_name,text\r\na.png,a\u2028sea\r\nb.png,two\r\n",
}


@pytest.mark.parametrize("where", ["", "train", "deep/er"])
@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_found_wherever_it_lies(tmp_path, where, name):
    home = tmp_path / "in" / where
    home.mkdir(parents=True)
    for number, file in enumerate(("a.png", "b.png", "c.png")):
        (home / file).write_bytes(picture(number))
    (home / name).write_text(METADATA[name], encoding="utf-8")
    report = imported(tmp_path / "in", tmp_path / "out")
    assert (report["kept"], told(report)) == (2, {"picture that no metadata names": 1})
    assert {r.prompt for r in read_input(str(tmp_path / "out"))} == {"a sea", "two"}


def test_captions_and_metadata_in_one_tree(tmp_path):
    home = tmp_path / "in"
    (home / "listed").mkdir(parents=True)
    (home / "plain").mkdir()
    (home / "listed" / "a.png").write_bytes(picture(0))
    (home / "listed" / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "one", "mood": 1}\n{"file_name": "../plain/b.png", "text": "two"}\n'
        '{"file_name": "/etc/passwd", "text": "x"}\n{"file_name": "../../secret.png", "text": "x"}\n'
        '{"file_name": "x\\u0000y", "text": "x"}\n{"file_name": "' + "n" * 300 + '.png", "text": "x"}\nnot json'
    )
    (home / "plain" / "b.png").write_bytes(picture(1))
    (home / "plain" / "b.txt").write_text("three")
    report = imported(home, tmp_path / "out")
    assert report["kept"] == 3  # b.png is named by the metadata, and has a caption as well
    assert refused(report) == {"picture-outside": 2, "picture-unreadable": 2, "line-not-json": 1}
    assert told(report) == {"column 'mood'": 1}
    (home / "listed" / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UserError, match=r"both .*metadata\.csv and .*metadata\.jsonl; remove one"):
        imported(home, tmp_path / "again")


@pytest.mark.parametrize("name", ["folder", "folder [1]", "fol*der", "f?"])
def test_a_path_that_is_there_is_no_pattern(tmp_path, name):
    (tmp_path / name).mkdir()
    write = pa.Table.from_pylist([omniedit_row(0, 72) | {"extra": 1}])
    pq.write_table(write, tmp_path / name / "ROWS.PARQUET")
    (tmp_path / name / "readme.md").write_text("x")
    report = imported(tmp_path / name, tmp_path / "out", "omniedit")
    assert (report["kept"], told(report)["file .md"], told(report)["column 'extra'"]) == (1, 1, 1)
    with pytest.raises(UserError, match="no such file or folder"):
        imported(tmp_path / "gone [1]", tmp_path / "no", "omniedit")


def test_a_damaged_row_group_costs_its_rows_and_no_more(tmp_path):
    path = tmp_path / "r.parquet"
    rows = [omniedit_row(n, 72) for n in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3, compression="zstd", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1)
    data = bytearray(path.read_bytes())
    start = next(c.data_page_offset for c in map(group.column, range(group.num_columns)) if "bytes" in c.path_in_schema)
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    report = imported(path, tmp_path / "out", "omniedit", "shard_rows=1", tasks=["*=edit"])
    assert (report["rows"], report["kept"], refused(report)) == (9, 6, {"rows-damaged": 3})
    assert "r.parquet, rows 3 to 5" in report["dropped"]["refused"]["rows-damaged"]["examples"][0]


def test_tars_of_other_systems(tmp_path):
    files = [
        ("./._000.jpg", b"mac"),
        ("./000.jpg", picture(0)),
        ("./._000.txt", b"mac"),
        ("./000.txt", b"a lake"),
        ("__MACOSX/000.jpg", b"mac"),
        ("001.jpg", picture(1)),
        ("001.jpg", picture(2)),
        ("001.txt", b"twice"),
        ("README", b"x"),
        ("002.jpg", picture(3)),
        ("002.json", b'\xef\xbb\xbf{"caption": "a hill", "mood": 1}'),
        ("003.heic", picture(4)),
        ("003.txt", b"not decoded"),
        (".DS_Store", b"x"),
    ]
    report = imported(write_tar(tmp_path / "a.tar", files), tmp_path / "out", "webdataset")
    assert (report["rows"], report["kept"]) == (4, 2)
    assert refused(report) == {"field-repeated": 1, "target-missing": 1}
    assert told(report) == {
        "a system's file": 4,
        "file (no ending)": 1,
        "column 'mood'": 1,
        "column 'heic'": 1,
    }
    assert {r.prompt for r in read_input(str(tmp_path / "out"))} == {"a lake", "a hill"}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_flipped_byte_in_a_compressed_tar_is_found(tmp_path, share):
    files = [(f"{n:03d}.{end}", picture(n) if end == "png" else b"a sea") for n in range(8) for end in ("png", "txt")]
    data = gzip.decompress(write_tar(tmp_path / "a.tar.gz", files, "w:gz").read_bytes())
    whole = bytearray(gzip.compress(data, 0))  # stored: a flipped byte breaks the checksum and nothing else
    whole[int(len(whole) * share)] ^= 1
    (tmp_path / "a.tar.gz").write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.tar\.gz: damaged .*CRC.*fetch it again"):
        imported(tmp_path / "a.tar.gz", tmp_path / "out", "webdataset")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data))
    assert imported(tmp_path / "a.tar.gz", tmp_path / "out", "webdataset")["kept"] == 8


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}])
def test_a_struct_of_nulls_is_no_picture(tmp_path, value):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([(n, pa.string()) for n in ("id", "task", "prompt")] + [("source", image), ("target", image)])
    target = {"bytes": picture(0), "path": None}
    row = {"id": "1", "task": "t2i", "prompt": "p", "source": value, "target": target}
    pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / "r.parquet")
    (record,) = read_input(str(tmp_path / "r.parquet"))
    assert (record.source, record.target) == (None, picture(0))
    write_tar(
        tmp_path / "a.tar", [("0.png", picture(0)), ("0.json", json.dumps({"caption": "p", "source": value}).encode())]
    )
    assert imported(tmp_path / "a.tar", tmp_path / "out", "webdataset")["kept"] == 1


@pytest.mark.parametrize("prompt", [5, {"a": "b"}, True, 0.5])
def test_a_prompt_of_another_type_is_not_called_empty(tmp_path, prompt):
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / "in" / f"{number}.png").write_bytes(picture(number))
    lines = [{"file_name": "0.png", "text": prompt}, {"file_name": "1.png", "text": "a sea"}]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = imported(tmp_path / "in", tmp_path / "out")
    assert (report["kept"], refused(report)) == (1, {"prompt-not-text": 1})
    assert type(prompt).__name__ in report["dropped"]["refused"]["prompt-not-text"]["examples"][0]


# -------------------------------------------------------------------------------------------------------- data.inputs


@pytest.mark.parametrize("field", ["target", "file_name", "image"])
def test_a_records_only_picture_has_several_names(tmp_path, field, caplog):
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "a.png").write_bytes(picture(0))
    (tmp_path / "in" / "train" / "b.png").write_bytes(picture(1))
    line = {"task": "t2i", "prompt": "a sea", field: "a.png", "mood": 3}
    (tmp_path / "in" / "train" / "metadata.jsonl").write_text(json.dumps(line))
    with caplog.at_level(logging.WARNING):
        (record,) = read_input(str(tmp_path / "in"))
    assert record.target == picture(0)
    assert "ignored field(s): mood (1)" in caplog.text
    assert "ignored file(s): 1 .png" in caplog.text
    table = pa.table({"id": ["1"], "task": ["t"], "prompt": ["p"], field: [picture(0)]})
    if field != "file_name":
        pq.write_table(table, tmp_path / "r.parquet")
        assert next(read_input(str(tmp_path / "r.parquet"))).target == picture(0)
    (tmp_path / "in" / "train" / "metadata.jsonl").write_text(json.dumps(line | {"target": "a.png", "image": "b.png"}))
    with pytest.raises(UserError, match=r"both 'target' and '.*' are the target"):
        list(read_input(str(tmp_path / "in")))


def test_parquet_is_found_below_and_whatever_its_case(tmp_path, monkeypatch, caplog):
    table = pa.table({"id": ["1"], "task": ["t"], "prompt": ["p"], "mood": [1]})
    (tmp_path / "in" / "deep").mkdir(parents=True)
    pq.write_table(table, tmp_path / "in" / "deep" / "A.PARQUET")
    (tmp_path / "in" / "notes.txt").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert [r.id for r in read_input("~/in")] == ["1"]
    assert "ignored column(s): mood" in caplog.text
    assert "ignored file(s): 1 .txt" in caplog.text
    shutil.copy(tmp_path / "in" / "deep" / "A.PARQUET", tmp_path / "B.PARQUET")
    assert [r.id for r in read_input("~/B.PARQUET")] == ["1"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such file or folder"),
        ({}, r"metadata\.jsonl or metadata\.csv; there are no files"),
        ({"a.png": "x", "b.png": "x", "c.txt": "x"}, r"there are 2 \.png, 1 \.txt"),
        ({"metadata.jsonl": "", "r.parquet": ""}, r"holds both r\.parquet and metadata\.jsonl; name one"),
        ({"metadata.jsonl": "", "metadata.csv": ""}, r"holds both metadata\.jsonl and metadata\.csv; remove one"),
        ({"metadata.jsonl": '{"task": "t", "prompt": 5}'}, "field 'prompt' is int, not text"),
        ({"metadata.jsonl": '{"task": ["t"], "prompt": "p"}'}, "field 'task' is list, not text"),
        ({"metadata.jsonl": '{"id": {}, "task": "t", "prompt": "p"}'}, "field 'id' is dict, not text"),
        ({"metadata.jsonl": '{"task": "t", "prompt": "p", "target": 5}'}, "field 'target' is int; give the name"),
        ({"metadata.jsonl": '{"task": "t", "prompt": "p", "target": "a\\u0000"}'}, "field 'target' names no file"),
        ({"metadata.jsonl": '{"task": "t", "prompt": "\\ud800"}'}, "half a character"),
        ({"metadata.jsonl": '{"task": "t", "prompt": "p", "provenance": ' + "[" * 3000}, "line 1: not valid JSON"),
        ({"metadata.csv": "task,prompt\nt\n"}, r"metadata\.csv, line 2: 1 cells"),
    ],
)
def test_an_input_that_is_none_is_one_line(tmp_path, files, message):
    for name, text in (files or {}).items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    if files == {}:
        (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=message):
        list(read_input(str(tmp_path / "in")))


def test_parquet_that_is_damaged_in_the_middle_is_one_line(tmp_path):
    path = tmp_path / "r.parquet"
    rows = [{"id": str(n), "task": "t", "prompt": "p " * 500 + str(n)} for n in range(400)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(2).data_page_offset
    data[start : start + 60] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"r\.parquet, after row \d+: not a readable Parquet file"):
        list(read_input(str(path)))
