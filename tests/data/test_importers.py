"""Importers: rows of other people's data sets become records, or are listed with the reason."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import write_tar
from PIL import Image

from benchmarks import importing
from benchmarks.importing import SCHEMA, omniedit_row, write_omniedit
from danceopd.cli import main as cli
from danceopd.data.assemble import assemble, read_input
from danceopd.data.importers.convert import REASONS, Outcome, convert
from danceopd.data.importers.inputs import RawRow, find_inputs
from danceopd.data.importers.prepared import prepare, prepared_file, prepared_folder, read_prepared
from danceopd.data.importers.run import run_import, run_share
from danceopd.data.importers.spec import load_spec
from danceopd.data.records import check_images, check_record, decode_image
from danceopd.errors import UserError
from danceopd.files import lock_output

SIDE = 72


def settings(layout, inputs, *overrides, tasks=()):
    return load_spec(layout, [str(i) for i in inputs], None, list(overrides), list(tasks))


def png(image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def decoded(data) -> Image.Image:
    return Image.open(io.BytesIO(data))


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["danceopd", "data", "import", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def write_rows(path, rows, schema=SCHEMA):
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def records_of(folder):
    records = list(read_input(str(folder)))
    for record in records:
        check_record(record, record.id)
        check_images(record, record.id)
    return records


# ------------------------------------------------------------------------------------------------------------- damage


def spoil(column, value):
    def change(row):
        row[column] = value
        return row

    return change


def spoil_picture(column, change):
    def apply(row):
        row[column] = {"bytes": change(row[column]["bytes"]), "path": None}
        return row

    return apply


def unchanged(row):
    row["edited_img"] = row["src_img"]
    return row


def flipped(data):
    data = bytearray(png(decoded(data)))
    data[len(data) // 2] ^= 255
    return bytes(data)


def animated(data):
    out = io.BytesIO()
    first = decoded(data)
    first.save(out, "GIF", save_all=True, append_images=[first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    return out.getvalue()


def resized(width, height):
    return lambda data: png(decoded(data).resize((width, height)))


def clear(data):
    return png(Image.new("RGBA", decoded(data).size))


def floats(data):
    out = io.BytesIO()
    Image.fromarray(np.ones((SIDE, SIDE), np.float32)).save(out, "TIFF")
    return out.getvalue()


DAMAGES = {
    "id-missing": (spoil("omni_edit_id", None), "has no id (omni_edit_id)"),
    "id-repeated": (spoil("omni_edit_id", "task_swap_0"), "the id 'omniedit-task_swap_0' occurs twice"),
    "prompt-missing": (spoil("edited_prompt_list", []), "has no prompt"),
    "prompt-blank": (spoil("edited_prompt_list", [" \n "]), "the prompt is blank"),
    "prompt-not-utf8": (spoil("edited_prompt_list", ["caf\ufffd"]), "lost in a conversion"),
    "prompt-control": (spoil("edited_prompt_list", ["a\x00b"]), "holds control characters"),
    "prompt-too-long": (spoil("edited_prompt_list", ["x" * 2001]), "has 2001 characters; at most 2000"),
    "score-not-a-number": (spoil("o_score", float("nan")), "score 'o_score' is nan"),
    "source-missing": (spoil("src_img", None), "source: is missing"),
    "target-missing": (spoil("edited_img", {"bytes": None, "path": None}), "target: is missing"),
    "picture-not-there": (spoil("src_img", {"bytes": None, "path": "gone.png"}), "gone.png is not in"),
    "picture-outside": (spoil("src_img", {"bytes": None, "path": "../../secret.png"}), "leads out of the data set's"),
    "picture-empty": (spoil_picture("src_img", lambda _: b""), "source: not a readable image (it has no bytes)"),
    "picture-unknown-format": (spoil_picture("src_img", lambda _: b"<html>404</html>"), "none of PNG, JPEG"),
    "picture-truncated": (spoil_picture("edited_img", lambda d: d[: len(d) // 2]), "cut short"),
    "picture-damaged": (spoil_picture("edited_img", flipped), "target: not a readable image (damaged"),
    "picture-too-large": (spoil_picture("src_img", resized(700, 700)), "700x700 pixels, at most 200000"),
    "picture-too-small": (spoil_picture("src_img", resized(40, 40)), "is 40x40; the shorter side must have 64"),
    "picture-too-narrow": (spoil_picture("src_img", resized(80, 400)), "is 400x80; at most 4 to 1"),
    "picture-animated": (spoil_picture("src_img", animated), "has 2 frames"),
    "picture-invisible": (spoil_picture("edited_img", clear), "transparent everywhere"),
    "picture-float": (spoil_picture("edited_img", floats), "floating-point values"),
    "pair-shapes-differ": (spoil_picture("edited_img", resized(SIDE, 3 * SIDE)), "nothing aligns them"),
    "pair-unchanged": (unchanged, "source and target are the same picture"),
}


@pytest.fixture(scope="session")
def damaged_import(tmp_path_factory):
    """Sound rows with one row of each damage between them, imported once."""
    home = tmp_path_factory.mktemp("damage")
    rows = [omniedit_row(number, SIDE) for number in range(6)]
    for number, (change, _) in enumerate(DAMAGES.values(), start=6):
        rows.append(change(omniedit_row(number, SIDE)))
    path = write_rows(home / "rows.parquet", rows)
    spec = settings("omniedit", [path], "max_pixels=200000", "min_scores.o_score=1", "examples=2")
    return run_import(spec, home / "out"), home / "out"


@pytest.mark.parametrize("reason", DAMAGES)
def test_every_kind_of_damage_is_refused_by_name(damaged_import, reason):
    refused = damaged_import[0]["dropped"]["refused"]
    number = 6 + list(DAMAGES).index(reason)
    assert refused[reason]["count"] == 1
    assert refused[reason]["examples"][0].startswith(f"rows.parquet, row {number}")
    assert DAMAGES[reason][1] in refused[reason]["examples"][0]
    assert reason in REASONS


def test_the_rows_between_damaged_ones_are_kept(damaged_import):
    report, folder = damaged_import
    assert len(DAMAGES) >= 20
    assert report["rows"] == 6 + len(DAMAGES)
    records = records_of(folder)
    assert [r.id for r in records] == [f"omniedit-{omniedit_row(n, SIDE)['omni_edit_id']}" for n in range(6)]
    assert len({entry["examples"][0] for entry in report["dropped"]["refused"].values()}) == len(DAMAGES)


# --------------------------------------------------------------------------------------------------- resume, streaming

KILLED = """
import os, signal, sys
from danceopd.data.importers import run
plain = run.Journal.finish_shard
def finish(self, scratch, rows, position):
    if len(self.shards) == 2:  # named, and not yet in the journal; a line of it is half written
        scratch.replace(self.next_shard())
        with open(self._path, "a") as file:
            file.write('{"shard": "part-00002')
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, scratch, rows, position)
run.Journal.finish_shard = finish
from danceopd.cli.main import main
main()
"""


@pytest.mark.slow
def test_a_killed_import_goes_on_and_ends_as_if_it_had_not_been(tmp_path, capsys):
    write_omniedit(tmp_path / "in", 200, SIDE, file_rows=90)
    command = [
        "data",
        "import",
        "omniedit",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "2",
        "--set",
        "shard_rows=30",
        "--set",
        "resize.area=4096",
        "--set",
        "resize.step=16",
    ]
    done = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in (tmp_path / "out.partial").glob("*.parquet")) == [
        f"part-0000{i}.parquet" for i in (0, 1, 2)
    ]
    spec = settings("omniedit", [tmp_path / "in"], "shard_rows=30", "resize.area=4096", "resize.step=16")
    again = run_import(spec, tmp_path / "out", workers=1)
    whole = run_import(spec, tmp_path / "whole", workers=2)
    assert again == whole
    assert whole["rows"] == 200
    assert whole["dropped"]["refused"]["picture-truncated"]["count"] == 9
    for name in whole["files"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()
    assert len({r.id for r in records_of(tmp_path / "out")}) == whole["kept"] == 191


def test_an_unfinished_import_with_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.parquet", [omniedit_row(n, SIDE) for n in range(6)])
    broken = write_rows(tmp_path / "b.parquet", [omniedit_row(n, SIDE) for n in range(6, 9)])
    sound = broken.read_bytes()
    broken.write_bytes(sound[: len(sound) // 2])
    spec = settings("omniedit", [path, broken], "shard_rows=2")
    with pytest.raises(UserError, match=r"b\.parquet: not a readable Parquet file .*fetch it again and go on"):
        run_import(spec, tmp_path / "out")
    with pytest.raises(UserError, match="unfinished import with other settings or inputs"):
        run_import(settings("omniedit", [path, broken], "shard_rows=3"), tmp_path / "out")
    broken.write_bytes(sound)  # fetched again: the rows before it are not read again
    read = []
    monkeypatch.setattr(
        "danceopd.data.importers.run.convert", lambda row, *rest: read.append(row) or convert(row, *rest)
    )
    assert run_import(spec, tmp_path / "out")["kept"] == 9
    assert len(read) == 3
    assert run_import(spec, tmp_path / "out")["kept"] == 9  # as it is
    with pytest.raises(UserError, match="is there already, from other settings or inputs"):
        run_import(settings("omniedit", [path]), tmp_path / "out")


# ----------------------------------------------------------------------------------------------------- tasks, pictures


def test_kinds_without_a_rule_are_listed_and_the_table_overrides(tmp_path):
    rows = [omniedit_row(n, SIDE) for n in range(6)]
    rows[1]["task"], rows[2]["task"] = "relight", None
    path = write_rows(tmp_path / "r.parquet", rows)
    report = run_import(settings("omniedit", [path]), tmp_path / "a")
    assert {k: e["count"] for k, e in report["dropped"]["unmapped"].items()} == {"relight": 1, "(none)": 1}
    assert report["dropped"]["unmapped"]["relight"]["examples"] == [
        "r.parquet, row 1: kind of edit 'relight' has no task"
    ]
    assert {r.task for r in records_of(tmp_path / "a")} == {"local_edit", "global_edit"}
    assert report["unused"] == []
    spec = settings("omniedit", [path], tasks=["relight=global_edit", "style=", "*=edit", "styl=x"])
    report = run_import(spec, tmp_path / "b")
    assert report["unused"] == ["styl"]
    assert sorted(r.task for r in records_of(tmp_path / "b")) == ["edit"] * 4 + ["global_edit"]
    assert report["dropped"]["left out"]["style"]["count"] == 1
    assert "unmapped" not in report["dropped"]


def test_nothing_kept_is_an_error_that_says_why(tmp_path):
    path = write_rows(tmp_path / "r.parquet", [omniedit_row(0, SIDE) | {"task": "relight"}])
    with pytest.raises(UserError, match=r"none of 1 rows was kept \(unmapped relight: 1\).*--task KIND=TASK"):
        run_import(settings("omniedit", [path]), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


def test_scores_licence_and_origin_go_along_and_scores_can_be_asked_for(tmp_path):
    rows = [omniedit_row(n, SIDE) for n in range(3)]
    rows[1]["o_score"], rows[2]["pq_score"] = 2.0, 10
    path = write_rows(tmp_path / "r.parquet", rows)
    spec = settings("omniedit", [path], "min_scores.o_score=5", "max_scores.pq_score=9", "license=mit")
    report = run_import(spec, tmp_path / "out")
    assert {name: e["count"] for name, e in report["dropped"]["score"].items()} == {"o_score": 1, "pq_score": 1}
    facts = records_of(tmp_path / "out")[0].facts()
    assert (facts["license"], facts["pq_score"], facts["row"], facts["edit_type"]) == ("mit", 7, 0, "swap")


def test_pairs_are_resized_alike_into_buckets_and_untouched_pictures_keep_their_bytes(tmp_path):
    row = omniedit_row(0, 96)
    large = decoded(row["src_img"]["bytes"])
    row["src_img"]["bytes"] = png(large.resize((large.width * 2, large.height * 2)))
    path = write_rows(tmp_path / "r.parquet", [row, omniedit_row(1, SIDE)])
    run_import(settings("omniedit", [path], "resize.area=4096", "resize.step=16"), tmp_path / "out")
    record = records_of(tmp_path / "out")[0]
    height, width = decode_image(record.source, "").shape[:2]
    assert record.facts()["bucket"] == f"{height}x{width}"
    assert height % 16 == width % 16 == 0
    run_import(settings("omniedit", [path]), tmp_path / "plain")
    first, second = records_of(tmp_path / "plain")
    assert second.target == omniedit_row(1, SIDE)["edited_img"]["bytes"]
    assert decode_image(first.target, "").shape == decode_image(first.source, "").shape


def test_duplicates_are_left_out_unless_they_are_wanted(tmp_path):
    rows = [omniedit_row(0, SIDE), omniedit_row(0, SIDE), omniedit_row(0, SIDE)]
    rows[1]["omni_edit_id"], rows[2]["omni_edit_id"] = "copy", "other wish"
    rows[2]["edited_prompt_list"] = ["something else"]
    path = write_rows(tmp_path / "r.parquet", rows)
    report = run_import(settings("omniedit", [path]), tmp_path / "a")
    assert report["dropped"]["duplicate"]["duplicate"]["examples"] == [
        "r.parquet, row 1: looks like omniedit-task_swap_0"
    ]
    assert len({r.split for r in records_of(tmp_path / "a")}) == 1  # edits of one picture stay together
    assert run_import(settings("omniedit", [path], "duplicates=null"), tmp_path / "b")["kept"] == 3


def test_an_import_is_an_input_of_a_recipe(tmp_path):
    path = write_rows(tmp_path / "r.parquet", [omniedit_row(n, SIDE) for n in range(6)])
    run_import(settings("omniedit", [path]), tmp_path / "out")
    manifest = assemble(read_input(str(tmp_path / "out")), tmp_path / "data", {"local_edit": True, "global_edit": True})
    assert sum(sum(splits.values()) for splits in manifest["counts"].values()) == 6


# ------------------------------------------------------------------------------------------------------- other layouts


def pair(seed):
    return importing.picture_pair(np.random.default_rng(seed), SIDE)


def struct(data):
    return {"bytes": data, "path": None}


PARQUET_LAYOUTS = {
    "ultraedit": lambda s, t: {
        "edit_prompt": "p",
        "source_image": struct(s),
        "edited_image": struct(t),
        "ssim": 0.5,
        "edit_type": "change global",
    },
    "magicbrush": lambda s, t: {
        "img_id": "7",
        "turn_index": 1,
        "source_img": struct(s),
        "mask_img": struct(s),
        "instruction": "p",
        "target_img": struct(t),
    },
    "instructpix2pix": lambda s, t: {
        "original_prompt": "a",
        "original_image": struct(s),
        "edit_prompt": "p",
        "edited_prompt": "b",
        "edited_image": struct(t),
    },
}


@pytest.mark.parametrize("layout", PARQUET_LAYOUTS)
def test_each_parquet_layout_becomes_records(tmp_path, layout):
    source, target = pair(1)
    pq.write_table(pa.Table.from_pylist([PARQUET_LAYOUTS[layout](source, target)]), tmp_path / "r.parquet")
    tasks = () if layout == "ultraedit" else ("*=edit",)
    run_import(settings(layout, [tmp_path / "r.parquet"], tasks=tasks), tmp_path / "out")
    (record,) = records_of(tmp_path / "out")
    assert (record.prompt, record.source, record.target) == ("p", source, target)
    assert record.task == ("global_edit" if layout == "ultraedit" else "edit")
    assert record.id.startswith(f"{layout}-")


def test_imgedit_rows_name_their_pictures_and_the_file_the_kind(tmp_path):
    source, target = pair(2)
    folder = tmp_path / "Singleturn" / "results"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(source)
    (folder / "b.png").write_bytes(target)
    good = {"input_images": ["results/a.png"], "output_images": ["results/b.png"], "prompt": "take it away"}
    two = good | {"input_images": ["results/a.png", "results/b.png"]}
    pq.write_table(pa.Table.from_pylist([good, two]), tmp_path / "remove_part3.parquet")
    pq.write_table(pa.Table.from_pylist([good]), tmp_path / "background_part0.parquet")
    spec = settings("imgedit", [tmp_path / "*.parquet"], f"images={tmp_path / 'Singleturn'}")
    report = run_import(spec, tmp_path / "out")
    (record,) = records_of(tmp_path / "out")
    assert (record.task, record.source, record.facts()["edit_type"]) == ("local_edit", source, "remove")
    assert report["dropped"]["refused"]["several-pictures"]["count"] == 1
    assert report["dropped"]["unmapped"]["background"]["count"] == 1


def test_a_folder_of_captioned_pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "one.jpg").write_bytes(pair(3)[0])
    (folder / "deep" / "one.txt").write_text("a calm sea\n")
    (folder / "two.png").write_bytes(png(decoded(pair(4)[0])))
    (folder / "latin.png").write_bytes(png(decoded(pair(5)[0])))
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    report = run_import(settings("folder", [folder]), tmp_path / "out")
    (record,) = records_of(tmp_path / "out")
    assert (record.task, record.prompt, record.source) == ("t2i", "a calm sea", None)
    assert set(report["dropped"]["refused"]) == {"prompt-missing", "prompt-not-utf8"}
    assert "(two.png): has no prompt" in report["dropped"]["refused"]["prompt-missing"]["examples"][0]


def test_a_folder_with_metadata_and_an_object_store(tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/set/a.png", pair(6)[0])
    store.pipe("/set/b.png", pair(6)[1])
    lines = [{"file_name": "a.png", "text": "a hill"}, {"source": "a.png", "target": "b.png", "prompt": "warmer"}, 5]
    store.pipe("/set/metadata.jsonl", "\n".join(map(json.dumps, lines)).encode())
    report = run_import(settings("folder", ["memory://set"], tasks=["(none)=edit"]), tmp_path / "out")
    drawing, edit = records_of(tmp_path / "out")
    assert (drawing.task, drawing.source, edit.task) == ("t2i", None, "edit")
    assert report["dropped"]["refused"]["line-not-json"]["count"] == 1


def test_webdataset_shards_of_captions_and_of_pairs(tmp_path):
    source, target = pair(7)
    files = [
        ("000.jpg", source),
        ("000.txt", b"a lake"),
        ("001.src_img.jpg", source),
        ("001.edited_img.jpg", target),
        ("001.task.txt", b"style"),
        ("001.edited_prompt_list.json", b'["as an etching"]'),
        ("002.jpg", source),
        ("002.json", b"{"),
    ]
    path = write_tar(tmp_path / "shard-0.tar", files)
    report = run_import(settings("webdataset", [path], tasks=["style=global_edit"]), tmp_path / "out")
    drawing, edit = records_of(tmp_path / "out")
    assert (drawing.task, drawing.target, drawing.facts()["__key__"]) == ("t2i", source, "000")
    assert (edit.task, edit.prompt, edit.source, edit.target) == ("global_edit", "as an etching", source, target)
    assert set(report["dropped"]["refused"]) == {"line-not-json"}
    data = path.read_bytes()
    (tmp_path / "short.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"short\.tar: damaged after sample"):
        run_import(settings("webdataset", [tmp_path / "short.tar"]), tmp_path / "no")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["omni", "x"], "layout: 'omni' is not known; choose one of: folder, imgedit"),
        (["omniedit", "gone"], "input gone: no such file or folder"),
        (["omniedit", "{here}"], "layout omniedit reads .parquet, and there is none"),
        (["omniedit", "{here}", "--task", "style"], "write it as KIND=TASK"),
        (["omniedit", "{here}", "--set", "sizes=3"], "sizes: no such field; here are: choose_prompt"),
        (["omniedit"], "inputs: Field required"),
        (["magicbrush", "{file}"], "no column for the prompt (instruction); found omni_edit_id"),
        (["omniedit", "{file}", "--set", "min_scores.beauty=3"], "max_scores names beauty, not a column"),
        (["omniedit", "{file}", "{here}"], "reads .parquet, and there is none"),
    ],
)
def test_bad_settings_get_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    here = tmp_path / "here"
    here.mkdir()
    file = write_rows(tmp_path / "f.parquet", [omniedit_row(0, SIDE)])
    arguments = [a.format(here=here, file=file) for a in arguments]
    assert run_command(monkeypatch, *arguments, "--out", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_settings_from_a_file_and_the_tables_on_the_terminal(tmp_path, monkeypatch, capsys):
    path = write_rows(tmp_path / "f.parquet", [omniedit_row(n, SIDE) for n in range(3)])
    (tmp_path / "s.yaml").write_text(f"layout: omniedit\ninputs: ['{path}']\ntasks: {{swap: null}}\n")
    assert run_command(monkeypatch, "--spec", tmp_path / "s.yaml", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "2 of 3 rows kept" in " ".join(out.split())
    assert "left out" in out


# -------------------------------------------------------------------------------------------------------- many workers

SHARDED = ["shard_rows=5", "max_pixels=200000", "min_scores.o_score=1", "duplicates=4", "resize.area=4096"]


@pytest.fixture(scope="module")
def many_files(tmp_path_factory):
    """Rows with all kinds of damage, duplicates and shared sources in five files, and their import by one command."""
    home = tmp_path_factory.mktemp("many")
    (home / "in").mkdir()
    rows = [omniedit_row(number, SIDE) for number in range(12)]
    rows += [change(omniedit_row(number, SIDE)) for number, (change, _) in enumerate(DAMAGES.values(), start=12)]
    rows.append(omniedit_row(3, SIDE) | {"omni_edit_id": "again"})
    rows.append(omniedit_row(40, SIDE) | {"src_img": rows[5]["src_img"], "task": "unheard of"})
    rows.append(omniedit_row(41, SIDE) | {"src_img": rows[7]["src_img"]})
    for number in range(5):
        write_rows(home / "in" / f"{number}.parquet", rows[number::5])
    spec = settings("omniedit", [home / "in"], *SHARDED)
    run_import(spec, home / "whole")
    return spec, home


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_workers_in_any_order_write_what_one_command_writes(many_files, tmp_path):
    spec, home = many_files
    out = tmp_path / "out"
    assert [run_share(spec, out, (worker, 3), threads) is None for worker, threads in ((2, 1), (0, 2))] == [True, True]
    assert not out.exists() and len(list(prepared_folder(out).iterdir())) == 3
    report = run_share(spec, out, (1, 3))
    assert files_of(out) == files_of(home / "whole")
    assert report["dropped"].keys() >= {"refused", "duplicate", "unmapped"} and len(report["files"]) > 1
    assert list(tmp_path.iterdir()) == [out]
    assert run_share(spec, out, (0, 3)) == report  # a pod that is started again


def test_a_worker_that_was_killed_goes_on_at_the_file_it_was_in(many_files, tmp_path, monkeypatch):
    spec, home = many_files
    converted, dies_in = [], 3

    def noting(row, spec, file):
        if row.file == dies_in:
            raise KeyboardInterrupt
        converted.append(row.file)
        return convert(row, spec, file)

    monkeypatch.setattr("danceopd.data.importers.run.convert", noting)
    with pytest.raises(KeyboardInterrupt):
        run_share(spec, tmp_path / "out", (1, 2))
    [kept] = prepared_folder(tmp_path / "out").iterdir()
    assert set(converted) == {1} and not kept.name.startswith(".")
    converted, dies_in = [], None
    assert run_share(spec, tmp_path / "out", (1, 2)) is None and set(converted) == {3}
    converted.clear()
    run_import(spec, tmp_path / "out")  # worker 0 never came: one command takes what there is, and does the rest
    assert set(converted) == {0, 2, 4}
    assert files_of(tmp_path / "out") == files_of(home / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_prepared_with_other_settings_is_not_taken(many_files, tmp_path):
    spec, home = many_files
    other = settings("omniedit", [home / "in"], *SHARDED[:-1])
    assert run_share(other, tmp_path / "out", (0, 2)) is None
    assert run_share(spec, tmp_path / "out", (0, 2)) is None
    run_share(spec, tmp_path / "out", (1, 2))
    assert files_of(tmp_path / "out") == files_of(home / "whole")
    assert len(list(prepared_folder(tmp_path / "out").iterdir())) == 3, "what another import prepared is its own"


def test_a_damaged_prepared_file_is_named(many_files, tmp_path):
    spec, _ = many_files
    run_share(spec, tmp_path / "out", (0, 2))
    for file in prepared_folder(tmp_path / "out").iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(
        UserError, match=r"out\.prepared/.*\.parquet: is damaged .*; remove it, and run the import again"
    ):
        run_share(spec, tmp_path / "out", (1, 2))


def test_the_worker_that_finds_another_one_writing_leaves_it_to_it(many_files, tmp_path):
    spec, home = many_files
    with lock_output(tmp_path / "out"):
        assert run_share(spec, tmp_path / "out", (0, 1)) is None
    assert run_share(spec, tmp_path / "out", (0, 1))["rows"] == 39
    with pytest.raises(UserError, match="is there already, from other settings or inputs"):
        run_share(settings("omniedit", [home / "in"]), tmp_path / "out", (0, 1))


def test_workers_by_command(many_files, tmp_path, monkeypatch, capsys):
    _, home = many_files
    given = [word for setting in SHARDED for word in ("--set", setting)]
    for worker, said in (("0/2", "the last worker writes it all"), ("1/2", "of 39 rows kept")):
        run_command(monkeypatch, "omniedit", home / "in", "--out", tmp_path / "out", "--worker", worker, *given)
        assert said in " ".join(capsys.readouterr().out.split())
    assert files_of(tmp_path / "out") == files_of(home / "whole")


def test_any_text_of_a_row_can_be_prepared(many_files, tmp_path):
    spec, _ = many_files
    [file, *_] = find_inputs(spec)
    row = RawRow(7, 5, "a, row 5 (\ud800)", {"kind": "  "}, None, (("a column", "\udfff"),))
    told = Outcome(row, "unmapped", " \ud800\0", "of \udfff")
    prepare(tmp_path, spec, file, iter([told]))
    assert list(read_prepared(prepared_file(tmp_path, spec, file), 7, 0)) == [told]
    assert list(read_prepared(prepared_file(tmp_path, spec, file), 7, 6)) == []
