"""A dataset built by several workers, or by one that was killed: the same bytes, and no picture looked at twice."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danceopd import steps
from danceopd.cli import main as cli
from danceopd.config.load import load_recipe
from danceopd.data.assemble import verify_dataset
from danceopd.data.looked import looked_folder
from danceopd.data.png import encode_png
from danceopd.data.records import SCHEMA, Record, check_images, to_table, write_shard
from danceopd.errors import UserError
from danceopd.files import content_key, hold, lock_output

FILES = 5


def picture(number: int) -> bytes:
    return encode_png(np.full((4 + number % 3, 6, 3), number, np.uint8))


def edit(number: int, **changed) -> Record:
    """An edit whose target is, for every other one, the next one's source: files share pictures."""
    rows = {"source": picture(number), "target": picture(number + (3 if number % 2 else 90))}
    return replace(Record(f"r{number:03d}", "local_edit", f"paint it {number}", None, None, ""), **(rows | changed))


def write_inputs(home: Path) -> Path:
    """Five Parquet files, one without records."""
    for number in range(FILES - 1):
        (home / "in").mkdir(exist_ok=True)
        write_shard([edit(n) for n in range(number, 24, FILES - 1)], home / "in" / f"{number}.parquet")
    pq.write_table(pa.Table.from_pylist([], SCHEMA), home / "in" / f"{FILES - 1}.parquet")
    return home / "in"


def write_folders(home: Path) -> Path:
    """Three folders of pictures with a metadata file each."""
    for number, name in enumerate(("metadata.jsonl", "metadata.csv", "metadata.jsonl")):
        folder = home / "folders" / str(number)
        (folder / "pictures").mkdir(parents=True)
        lines = []
        for n in range(number, 6, 3):
            (folder / "pictures" / f"{n}.png").write_bytes(picture(n))
            lines.append({"task": "t2i", "prompt": f"field {n}", "file_name": f"pictures/{n}.png"})
        text = "\n".join(map(json.dumps, lines)) if name.endswith("jsonl") else csv(lines)
        (folder / name).write_text(text)
    return home / "folders"


def csv(lines: list[dict]) -> str:
    return "\n".join(",".join(row) for row in [list(lines[0]), *(list(line.values()) for line in lines)])


def recipe_of(*inputs: Path):
    return load_recipe("world", ["data.world=null", f"data.inputs={json.dumps([str(path) for path in inputs])}"])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A place with two inputs, where a build by itself keeps what it finds from the first picture on."""
    monkeypatch.setattr("danceopd.data.looked.SMALL", 1)
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    write_folders(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(home):
    return recipe_of(home / "in", home / "folders")


@pytest.fixture
def whole(home, recipe):
    """The files that one command alone writes."""
    steps.build_data(recipe, home / "alone", home / "whole", home)
    assert not looked_folder(home / "whole").exists()
    return files_of(home / "whole")


@pytest.fixture
def decoded(monkeypatch):
    """How often each record's pictures were decoded."""
    counts: Counter[str] = Counter()

    def counting(record, where):
        counts[record.id] += 1
        return check_images(record, where)

    monkeypatch.setattr("danceopd.data.assemble.check_images", counting)
    return counts


