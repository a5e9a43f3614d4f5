"""Finding a base: shipped, folder, URI, hub; and a line for each that is not there."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from danceopd.backbones import bases
from danceopd.errors import UserError


@pytest.mark.parametrize("name", bases.SHIPPED)
def test_a_shipped_base_is_pinned_and_small(name):
    source = bases.fetch_base(name, None, None)
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


def test_two_that_begin_at_once_download_once(tiny_base, tmp_path, monkeypatch):
    """A folder that is replaced is gone for a moment, and the other one may be reading it."""
    got, get, both_began = [], bases._get, threading.Barrier(2)

    def noting(*arguments):
        got.append(arguments)
        get(*arguments)

    def fetch():
        both_began.wait(60)
        return bases.fetch_weights(f"file://{tiny_base}", tmp_path, "x")

    monkeypatch.setattr(bases, "_get", noting)
    with ThreadPoolExecutor(2) as pool:
        first, second = [pool.submit(fetch) for _ in range(2)]
        assert first.result() == second.result()
    assert len(got) == 1


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("wrld", "not a folder, hub id or URI; shipped bases: world, world_open"),
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


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tiny_base, tmp_path, monkeypatch):
    """A local hub cache that holds `owner/tiny` at two revisions, and no network."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    home = cache / "models--owner--tiny"
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / name).write_text(commit)
        shutil.copytree(tiny_base, home / "snapshots" / commit)
    (home / "snapshots" / ("b" * 40) / "model_index.json").write_text(
        (tiny_base / "model_index.json").read_text() + "\n"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


def test_a_hub_id_is_found_in_the_local_cache_at_its_revision(hub, tiny_base, tmp_path):
    main, first = (bases.fetch_base("owner/tiny", revision, tmp_path) for revision in (None, "v1"))
    assert main.digest == bases.fetch_base(str(tiny_base), None, tmp_path).digest != first.digest
    assert (main.name, main.folder.name, first.folder.name) == ("tiny", "a" * 40, "b" * 40)
    with pytest.raises(UserError, match=r"offline mode .* hf download owner/tiny --revision v2, or give a folder"):
        bases.fetch_base("owner/tiny", "v2", tmp_path)


def test_a_local_copy_that_is_not_whole_says_what_it_lacks(hub, tmp_path):
    shutil.rmtree(hub / "snapshots" / ("a" * 40) / "vae")
    with pytest.raises(UserError, match="is not whole, it lacks vae; download it again"):
        bases.fetch_base("owner/tiny", None, tmp_path)


# --------------------------------------------------------------------------------------------- teachers, configurations


def test_weights_come_from_a_folder_a_file_or_a_uri(tiny_base, tmp_path):
    file = next((tiny_base / "transformer").glob("*.safetensors"))
    assert bases.fetch_weights(str(file), tmp_path, "x") == file
    fetched = bases.fetch_weights(f"file://{file}", tmp_path, "x")
    assert fetched.is_relative_to(tmp_path) and fetched.read_bytes() == file.read_bytes()
    assert bases.fetch_weights(f"file://{file}", tmp_path, "x") == fetched
    folder = bases.fetch_weights(f"file://{tiny_base}", tmp_path, "x")
    assert (folder / "transformer" / file.name).is_file()
    with pytest.raises(
        UserError, match=r"teachers\.a\.path 'owner/name': no such file or folder; the hub's are written"
    ):
        bases.fetch_weights("owner/name", tmp_path, "teachers.a.path")


def test_a_single_file_is_no_base(tiny_base, tmp_path):
    file = next((tiny_base / "transformer").glob("*.safetensors"))
    with pytest.raises(UserError, match=r"name the pipeline it belongs to as model\.base, and the file as"):
        bases.fetch_base(str(file), None, tmp_path)


def test_of_a_store_the_configurations_alone_are_fetched(tiny_base, tmp_path):
    folder = bases.fetch_configs(f"file://{tiny_base}", None, tmp_path)
    assert (folder / "transformer" / "config.json").is_file()
    assert not list(folder.rglob("*.safetensors"))
    assert bases.fetch_configs(str(tiny_base), None, tmp_path) == tiny_base
