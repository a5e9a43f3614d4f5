"""The data's version, in small git and DVC repositories of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from danceopd.data import versioning, world
from danceopd.data.assemble import assemble, open_dataset
from danceopd.errors import UserError
from danceopd.files import hash_file, read_json, write_json

PROJECT = Path(__file__).parents[2]


def git(repo: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments]
    return subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True).stdout.strip()


def build(folder: Path, seed: int = 0) -> None:
    assemble(world.world_records({"t2i": {"train": 3, "test": 2}}, seed), folder)


@pytest.fixture(autouse=True)
def no_shared_state(tmp_path, monkeypatch):
    """DVC keeps state of every repository outside it; a test's belongs to the test."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "dvc-site"))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A committed repository that tracks a small dataset."""
    repo = tmp_path_factory.mktemp("origin") / "repo"
    repo.mkdir()
    git(repo, "init", "-q")
    (repo / ".dvc").mkdir()
    (repo / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (repo / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (repo / ".dvcignore").write_text((PROJECT / ".dvcignore").read_text())
    build(repo / "data")
    versioning.track(repo, repo / "data", recipe_data="abc")
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "data")
    return repo


@pytest.fixture
def clone(origin, tmp_path) -> Path:
    """A fresh clone: no data, no cache."""
    git(tmp_path, "clone", "-q", str(origin), "clone")
    return tmp_path / "clone"


def dvc_status(repo: Path) -> dict:
    from dvc.repo import Repo

    with Repo(str(repo)) as opened:
        return opened.status()


@pytest.mark.slow
def test_track_writes_an_entry_that_git_and_dvc_understand(origin):
    entry = versioning.tracked(origin, origin / "data")
    assert entry.path == (origin / "data").resolve()
    assert entry.md5.endswith(".dir")
    assert entry.meta["recipe_data"] == "abc"
    assert entry.meta["content"] == open_dataset(origin / "data").content
    assert git(origin, "check-ignore", "data") == "data"
    assert dvc_status(origin) == {}


def test_regenerated_data_is_confirmed_and_leaves_dvc_status_clean(clone):
    assert not (clone / "data").exists()
    before = (clone / "data.dvc").read_bytes()
    build(clone / "data")
    version = versioning.verify(clone, clone / "data")
    assert version.dvc == versioning.tracked(clone, clone / "data").md5
    assert version.git == git(clone, "rev-parse", "HEAD")
    assert dvc_status(clone) == {}
    assert (clone / "data.dvc").read_bytes() == before
    assert versioning.verify(clone, clone / "data") == version


def test_other_records_are_refused_with_both_hashes(clone):
    wanted = versioning.tracked(clone, clone / "data").meta["content"]
    build(clone / "data", seed=1)
    found = open_dataset(clone / "data").content
    with pytest.raises(UserError, match=f"other records .content {found[:16]} instead of {wanted[:16]}"):
        versioning.verify(clone, clone / "data")


def test_same_records_in_other_bytes_point_at_pyarrow(clone):
    build(clone / "data")
    manifest = read_json(clone / "data" / "manifest.json")
    for name, facts in manifest["files"].items():
        pq.write_table(pq.read_table(clone / "data" / name), clone / "data" / name, compression="gzip")
        facts["sha256"] = hash_file(clone / "data" / name)
    write_json(clone / "data" / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"same records, in shards of other bytes \(pyarrow .* constraints\.txt"):
        versioning.verify(clone, clone / "data")


def test_a_damaged_shard_is_called_damaged(clone):
    build(clone / "data")
    with open(next((clone / "data").glob("train-*.parquet")), "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="is damaged"):
        versioning.verify(clone, clone / "data")


def test_a_strange_file_beside_the_shards_is_named(clone):
    build(clone / "data")
    (clone / "data" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"beside them, notes\.txt"):
        versioning.verify(clone, clone / "data")


@pytest.mark.parametrize("missing", ["manifest", "meta"])
def test_a_mismatch_that_cannot_be_explained_names_the_hash(clone, missing):
    build(clone / "data", seed=1)
    if missing == "manifest":
        (clone / "data" / "manifest.json").unlink()
    else:
        entry = yaml.safe_load((clone / "data.dvc").read_text())
        del entry["meta"]
        (clone / "data.dvc").write_text(yaml.safe_dump(entry))
    with pytest.raises(UserError, match=r"not the data that data\.dvc names \(md5 .*\.dir\)"):
        versioning.verify(clone, clone / "data")


def test_missing_data_is_refused(clone):
    with pytest.raises(UserError, match=r"not the data that data\.dvc names"):
        versioning.verify(clone, clone / "data")


def test_new_data_can_be_tracked_in_its_place(clone):
    old = versioning.tracked(clone, clone / "data")
    build(clone / "data", seed=1)
    new = versioning.track(clone, clone / "data", recipe_data="def")
    assert new.md5 != old.md5 and new.meta["recipe_data"] == "def"
    version = versioning.verify(clone, clone / "data")
    assert version.dvc == new.md5
    assert version.git.endswith("-dirty")


def test_only_the_folder_of_the_entry_can_be_tracked(clone, tmp_path):
    build(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="build the dataset there first"):
        versioning.track(clone, tmp_path / "elsewhere")


def test_a_remote_gives_the_data_and_none_gives_nothing(origin, clone, tmp_path):
    assert versioning.pull(clone) is False
    with open(clone / ".dvc" / "config", "a") as file:
        file.write(f"    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n")
    with pytest.raises(UserError, match=r"'dvc pull' from remote 'store' failed; check its address"):
        versioning.pull(clone)
    shutil.copytree(origin / ".dvc" / "cache" / "files", tmp_path / "store" / "files")
    assert versioning.pull(clone) is True
    assert open_dataset(clone / "data").content == open_dataset(origin / "data").content
    assert versioning.verify(clone, clone / "data").dvc is not None


def test_an_archive_without_git_is_verified_all_the_same(clone):
    shutil.rmtree(clone / ".git")
    build(clone / "data")
    version = versioning.verify(clone, clone / "data")
    assert version.git is None
    assert version.dvc == versioning.tracked(clone, clone / "data").md5


def test_without_any_repository_everything_is_none(tmp_path):
    build(tmp_path / "data")
    assert versioning.tracked(tmp_path, tmp_path / "data") is None
    assert versioning.verify(tmp_path, tmp_path / "data") == versioning.DataVersion(None, None)
    assert versioning.pull(tmp_path) is False
    assert versioning.git_revision(tmp_path) is None


def test_another_folder_than_the_tracked_one_has_no_dvc_version(clone, tmp_path):
    build(tmp_path / "elsewhere")
    assert versioning.tracked(clone, tmp_path / "elsewhere") is None
    assert versioning.verify(clone, tmp_path / "elsewhere").dvc is None


@pytest.mark.parametrize("text", ["outs: [", "outs: []\n", "- 1\n", "outs:\n- path: data\n", ""])
def test_a_broken_data_dvc_is_named(clone, text):
    (clone / "data.dvc").write_text(text)
    with pytest.raises(UserError, match=r"data\.dvc: not a DVC file with one output"):
        versioning.tracked(clone, clone / "data")


def test_a_broken_configuration_of_dvc_is_one_line(clone):
    (clone / ".dvc" / "config").write_text("[core]\n    nonsense = 1\n")
    with pytest.raises(UserError, match="cannot read DVC's configuration"):
        versioning.pull(clone)


def test_git_revision(clone):
    head = git(clone, "rev-parse", "HEAD")
    assert versioning.git_revision(clone) == head
    (clone / "untracked.txt").write_text("a run's output")
    assert versioning.git_revision(clone) == head
    (clone / ".gitignore").write_text("changed\n")
    assert versioning.git_revision(clone) == f"{head}-dirty"


def test_git_revision_without_a_commit_or_without_git(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q", "empty")
    assert versioning.git_revision(tmp_path / "empty") is None
    monkeypatch.setenv("PATH", "")
    assert versioning.git_revision(tmp_path / "empty") is None


def test_git_revision_is_of_the_folder_even_inside_a_hook(clone, origin, tmp_path, monkeypatch):
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert versioning.git_revision(clone) is not None


def test_find_repo_looks_upwards(clone, tmp_path):
    assert versioning.find_repo(clone / ".dvc") == clone.resolve()
    (clone / "runs" / "world").mkdir(parents=True)
    assert versioning.find_repo(clone / "runs" / "world") == clone.resolve()
    shutil.rmtree(clone / ".git")
    assert versioning.find_repo(clone / "runs") == clone.resolve()


@pytest.mark.slow
def test_importing_the_module_does_not_import_dvc():
    code = "import sys, danceopd.data.versioning; sys.exit('dvc' in sys.modules)"
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=root).returncode == 0
