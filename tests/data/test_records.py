"""Records on disk: bytes that depend on the content alone, and one line for every kind of damage."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from danceopd.data import world
from danceopd.data.assemble import assemble, open_dataset, read_image_folder, read_input, verify_dataset
from danceopd.data.png import encode_png
from danceopd.data.records import (
    UNDECIDED,
    check_images,
    check_record,
    content_hash,
    decode_image,
    read_parquet,
    split_of,
    to_table,
)
from danceopd.errors import UserError
from danceopd.files import hash_file

GOOD = next(iter(world.world_records({"local_edit": {"train": 1}})))


@pytest.mark.parametrize("shape", [(64, 64), (7, 5), (300, 301)])
@pytest.mark.parametrize("colors", [3, 16, 200])
def test_png_round_trips_through_pillow(shape, colors):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (colors, 3), dtype=np.uint8)[rng.integers(0, colors, shape)]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels))).convert("RGB")), pixels)


def test_png_refuses_other_arrays():
    with pytest.raises(ValueError, match="uint8"):
        encode_png(np.zeros((4, 4, 3)))


def test_two_assemblies_give_the_same_bytes_whatever_the_order(tmp_path):
    records = list(world.world_records({t: {"train": 5, "val": 2, "test": 2} for t in world.TASKS}))
    first = assemble(records, tmp_path / "a")
    second = assemble(reversed(records), tmp_path / "b")
    assert first == second
    for name in first["files"]:
        assert hash_file(tmp_path / "a" / name) == hash_file(tmp_path / "b" / name)
    assert first["counts"]["t2i"] == {"train": 5, "val": 2, "test": 2}


def test_a_few_records_are_of_every_origin_whatever_their_order(tmp_path):
    origins = ("aurora", "borealis", "celeste", "dawn")
    records = [replace(GOOD, id=f"{of}-{n:03d}") for of in origins for n in range(40)]
    assemble(records, tmp_path / "data", {"local_edit": True})
    dataset = open_dataset(tmp_path / "data")
    some = dataset.records("train", "local_edit", 32)
    assert len(some) == 32 and some == sorted(some, key=lambda r: r.id)
    assert Counter(r.id.partition("-")[0] for r in some).keys() == set(origins)
    assert dataset.records("train", "local_edit", 500) == dataset.records("train", "local_edit")
    assert set(r.id for r in dataset.records("train", None, 8)) <= set(r.id for r in some)


def test_records_come_back_and_datasets_opens_the_folder(small_data):
    import datasets

    dataset = open_dataset(small_data)
    records = dataset.records("train", "local_edit")
    assert len(records) == 12
    assert records[0] == GOOD
    assert len(dataset.records("train", limit=5)) == 5
    loaded = datasets.load_dataset(
        "parquet", data_files={"train": str(small_data / "train-*.parquet")}, cache_dir=str(small_data.parent / "hf")
    )["train"]
    row = next(r for r in loaded if r["id"] == GOOD.id)
    assert np.array_equal(np.asarray(row["target"].convert("RGB")), decode_image(GOOD.target, ""))


def test_the_content_hash_hangs_on_every_field():
    base = content_hash([GOOD])
    for change in ({"id": "x"}, {"prompt": "x"}, {"source": None}, {"target": b"x"}, {"split": "val"}, {"task": "x"}):
        assert content_hash([replace(GOOD, **change)]) != base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": " "}, "field 'id' is empty"),
        ({"task": ""}, "field 'task' is empty"),
        ({"prompt": ""}, "field 'prompt' is empty"),
        ({"split": "dev"}, "field 'split' is 'dev'; use one of train, val, test"),
        ({"provenance": "[1]"}, "field 'provenance' is not a JSON object"),
        ({"provenance": "{"}, "field 'provenance' is not a JSON object"),
    ],
)
def test_bad_fields_are_named(change, message):
    with pytest.raises(UserError, match=message):
        check_record(replace(GOOD, **change), "record 'x'")


def test_broken_or_unequal_pictures_are_named():
    with pytest.raises(UserError, match="field 'source': not a readable image"):
        check_images(replace(GOOD, source=b"no picture"), "record 'x'")
    with pytest.raises(UserError, match=r"source is \(8, 8\) and target \(64, 64\)"):
        check_images(replace(GOOD, source=encode_png(np.zeros((8, 8, 3), np.uint8))), "record 'x'")


@pytest.mark.parametrize(
    ("records", "needs", "message"),
    [
        ([GOOD, GOOD], None, "the id occurs twice"),
        ([GOOD], {"t2i": False}, "task 'local_edit' is not in the recipe; tasks are: t2i"),
        ([replace(GOOD, source=None)], {"local_edit": True}, "edits a source image and the record has none"),
        ([], None, "no records"),
    ],
)
def test_assembly_refuses_and_leaves_nothing(tmp_path, records, needs, message):
    with pytest.raises(UserError, match=message):
        assemble(records, tmp_path / "out", needs)
    assert list(tmp_path.iterdir()) == []


def test_parquet_without_a_column_or_bytes_is_refused(tmp_path):
    pq.write_table(to_table([GOOD]).drop(["prompt"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column\(s\) missing: prompt; found"):
        list(read_parquet(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        list(read_parquet(tmp_path / "b.parquet"))
    table = pa.table({"id": ["1"], "task": ["t"], "prompt": ["p"], "source": ["file.png"]})
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(UserError, match="row 0, field 'source': holds no embedded image bytes"):
        list(read_parquet(tmp_path / "c.parquet"))


def image_folder(folder, *lines):
    folder.mkdir()
    (folder / "in.png").write_bytes(GOOD.source)
    (folder / "out.png").write_bytes(GOOD.target)
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_an_image_folder_becomes_records(tmp_path):
    line = {
        "task": "local_edit",
        "prompt": "remove it",
        "source": "in.png",
        "target": "out.png",
        "provenance": {"a": 1},
    }
    folder = image_folder(tmp_path / "f", json.dumps(line), "", json.dumps({"task": "t2i", "prompt": "a ring"}))
    edit, drawing = read_input(str(folder))
    assert edit.source == GOOD.source
    assert edit.facts() == {"a": 1}
    assert drawing.target is None
    assert [edit.id, drawing.id] == [r.id for r in read_image_folder(folder)]
    assert edit.split == UNDECIDED  # a dataset decides, by what shares its pictures


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("[]", "line 1: not a JSON object"),
        ('{"task": "t"}', "line 1: field 'prompt' is empty"),
        ('{"task": "t", "prompt": "p", "source": "gone.png"}', "line 1: field 'source' names gone.png"),
        ('{"task": "t", "prompt": "p", "source": "../out.png"}', "leads out of the folder"),
    ],
)
def test_bad_lines_of_an_image_folder_are_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        list(read_image_folder(image_folder(tmp_path / "f", line)))


def test_an_input_of_no_known_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"give a \.parquet file, a folder of them"):
        list(read_input(str(tmp_path)))


def test_splits_are_stable_and_shared_out_by_hash():
    splits = [split_of(f"record-{i}", val=0.1, test=0.1) for i in range(2000)]
    assert splits == [split_of(f"record-{i}", val=0.1, test=0.1) for i in range(2000)]
    assert 0.07 < splits.count("test") / 2000 < 0.13


def test_damage_on_disk_is_found(tmp_path):
    assemble(world.world_records({"t2i": {"train": 3}}), tmp_path / "d")
    assert verify_dataset(tmp_path / "d")["counts"]["t2i"]["train"] == 3
    shard = next((tmp_path / "d").glob("train-*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        verify_dataset(tmp_path / "d")
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_dataset(tmp_path / "d")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_dataset(tmp_path)


def test_large_pictures_make_more_shards_and_wait_on_disk(tmp_path, monkeypatch):
    records = list(world.world_records({"local_edit": {"train": 9, "val": 2}}))
    plain = assemble(records, tmp_path / "plain")
    monkeypatch.setattr("danceopd.data.assemble.SPOOL_BYTES", 1)
    limit = 3 * max(len(r.source + r.target) for r in records)
    monkeypatch.setattr("danceopd.data.assemble.SHARD_BYTES", limit)
    cut = assemble(records, tmp_path / "cut")
    assert cut["content"] == plain["content"]
    assert len(cut["files"]) > 3 > len(plain["files"])
    for name in cut["files"]:
        assert sum(len(r.source + r.target) for r in read_parquet(tmp_path / "cut" / name)) <= limit
    dataset = open_dataset(tmp_path / "cut")
    assert dataset.records("train") == open_dataset(tmp_path / "plain").records("train")
    assert list(dataset.table("train", ("local_edit",)).read(range(9))) == dataset.records("train")
    written = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert written == sorted([*cut["files"], "index.arrow", "manifest.json"])