def share(home, recipe, worker, of, out="out", workers=1):
    return steps.build_share(recipe, home / "ws", (worker, of), home / out, home, workers)


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["danceopd", "data", "build", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


# -------------------------------------------------------------------------------------------------------- many workers


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", [order for of in (1, 2, 3) for order in permutations(range(of))])
def test_workers_in_any_order_write_what_one_command_writes(home, recipe, whole, decoded, order, threads):
    decoded.clear()
    *before, last = (share(home, recipe, worker, len(order), workers=threads) for worker in order)
    assert before == [None] * (len(order) - 1) and last.dataset == home / "out"
    assert files_of(home / "out") == whole
    assert set(decoded.values()) == {1} and len(decoded) == 30, "each record is looked at once, by one of them"
    assert not looked_folder(home / "out").exists()
    verify_dataset(home / "out")


@pytest.mark.parametrize("of", [2, 3])
def test_workers_at_once_write_it_once(home, recipe, whole, decoded, of):
    decoded.clear()
    together = threading.Barrier(of)

    def work(worker):
        together.wait(60)
        return share(home, recipe, worker, of)

    with ThreadPoolExecutor(of) as pool:
        made = list(pool.map(work, range(of)))
    assert any(made) and files_of(home / "out") == whole
    assert set(decoded.values()) == {1} and not looked_folder(home / "out").exists()


def test_more_workers_than_files(home, recipe, whole):
    assert share(home, recipe, 0, 20) is None
    assert share(home, recipe, 19, 20) is None, "has no file, and does not write what others have not looked at"
    for worker in range(1, 7):
        assert share(home, recipe, worker, 20) is None
    assert share(home, recipe, 7, 20) is not None and files_of(home / "out") == whole


def test_one_that_was_built_before_with_these_settings_is_told(home, recipe, whole, decoded, caplog):
    made = share(home, recipe, 0, 1)
    decoded.clear()
    with caplog.at_level(logging.INFO):
        assert share(home, recipe, 1, 3).facts == made.facts
    assert "built before with these settings" in caplog.text
    assert not decoded and not looked_folder(home / "out").exists()
    write_shard([edit(n) for n in range(50, 54)], home / "in" / "more.parquet")
    assert share(home, recipe, 0, 1).facts["counts"] != made.facts["counts"], "another input, another dataset"
    share(home, recipe, 0, 1, "out")
    (home / "in" / "more.parquet").unlink()
    assert share(home, recipe, 0, 1).facts == made.facts
    assert files_of(home / "out") == whole


def test_in_the_workspace_runs_find_what_workers_built(home, recipe, whole, decoded):
    first, last = (steps.build_share(recipe, home / "ws", (worker, 2), repo=home) for worker in (1, 0))
    decoded.clear()
    assert first is None and steps.build_data(recipe, home / "ws", repo=home).folder == last.folder
    assert files_of(last.dataset) == whole and not decoded
    assert [path.name for path in (home / "ws" / "datasets").iterdir()] == [last.dataset.name]


def test_generated_records_are_looked_at_by_whoever_writes_them(home, decoded):
    world = load_recipe("world", ["data.world={t2i: {train: 3, val: 1, test: 1}}"])
    steps.build_data(world, home / "alone", home / "whole", home)
    decoded.clear()
    assert share(home, world, 1, 2) is not None
    assert files_of(home / "out") == files_of(home / "whole") and set(decoded.values()) == {1}
    assert share(home, world, 0, 2) is not None and set(decoded.values()) == {1}
    assert not list(home.glob("*.looked"))


@pytest.mark.parametrize("held", ["by what writes there", "by a run that makes it"])
def test_the_worker_that_finds_another_one_writing_leaves_it_to_it(home, recipe, whole, held, caplog):
    lock = home / "ws" / ".locks" / f"datasets-{content_key(str(home / 'out'))}"
    busy = lock_output(home / "out") if "writes" in held else hold(home / "out", lock, wait=False)
    with busy, caplog.at_level(logging.INFO):
        assert share(home, recipe, 0, 1) is None
    assert "another worker writes it" in caplog.text and not (home / "out").exists()
    assert len(files_of(looked_folder(home / "out"))) == 8, "for the one that writes"
    assert share(home, recipe, 0, 1) is not None and files_of(home / "out") == whole


def test_a_worker_refuses_a_place_that_is_no_dataset_before_it_looks(home, recipe, decoded):
    (home / "out").mkdir()
    (home / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds mine\.txt, and no older output"):
        share(home, recipe, 0, 2)
    assert not decoded and [path.name for path in (home / "out").iterdir()] == ["mine.txt"]


def test_workers_by_command(home, recipe, whole, monkeypatch, capsys):
    inputs = f"data.inputs={json.dumps(list(recipe.data.inputs))}"
    for worker, said in (("1/2", "the last worker writes the dataset"), ("0/2", "content")):
        given = ["--set", "data.world=null", "--set", inputs, "--out", home / "out", "--workspace", home / "ws"]
        assert run_command(monkeypatch, *given, "--worker", worker) in (0, None)
        assert said in " ".join(capsys.readouterr().out.split())
    assert files_of(home / "out") == whole
    assert run_command(monkeypatch, *given, "--worker", "2/2") == 2
    assert "write K/N with 0 <= K < N" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- killed, or broken


@pytest.mark.parametrize("threads", [1, 2])
def test_a_build_that_was_killed_goes_on(home, recipe, whole, decoded, monkeypatch, threads):
    decoded.clear()
    counting = sys.modules["danceopd.data.assemble"].check_images

    def dies(record, where):
        if record.id == "r002":  # first of the third file
            raise KeyboardInterrupt
        return counting(record, where)

    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr("danceopd.data.assemble.check_images", dies)
        steps.build_data(recipe, home / "ws", home / "out", home, threads)
    assert len(list(looked_folder(home / "out").iterdir())) == 2 and not (home / "out").exists()
    first = [edit(n).id for number in (0, 1) for n in range(number, 24, FILES - 1)]
    steps.build_data(recipe, home / "ws", home / "out", home, threads)
    assert files_of(home / "out") == whole
    assert all(decoded[name] == 1 for name in first) and len(decoded) == 30
    assert not looked_folder(home / "out").exists()


def test_a_worker_that_was_killed_goes_on_and_one_command_takes_what_workers_found(home, recipe, whole, decoded):
    decoded.clear()
    assert share(home, recipe, 0, 2) is None
    kept = files_of(looked_folder(home / "out"))
    assert len(kept) == 4
    share(home, recipe, 0, 2)
    assert set(decoded.values()) == {1} and files_of(looked_folder(home / "out")) == kept
    (looked_folder(home / "out") / f".{next(iter(kept))}.0123abcd").write_text("half of")  # what a kill leaves
    steps.build_data(recipe, home / "ws", home / "out", home)  # worker 1 never came
    assert set(decoded.values()) == {1} and len(decoded) == 30
    assert files_of(home / "out") == whole and not looked_folder(home / "out").exists()


def test_of_a_small_input_nothing_is_kept(home, recipe, monkeypatch):
    monkeypatch.setattr("danceopd.data.looked.SMALL", 1 << 26)
    pq.write_table(to_table([edit(99, source=b"no picture")]), home / "in" / "z.parquet")
    with pytest.raises(UserError, match="not a readable image"):
        steps.build_data(recipe, home / "ws", home / "out", home)
    assert not list(home.glob("out*"))


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda home: write_shard([edit(n) for n in range(1, 24, 4)], home / "in" / "1.parquet"), "r001"),
        (lambda home: write_shard([edit(n, prompt="other") for n in (1, 5)], home / "in" / "1.parquet"), "r001"),
        (lambda home: (home / "folders/0/pictures/3.png").write_bytes(picture(77)), None),
        (lambda home: (home / "folders/0/pictures/3.png").write_bytes(picture(4)), None),
    ],
    ids=["written anew", "other records", "a picture", "a picture of the same size"],
)
def test_a_file_that_changed_is_looked_at_again(home, recipe, decoded, change, again):
    assert share(home, recipe, 0, 2) is None and share(home, recipe, 1, 3) is None
    change(home)
    for path in (home / "in" / "1.parquet", home / "folders/0/pictures/3.png"):
        os.utime(path, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns + 1000))  # however coarse the clock
    decoded.clear()
    steps.build_data(recipe, home / "ws", home / "out", home)
    assert max(decoded.values()) == 1 and (again is None or again in decoded)
    steps.build_data(recipe, home / "alone", home / "whole", home)
    assert files_of(home / "out") == files_of(home / "whole")
    assert not looked_folder(home / "out").exists(), "what was found in the older file is gone as well"


