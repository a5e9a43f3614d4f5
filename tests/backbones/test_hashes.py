"""A base's bytes are read once a workspace, and again where a file is no longer what it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from danceopd.backbones import bases, hashes
from danceopd.backbones.hashes import NOTES, hash_weights
from danceopd.config.load import load_recipe
from danceopd.files import hash_file, hash_folder
from danceopd.steps.base import resolve_base


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    names = []

    def noting(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(hashes, "hash_file", noting)
    return names


@pytest.fixture
def settled(monkeypatch) -> None:
    """Files of this moment count as files that lie there for long."""
    monkeypatch.setattr(hashes, "SETTLED", -60.0)


@pytest.fixture
def weights(tmp_path) -> Path:
    folder = tmp_path / "weights"
    (folder / "transformer").mkdir(parents=True)
    for number in range(3):
        (folder / "transformer" / f"{number}.safetensors").write_bytes(bytes(1000) + bytes([number]))
    return folder


@pytest.mark.usefixtures("settled")
def test_the_second_command_reads_nothing(tiny_base, tmp_path, read):
    recipe = load_recipe("world", [f"model.base={tiny_base}"])
    first = resolve_base(recipe, tmp_path)
    files = [path.name for path in tiny_base.rglob("*") if path.is_file()]
    assert sorted(read) == sorted(files), "the encoders' hash asks for no file again"
    read.clear()
    assert resolve_base(recipe, tmp_path) == first and read == []
    assert first.facts["weights"] == hash_folder(tiny_base)
    assert first.facts["encoders"] == bases.hash_encoders(tiny_base, tmp_path / "another workspace")


def rewritten(file: Path) -> None:
    """Other contents of the same size, under the old date."""
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # file systems count time in ticks of milliseconds
        file.write_bytes(b"x" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    """Another file of the same size and date takes the place, as `rsync` and `cp -p` do it."""
    before = file.stat()
    other = file.with_suffix(".new")
    other.write_bytes(b"x" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [rewritten, replaced, lambda file: file.write_bytes(b"longer" * 1000)])
def test_only_a_changed_file_is_read_again(weights, tmp_path, read, change):
    first = hash_weights(weights, tmp_path)
    read.clear()
    change(weights / "transformer" / "1.safetensors")
    second = hash_weights(weights, tmp_path)
    assert read == ["1.safetensors"]
    assert first != second == hash_folder(weights) == hash_weights(weights, tmp_path)


@pytest.mark.usefixtures("settled")
def test_files_that_come_and_go_are_heeded(weights, tmp_path, read):
    first = hash_weights(weights, tmp_path)
    moved = (weights / "transformer" / "2.safetensors").rename(tmp_path / "away")
    assert first != hash_weights(weights, tmp_path) == hash_folder(weights)
    moved.rename(weights / "transformer" / "2.safetensors")
    read.clear()
    assert hash_weights(weights, tmp_path) == first and set(read) <= {"2.safetensors"}


def test_a_file_of_this_moment_is_read_again(weights, tmp_path, read):
    """It may be changed once more before the file system's clock ticks."""
    assert hash_weights(weights, tmp_path) == hash_weights(weights, tmp_path)
    assert len(read) == 6


@pytest.mark.usefixtures("settled")
def test_a_file_that_changes_while_it_is_read_is_not_noted(weights, tmp_path, monkeypatch):
    def slow(path: Path) -> str:
        digest = hash_file(path)
        path.write_bytes(b"meanwhile")
        return digest

    with monkeypatch.context() as racing:
        racing.setattr(hashes, "hash_file", slow)
        hash_weights(weights, tmp_path)
    assert hash_weights(weights, tmp_path) == hash_folder(weights)


@pytest.mark.usefixtures("settled")
def test_a_single_file_has_its_own_hash(weights, tmp_path, read):
    file = weights / "transformer" / "0.safetensors"
    assert hash_weights(file, tmp_path) == hash_weights(file, tmp_path) == hash_file(file)
    assert read == ["0.safetensors"]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("text", ["{", "[]", '{"transformer/0.safetensors": 5}', '{"transformer/0.safetensors": []}'])
def test_notes_that_are_none_are_made_anew(weights, tmp_path, read, text):
    first = hash_weights(weights, tmp_path)
    [notes] = (tmp_path / NOTES).iterdir()
    good = notes.read_text()
    notes.write_text(text)
    assert hash_weights(weights, tmp_path) == first and notes.read_text() == good


@pytest.mark.usefixtures("settled")
def test_nothing_is_written_beside_the_weights(weights, tmp_path):
    before = sorted(weights.rglob("*"))
    hash_weights(weights, tmp_path / "workspace")
    assert sorted(weights.rglob("*")) == before


@pytest.mark.usefixtures("settled")
def test_where_no_notes_can_be_kept_all_is_read(weights, tmp_path, read):
    (tmp_path / "cache").write_text("a file where the notes' folder would be")
    assert hash_weights(weights, tmp_path) == hash_weights(weights, tmp_path) == hash_folder(weights)
    assert len(read) == 6
