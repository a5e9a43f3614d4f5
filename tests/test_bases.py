"""Finding a base: shipped, folder, URI, hub; and a line for each that is not there."""

from __future__ import annotations

import shutil

import pytest

from danceopd import bases
from danceopd.errors import UserError


def test_the_shipped_base_is_pinned_and_small():
    source = bases.fetch_base("world", None, None)
    assert source.shipped
    assert (source.folder / "model_index.json").is_file()
    assert sum(p.stat().st_size for p in source.folder.rglob("*") if p.is_file()) <= 6_000_000


def test_a_changed_shipped_base_is_refused(tmp_path, monkeypatch):
    folder = bases.shipped_folder("world")
    shutil.copytree(folder, tmp_path / folder.name)
    shutil.copy(folder.with_suffix(".sha256"), tmp_path)
    (tmp_path / folder.name / "model_index.json").write_text("{}")
    monkeypatch.setattr(bases, "shipped_folder", lambda name: tmp_path / folder.name)
    with pytest.raises(UserError, match="files differ from their pinned hash"):
        bases.fetch_base("world", None, tmp_path)


def test_a_folder_is_used_where_it_lies(tiny_base, tmp_path):
    source = bases.fetch_base(str(tiny_base), None, tmp_path)
    assert source.folder == tiny_base
    assert not source.shipped


def test_a_uri_is_downloaded_once(tiny_base, tmp_path):
    source = bases.fetch_base(f"file://{tiny_base}", None, tmp_path)
    assert source.folder.is_relative_to(tmp_path)
    assert source.digest == bases.fetch_base(str(tiny_base), None, tmp_path).digest
    assert bases.fetch_base(f"file://{tiny_base}", None, tmp_path) == source


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("wrld", "not a folder, hub id or URI; shipped bases: world"),
        ("file:///nowhere/at/all", "cannot be read"),
        ("nosuch://x/y", "cannot be read"),
    ],
)
def test_bases_that_are_not_there_are_named(tmp_path, base, message):
    with pytest.raises(UserError, match=message):
        bases.fetch_base(base, None, tmp_path)
    assert not any((tmp_path / "downloads").glob("*"))


def test_a_hub_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'owner/none': not in the local cache and not to be downloaded"):
        bases.fetch_base("owner/none", None, tmp_path)


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        bases.fetch_base(str(tmp_path), None, tmp_path)
