"""Records that share a picture fall into one split, on every way in; what lies on two sides is counted."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import write_tar
from PIL import Image

from benchmarks.importing import picture_pair
from danceopd.data.assemble import assemble, open_dataset, read_input
from danceopd.data.importers.run import run_import
from danceopd.data.importers.spec import load_spec
from danceopd.data.records import SPLITS, UNDECIDED, Record, split_of, to_table
from danceopd.data.splits import StreamedSplits, count_alike, on_two_sides, settle_splits


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((72, 72), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


def edit(name: str, source: int | None, target: int | None, split: str = UNDECIDED) -> Record:
    data = [None if seed is None else picture(seed) for seed in (source, target)]
    return Record(name, "edit", f"change {name}", *data, split)


def chains(count: int) -> list[Record]:
    """Per source: two edits of it, and a second turn on the first one's result."""
    found = []
    for n in range(count):
        found += [edit(f"{n}a", 10 * n, 10 * n + 1), edit(f"{n}b", 10 * n, 10 * n + 2)]
        found.append(edit(f"{n}c", 10 * n + 1, 10 * n + 3))
    return found


def groups(folder) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for split in SPLITS:
        for record in open_dataset(folder).records(split):
            found.setdefault(record.prompt.removeprefix("change ")[:-1], set()).add(split)
    return found


def image_folder(home, records):
    home.mkdir()
    lines = []
    for record in records:
        (home / f"{record.id}-in.png").write_bytes(record.source)
        (home / f"{record.id}-out.png").write_bytes(record.target)
        line = {"task": "edit", "prompt": record.prompt, "source": f"{record.id}-in.png"}
        lines.append(json.dumps(line | {"target": f"{record.id}-out.png"}))
    (home / "metadata.jsonl").write_text("\n".join(lines))
    return home


def parquet(home, records):
    home.mkdir()
    pq.write_table(to_table(records).drop(["split"]), home / "r.parquet")
    return home


@pytest.mark.parametrize("make", [image_folder, parquet])
@pytest.mark.parametrize("backwards", [False, True])
def test_what_shares_a_picture_lies_in_one_split(tmp_path, make, backwards):
    records = chains(40)[:: -1 if backwards else 1]
    assemble(read_input(str(make(tmp_path / "in", records))), tmp_path / "out")
    found = groups(tmp_path / "out")
    assert len(found) == 40
    assert all(len(splits) == 1 for splits in found.values())


@pytest.mark.parametrize("layout", ["folder", "webdataset", "magicbrush"])
def test_importers_keep_groups_together(tmp_path, layout, monkeypatch):
    monkeypatch.setattr("danceopd.data.splits.split_of", lambda key: split_of(key, val=0.3, test=0.3))
    records = chains(25)
    if layout == "folder":
        place = image_folder(tmp_path / "in", records)
    elif layout == "webdataset":
        files = []
        for r in records:
            files += [(f"{r.id}.source.png", r.source), (f"{r.id}.target.png", r.target)]
            files += [(f"{r.id}.txt", r.prompt.encode())]
        place = write_tar(tmp_path / "in.tar", files)
    else:
        rows = [
            {
                "instruction": r.prompt,
                "source_img": {"bytes": r.source, "path": None},
                "target_img": {"bytes": r.target, "path": None},
            }
            for r in records
        ]
        place = tmp_path / "in.parquet"
        pq.write_table(pa.Table.from_pylist(rows), place)
    report = run_import(load_spec(layout, [str(place)], None, [], ["*=edit"]), tmp_path / "import")
    assert report["kept"] == 75
    assemble(read_input(str(tmp_path / "import")), tmp_path / "out")
    found = groups(tmp_path / "out")
    assert all(len(splits) == 1 for splits in found.values())
    assert len({min(splits) for splits in found.values()}) == 3


def test_a_picture_between_two_splits_is_refused_by_an_import():
    splits = StreamedSplits()
    splits.remember((1,), "train")
    splits.remember((2,), "test")
    assert splits.settle((1, 2)) is None
    assert splits.settle((1, 3)) == splits.settle((3, 4)) == splits.settle((4,)) == "train"


def test_named_splits_stay_and_draw_their_group_along():
    records = [edit("0a", 0, 1, "test"), edit("0b", 0, 2), edit("0c", 2, 3), edit("1", None, None), edit("2", 9, 1)]
    names = [(f"{n}", f"{m}") for n, m in ((0, 1), (0, 2), (2, 3))] + [(None, None), ("9", "1")]
    assert settle_splits(records, names) == ["test", "test", "test", split_of("1"), "test"]
    both = [replace(records[0], split=split) for split in ("test", "train", UNDECIDED)]
    assert settle_splits(both, [("0", "1")] * 3) == ["test", "train", "train"]


def test_another_edit_of_a_source_moves_nothing():
    for n in range(200):
        one = settle_splits([edit("a", None, None)], [(f"s{n}", f"t{n}")])
        more = settle_splits([edit("a", None, None)] * 3, [(f"s{n}", f"t{n}"), (f"s{n}", f"0{n}"), (f"t{n}", f"1{n}")])
        assert more == one * 3


def test_what_lies_on_two_sides_is_counted_and_told(tmp_path, caplog):
    splits = ["train", "test", "val", "train", "test", "train"]
    names = [("a", "x"), ("a", "y"), ("b", "y"), ("c", "z"), ("z", "w"), (None, None)]
    sides = on_two_sides(splits, names)
    assert (sides.sources, sides.targets, sides.chained) == (1, 1, 1)
    assert "1 source(s), 1 target(s), 1 picture(s) wanted on one side and edited on the other" in str(sides)
    assert not on_two_sides(["train", "train"], [("a", "x"), ("a", "y")])
    assemble([edit("a", 0, 1, "train"), edit("b", 0, 2, "test")], tmp_path / "out")
    assert "on two sides of a split: 1 source(s), 0 target(s)" in caplog.text


def test_pictures_that_look_alike_are_found_across_splits():
    def again_as_jpeg(data: bytes) -> bytes:
        out = io.BytesIO()
        Image.open(io.BytesIO(data)).save(out, "JPEG", quality=95)
        return out.getvalue()

    photo = picture_pair(np.random.default_rng(0), 96)[0]
    one = replace(edit("a", 0, 1, "train"), source=photo)
    again = replace(edit("b", 5, 6, "test"), source=again_as_jpeg(photo))
    assert count_alike([("train", one), ("test", again)]) == 1
    assert count_alike([("train", one), ("train", again), ("test", edit("c", 7, 8, "test"))]) == 0
