"""Outputs appear in a new place, an empty folder, or over an older output of the same command, and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from danceopd.config.load import load_recipe
from danceopd.data import world
from danceopd.data.assemble import assemble, open_dataset, strangers
from danceopd.data.importers.run import run_import
from danceopd.data.importers.spec import ImportSpec, load_spec
from danceopd.errors import UserError
from danceopd.files import check_output, check_output_file, hold, lock_output, output_folder, write_json
from danceopd.steps.data import build_data
from danceopd.workspace import make_product


def records():
    return world.world_records({"t2i": {"train": 2}})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_new_empty_and_own_folders_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("new", "deep/er/new", "empty", "link"):
        assemble(records(), tmp_path / name)
        assemble(world.world_records({"t2i": {"train": 3}}), tmp_path / name)
        assert open_dataset(tmp_path / name).manifest["counts"]["t2i"]["train"] == 3
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"notes.txt": "mine"}, r"holds notes\.txt, and no older output of this command"),
        ({"manifest.json": "{}"}, r"holds manifest\.json, and no older output"),
        ({"manifest.json": "not json"}, r"holds manifest\.json, and no older output"),
        ({"manifest.json": '{"files": ["a"], "x": 1}', "a": ""}, "no older output"),
        ({f"{n}.jpg": "x" for n in range(9)}, r"holds 0\.jpg, 1\.jpg, 2\.jpg and 6 more"),
        ({".git/config": "x"}, r"holds \.git, and no older output"),
    ],
)
def test_other_peoples_files_stay(tmp_path, held, message):
    for name, text in held.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    before = contents(tmp_path)

    def unread():
        raise AssertionError("work began before the place was checked")
        yield

    with pytest.raises(UserError, match=message):
        assemble(unread(), tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "sub/picture.png", ".hidden"])
def test_files_among_an_older_output_stay(tmp_path, name):
    assemble(records(), tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"out: holds .*, which this command did not write; name a new or an empty"):
        assemble(records(), tmp_path / "out")
    assert contents(tmp_path) == before
    assert strangers(tmp_path / "out") == [Path(name).parts[0]]


def test_places_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for path, message in (
        (tmp_path / "file", "file: a file, and a folder is to be written"),
        (tmp_path / "file" / "out", "is a file; name a place in a folder"),
        (tmp_path / "loop", "no place for an output"),
        (tmp_path / ("x" * 300), "no place for an output"),
        (tmp_path / "a\0b", "no place for an output"),
        (Path("."), "the folder you are in"),
        (Path(".."), "the folder you are in, or one around it"),
        (Path("/proc/out"), "no p"),
    ):
        with pytest.raises(UserError, match=message), output_folder(path):
            raise AssertionError("work began")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "inside", "loop"]


def test_a_mounted_volume_is_refused_before_work(tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(UserError, match="volume: a mounted volume; name a folder in it"):
        check_output(tmp_path / "volume")
    with output_folder(tmp_path / "volume" / "out") as scratch:
        (scratch / "a").write_text("1")


def test_an_output_that_fails_leaves_nothing(tmp_path):
    for name in ("new", "deep/er/new"):
        with pytest.raises(RuntimeError), output_folder(tmp_path / name) as scratch:
            (scratch / "half").write_text("x")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_writers_to_one_place(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom danceopd.files import lock_output\n"
        "with lock_output(Path(sys.argv[1])):\n print('held', flush=True)\n sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"out: process {other.pid} on .* is writing there; wait for it to end"),
            output_folder(tmp_path / "out"),
        ):
            raise AssertionError("two writers at once")
        with output_folder(tmp_path / "another") as scratch:
            (scratch / "a").write_text("1")
    finally:
        other.kill()
        other.wait()
    with output_folder(tmp_path / "out") as scratch:  # a writer that was killed holds nothing
        (scratch / "a").write_text("1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["another", "out"]
    with (
        lock_output(tmp_path / "out"),
        pytest.raises(UserError, match="is writing there"),
        lock_output(tmp_path / "out"),
    ):
        raise AssertionError("two writers at once")


def test_files_get_the_format_their_name_says(tmp_path):
    own = (".json",)
    assert check_output_file(tmp_path / "a.json", own, lambda path: False) == tmp_path / "a.json"
    write_json(tmp_path / "a.json", {})
    assert check_output_file(tmp_path / "a.json", own, lambda path: True) == tmp_path / "a.json"
    (tmp_path / "folder.json").mkdir()
    for name, message in (
        ("a.json", r"a\.json: is there already, and no older output of this command; name another file"),
        ("b.txt", r"b\.txt: ends in none of \.json"),
        ("json", "ends in none of"),
        ("folder.json", "a folder, and a file is to be written"),
        ("a.json/b.json", "is a file; name a place in a folder"),
    ):
        with pytest.raises(UserError, match=message):
            check_output_file(tmp_path / name, own, lambda path: False)


def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):  # root may write anywhere
        pytest.skip("runs as root")
    with pytest.raises(UserError, match="no permission to write in"):
        check_output(tmp_path / "closed" / "out")


def captions(folder: Path) -> ImportSpec:
    folder.mkdir()
    for number, record in enumerate(world.world_records({"t2i": {"train": 2}})):
        (folder / f"{number}.png").write_bytes(record.target)
        (folder / f"{number}.txt").write_text(record.prompt)
    return load_spec("folder", [str(folder)], None, ["min_side=32"], [])


def test_an_import_touches_nothing_of_others(tmp_path):
    spec = captions(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.parquet").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for out, message in (
        ("full", r"holds notes\.txt, and no older output"),
        ("out", r"out\.partial: holds mine\.parquet and no import's journal"),
        ("in/out", "lies in the input"),
        ("in", "lies in the input"),
    ):
        with pytest.raises(UserError, match=message):
            run_import(spec, tmp_path / out)
    with lock_output(tmp_path / "new"), pytest.raises(UserError, match="is writing there"):
        run_import(spec, tmp_path / "new")
    assert contents(tmp_path) == before
    assert run_import(spec, tmp_path / "empty") == run_import(spec, tmp_path / "new")


def test_the_second_maker_of_a_product_waits_and_takes_the_firsts(tmp_path, caplog):
    made = []

    def build(scratch, checkpoints):
        made.append(scratch)
        time.sleep(1.5)
        return {"n": 1}

    def make():
        return make_product(tmp_path, "data", "x", ["same"], build)

    with caplog.at_level("INFO", "danceopd"), ThreadPoolExecutor(2) as pool:
        first = pool.submit(make)
        time.sleep(0.5)
        second = pool.submit(make)
        assert first.result().folder == second.result().folder and len(made) == 1
    assert "another process is making it; waiting" in caplog.text and "made by another process" in caplog.text


def test_two_that_need_the_same_dataset_at_once_assemble_it_once(tmp_path, monkeypatch):
    recipe = load_recipe("world", ["data.world={t2i: {train: 2, val: 2, test: 2}}"])
    made, both_began = [], threading.Barrier(2)

    def noting(records, folder, *more):
        made.append(folder)
        return assemble(records, folder, *more)

    def build():
        both_began.wait(60)
        return build_data(recipe, tmp_path, repo=tmp_path)

    monkeypatch.setattr("danceopd.data.assemble.assemble", noting)
    with ThreadPoolExecutor(2) as pool:
        first, second = [pool.submit(build) for _ in range(2)]
        assert first.result() == second.result()
    assert len(made) == 1


def test_what_fails_while_it_is_held_leaves_no_lock_and_the_next_one_in_line_holds_alone(tmp_path):
    place, lock = tmp_path / "ws" / "x", tmp_path / "ws" / ".locks" / "x"
    inside, most = [], []

    def fail(seconds: float) -> None:
        with suppress(RuntimeError), hold(place, lock, wait=True):
            inside.append(seconds)
            most.append(len(inside))
            time.sleep(seconds)
            inside.remove(seconds)
            raise RuntimeError

    with ThreadPoolExecutor(3) as pool:
        for seconds in (0.3, 0.2, 0.1):
            pool.submit(fail, seconds)
    assert most == [1, 1, 1] and not lock.exists()
    shutil.rmtree(tmp_path / "ws", ignore_errors=True)
    fail(0.0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "ws").mkdir()
    fail(0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["ws"], "a folder of the user's stays"
    assert list((tmp_path / "ws").iterdir()) == []


def test_where_a_file_system_knows_no_locks_nothing_is_held_and_nothing_waits(tmp_path, monkeypatch):
    """Nor may a lock that names another file each time it is asked, as some mounted buckets do, be waited for."""

    def none_here(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("danceopd.files.fcntl.flock", none_here)
    monkeypatch.setattr("danceopd.files._names", lambda path, file: False)
    lock = tmp_path / "locks" / "x"
    with hold(tmp_path / "x", lock, wait=False), hold(tmp_path / "x", lock, wait=True):
        assert lock.is_file()


def test_one_that_cannot_wait_is_told(tmp_path):
    place, lock = tmp_path / "x", tmp_path / "locks" / "x"
    refused = pytest.raises(UserError, match="another process is making it")
    with hold(place, lock, wait=False), refused, hold(place, lock, wait=False):
        pass
    with hold(place, lock, wait=False):  # it is free again
        pass