def test_a_file_that_changes_while_it_is_taken_is_told(home, recipe, monkeypatch):
    for worker in range(2):
        with lock_output(home / "out"):
            assert share(home, recipe, worker, 2) is None
    kept = files_of(looked_folder(home / "out"))
    inputs = sys.modules["danceopd.data.looked"].read_file

    def touched(file, taken):
        yield from inputs(file, taken)
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))

    def shortened(file, taken):
        yield from list(inputs(file, taken))[:-1]

    def renamed(file, taken):
        yield from (replace(record, id=f"{record.id}x") for record in inputs(file, taken))

    for reader in (shortened, renamed, touched):
        with monkeypatch.context() as reading:
            reading.setattr("danceopd.data.looked.read_file", reader)
            with pytest.raises(UserError, match=r"0\.parquet: changed while it was read; build the dataset again"):
                share(home, recipe, 0, 1)
        assert not (home / "out").exists() and files_of(looked_folder(home / "out")) == kept
    assert share(home, recipe, 0, 1) is not None


@pytest.mark.parametrize("content", [None, b"{}", b"7", b'[["r000", "ab", null]]', b'[["r000", ["a", "b"]]]', b"\xff"])
def test_what_is_kept_and_damaged_is_looked_at_again(home, recipe, whole, decoded, caplog, content):
    assert share(home, recipe, 0, 2) is None
    damaged = next(iter(looked_folder(home / "out").iterdir()))
    damaged.write_bytes(damaged.read_bytes()[:-5] if content is None else content)
    decoded.clear()
    assert share(home, recipe, 1, 2) is not None and files_of(home / "out") == whole
    assert f"{damaged}: damaged (" in caplog.text and "looked at again" in caplog.text
    assert max(decoded.values()) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (edit(99, source=b"no picture"), "z.parquet, record 'r099', field 'source': not a readable image"),
        (edit(99, target=picture(4)), "z.parquet, record 'r099': source is (4, 6) and target (5, 6) (H, W)"),
        (edit(99, prompt=" "), "z.parquet, row 0: field 'prompt' is empty"),
        (edit(99, task="paint"), "record 'r099': task 'paint' is not in the recipe"),
        (edit(99, source=None), "record 'r099': task 'local_edit' edits a source image and the record has none"),
    ],
    ids=["picture", "sizes", "prompt", "task", "source"],
)
def test_a_broken_record_is_one_line_and_keeps_what_others_found(home, recipe, monkeypatch, capsys, record, message):
    pq.write_table(to_table([record]), home / "in" / "z.parquet")  # the sixth file
    inputs = f"data.inputs={json.dumps(list(recipe.data.inputs))}"
    given = ["--set", "data.world=null", "--set", inputs, "--out", home / "out", "--workspace", home / "ws"]
    assert share(home, recipe, 0, 2) is None
    kept = files_of(looked_folder(home / "out"))
    assert run_command(monkeypatch, *given, "--worker", "1/2", "--workers", 1) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("danceopd: ")]
    assert message in line
    now = files_of(looked_folder(home / "out"))
    assert kept.items() <= now.items() and len(now) == len(kept) + 2, "and its own files before the broken one"
    assert not (home / "out").exists() and not [name for name in now if name.startswith(".")]
    pq.write_table(to_table([edit(99)]), home / "in" / "z.parquet")
    assert share(home, recipe, 1, 2) is not None


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_broken_metadata_is_named_by_the_worker_whose_file_it_is(home, name):
    folder = home / "broken"
    folder.mkdir()
    (folder / name).write_bytes(b"\xff\xfe\x00")
    recipe = recipe_of(folder)
    with pytest.raises(UserError, match=rf"broken/{name}, line 1: .*save the file as UTF-8"):
        share(home, recipe, 0, 1)
    (folder / name).write_text(
        '{"task": "t2i", "prompt": "p", "target": "../in/0.parquet"}' if "l" in name[9:] else "a\n1,2\n"
    )
    with pytest.raises(UserError, match=rf"broken/{name}, line [12]: "):
        share(home, recipe, 0, 1)
    assert not list(home.glob("out*"))


def test_an_id_that_two_files_have_is_found_by_the_last_worker(home, recipe):
    pq.write_table(to_table([edit(0)]), home / "in" / "z.parquet")
    assert share(home, recipe, 0, 2) is None
    with pytest.raises(UserError, match="record 'r000': the id occurs twice"):
        share(home, recipe, 1, 2)
    assert not (home / "out").exists()
