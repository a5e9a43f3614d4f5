"""Files are whole or absent."""

from __future__ import annotations

import pytest

from danceopd.errors import UserError
from danceopd.files import atomic_folder, content_key, hash_folder, read_json, write_atomic, write_json


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as scratch:
        (scratch / "half").write_text("x")
        assert not (tmp_path / "out").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
    with atomic_folder(tmp_path / "out") as scratch:
        (scratch / "b").write_text("2")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    with atomic_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_files_are_replaced_whole(tmp_path):
    write_atomic(tmp_path / "f", "old")
    write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folders_hash_follows_names_and_contents(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    first = hash_folder(tmp_path)
    write_json(tmp_path / "a.json", {"x": 2})
    second = hash_folder(tmp_path)
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    assert len({first, second, hash_folder(tmp_path)}) == 3


def test_keys_follow_values_not_order():
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key(1, 2) != content_key(2, 1)


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "bad.json")
