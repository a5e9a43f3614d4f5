"""The columns beside a dataset: what the records say, made again where they are missing, and no picture read."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from danceopd.data import assemble as assembling
from danceopd.data.assemble import assemble, open_dataset, verify_dataset
from danceopd.data.columns import INDEX, columns_of, key_of, open_columns, rows_where, table_of, write_columns
from danceopd.data.pictures import read_size
from danceopd.data.png import encode_png
from danceopd.data.records import SPLITS, Record, read_parquet
from danceopd.errors import UserError


@pytest.fixture
def copied(small_data, tmp_path):
    return shutil.copytree(small_data, tmp_path / "copied")


def test_the_columns_are_those_of_the_records_in_the_order_of_the_shards(small_data):
    dataset = open_dataset(small_data)
    columns, records = dataset.columns(), [r for split in SPLITS for r in dataset.records(split)]
    assert list(dataset.read()) == records
    for name in ("id", "task", "split", "prompt"):
        assert columns[name].to_pylist() == [getattr(record, name) for record in records]
    for name in ("source", "target"):
        pictures = [getattr(record, name) for record in records]
        assert columns[f"{name}_key"].to_pylist() == [p if p is None else key_of(p) for p in pictures]
    assert columns["height"].to_pylist() == [read_size(r.target, r.id)[0] for r in records]
    places = zip(columns["file"].to_pylist(), columns["row"].to_pylist(), strict=True)
    assert [list(read_parquet(small_data / file))[row].id for file, row in places] == [r.id for r in records]


def test_columns_that_are_missing_or_of_other_records_are_made_again_the_same(copied, small_data):
    first = open_dataset(small_data).columns()
    (copied / INDEX).unlink()
    assert open_dataset(copied).columns().equals(first)
    kept = (copied / INDEX).read_bytes()
    for other in (b"damaged", kept[: len(kept) // 2]):
        (copied / INDEX).write_bytes(other)
        assert open_dataset(copied).columns().equals(first) and (copied / INDEX).read_bytes() == kept
    write_columns(columns_of([]), copied, "of other records")
    assert open_columns(copied, open_dataset(copied).content) is None
    assert open_dataset(copied).columns().equals(first)
    verify_dataset(copied)
    write_columns(first.slice(1), copied, open_dataset(copied).content)
    with pytest.raises(UserError, match=f"{INDEX} has .* rows; delete it"):
        verify_dataset(copied)


def test_where_they_cannot_be_kept_they_are_there_all_the_same(copied, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError("read-only")

    (copied / INDEX).unlink()
    monkeypatch.setattr(assembling, "write_columns", refuse)
    assert open_dataset(copied).columns().num_rows and "is not kept (read-only)" in caplog.text


def test_a_table_gives_the_records_of_some_rows_and_reads_no_picture_before(small_data, monkeypatch):
    dataset = open_dataset(small_data)
    tasks = ("local_edit", "t2i")
    wanted = [record for task in tasks for record in dataset.records("train", task)]
    read: list = []

    def spy(path, rows):
        read.append(rows)
        return read_parquet(path, rows)

    monkeypatch.setattr(assembling, "read_parquet", spy)
    table = dataset.table("train", tasks)
    assert table.texts("id") == [record.id for record in wanted] and not read
    rows = [0, 3, len(wanted) - 1]
    assert list(table.read(rows)) == [wanted[row] for row in rows]
    assert sum(map(len, read)) == len(rows)
    assert list(table.read([])) == []
    assert list(table_of(wanted).read([2, 0])) == [wanted[2], wanted[0]]


def test_row_groups_without_a_wanted_row_are_not_read(tmp_path):
    picture = encode_png(np.zeros((8, 8, 3), np.uint8))
    records = [Record(f"{n:05d}", "t2i", f"draw {n}", None, picture, "train") for n in range(2500)]
    assemble(records, tmp_path / "d", workers=2)
    dataset = open_dataset(tmp_path / "d")
    rows = np.array([5, 1023, 2499])
    assert [r.id for r in read_parquet(tmp_path / "d" / "train-00000-of-00001.parquet", rows)] == [
        f"{n:05d}" for n in rows
    ]
    assert dataset.columns()["group"].to_pylist() == [0] * 2500, "they share a picture"
    assert rows_where(dataset.columns(), split="val").size == 0
