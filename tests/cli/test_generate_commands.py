"""`danceopd generate`: a lone picture, a batch, a grid; and that nothing is written where something is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from danceopd.backbones import load_backbone
from danceopd.backbones.lora import add_lora, save_diffusers_lora
from danceopd.cli import main as cli
from danceopd.config.recipe import LoraRecipe
from danceopd.errors import UserError
from danceopd.files import write_json
from danceopd.flow.field_io import load_field, save_field
from danceopd.flow.fields import VelocityField
from danceopd.inference.generate import FORMATS, Sample, encode_file, encode_picture, open_image, open_student
from danceopd.inference.side_by_side import find_origins, named_origins, open_side_by_side
from danceopd.pretraining.world_base import SHAPE


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs `danceopd generate ARGUMENTS` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["danceopd", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_base, student_pipeline) -> Path:
    """A workspace with a base, a LoRA teacher, the base as a teacher, and a student that says it was made of them."""
    place = tmp_path_factory.mktemp("workspace")
    backbone = load_backbone(tiny_base, SHAPE)
    add_lora(backbone.transformer, "style", LoraRecipe(rank=2), backbone.lora_targets, seed=0)
    with torch.no_grad():
        for key, weight in backbone.transformer.named_parameters():
            if ".style." in key:
                weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(key)))
    save_field(VelocityField("style", backbone, backbone.transformer, "style"), place / "teachers" / "style-1")
    write_json(place / "teachers" / "plain-1" / "field.json", {"kind": "base", "name": "plain"})
    shutil.copytree(student_pipeline, place / "students" / "world-1" / "pipeline")
    facts = {
        "base/tiny-1": {"pipeline": str(tiny_base)},
        "teachers/style-1": {},
        "teachers/plain-1": {},
        "students/world-1": {
            "pipeline": "pipeline",
            "made_of": {"base": "base/tiny-1", "teachers": {"plain": "teachers/plain-1", "style": "teachers/style-1"}},
        },
    }
    for folder, said in facts.items():
        write_json(place / folder / "step.json", {"digest": folder, "facts": said})
    return place


@pytest.fixture(scope="module")
def student(workspace) -> Path:
    return workspace / "students" / "world-1" / "pipeline"


def test_a_lone_prompt_is_one_file(run, student, tmp_path):
    code, out, _ = run(student, "red ring", "--seed", 5, "--steps", 2)
    assert (code, out) == (0, "out.png\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png"]
    [drawn] = open_student(student).draw_samples([Sample("red ring", (), 5, 2)])
    assert (tmp_path / "out.png").read_bytes() == encode_file(drawn, ".png")
    assert (
        run(
            student,
            "mix",
            "--image",
            "out.png",
            "--source",
            "out.png",
            "--out",
            "b.png",
            "--size",
            "32x48",
            "--steps",
            1,
            "--guidance",
            2,
            "--dtype",
            "bfloat16",
        )[0]
        == 0
    )
    assert open_image(tmp_path / "b.png").size == (32, 48)


def test_a_batch_is_a_folder_with_a_manifest(run, student, tmp_path):
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "in.png")
    rows = [{"prompt": "red ring", "name": "ring"}, {"prompt": "mix", "source": "in.png", "seed": 9, "size": "32x48"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run(student, "--prompts", "p.jsonl", "--out", "drawn", "--seed", 1, "--seed", 2, "--steps", 2)
    assert code == 0, err
    assert out == "drawn\n"
    manifest = json.loads((tmp_path / "drawn" / "manifest.json").read_text())
    files = {str(p.relative_to(tmp_path / "drawn")) for p in (tmp_path / "drawn").rglob("*.png")}
    assert files == {"student/ring-seed1.png", "student/ring-seed2.png", "student/0002.png"}
    assert [p["files"]["student"] for p in manifest["pictures"]] == sorted(files)[1:] + sorted(files)[:1]
    assert [(p["seed"], p["steps"], p["size"]) for p in manifest["pictures"]] == [
        (1, 2, "64x64"),
        (2, 2, "64x64"),
        (9, 2, "32x48"),
    ]
    for entry in manifest["pictures"]:
        data = (tmp_path / "drawn" / entry["files"]["student"]).read_bytes()
        assert entry["sha256"]["student"] == hashlib.sha256(data).hexdigest()
    [source] = manifest["pictures"][2]["sources"]
    assert source["sha256"] == hashlib.sha256((tmp_path / "in.png").read_bytes()).hexdigest()
    [again] = open_student(student).draw_samples([Sample("red ring", (), 2, 2)])
    assert (tmp_path / "drawn/student/ring-seed2.png").read_bytes() == encode_picture(again)
    assert run(student, "--prompts", "p.jsonl", "--out", "drawn")[0] == 2, "a folder with something in it is kept"


def test_a_grid_lays_teachers_beside_the_student(run, student, tiny_base, workspace, tmp_path):
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "in.png")
    code, _, err = run(student, "mix", "--image", "in.png", "--grid", "--seed", 3, "--steps", 2, "--out", "grid")
    assert code == 0, err
    names = {str(p.relative_to(tmp_path / "grid")) for p in (tmp_path / "grid").rglob("*.*")}
    assert names == {"grid.png", "manifest.json", *(f"{n}/0001.png" for n in ("plain", "style", "student"))}
    pictures = {n: open_image(tmp_path / "grid" / n / "0001.png") for n in ("plain", "style", "student")}
    # Each column is what its own field draws from this seed: here the student's weights are the base's.
    sample = Sample("mix", (open_image(tmp_path / "in.png"),), 3, 2)
    alone = open_student(student).draw_samples([sample])[0]
    assert pictures["student"].tobytes() == alone.tobytes() == pictures["plain"].tobytes()
    backbone = load_backbone(tiny_base, SHAPE)
    field = load_field(backbone, "style", workspace / "teachers" / "style-1")
    taught = open_student(student).draw_fields({"style": field}, [sample])["style"][0]
    assert pictures["style"].tobytes() == taught.tobytes() != alone.tobytes()
    # Four columns of tiles of 192 pixels under a heading, beside the row's title.
    sheet = np.asarray(Image.open(tmp_path / "grid" / "grid.png"))
    assert sheet.shape[1] > 210 + 4 * 192 and 192 < sheet.shape[0] < 300
    assert json.loads((tmp_path / "grid/manifest.json").read_text())["fields"] == ["plain", "style", "student"]


def test_teachers_can_be_named(student, tiny_base, workspace, tmp_path):
    lora, copy = workspace / "teachers" / "style-1", tmp_path / "elsewhere"
    shutil.copytree(student, copy)
    _, fields = open_side_by_side(copy, named_origins(str(tiny_base), {"style": str(lora)}, tmp_path))
    assert list(fields) == ["style", "student"]
    _, fields = open_side_by_side(copy, named_origins(None, {"whole": str(copy)}, tmp_path))
    assert list(fields) == ["whole", "student"]


def test_many_rows_make_several_grids(student, tmp_path, monkeypatch):
    from danceopd.inference import draw_batch
    from danceopd.inference.batch_files import Row

    monkeypatch.setattr(draw_batch, "GRID_ROWS", 2)
    drawer = open_student(student)
    items = draw_batch.plan([Row(f"line {n}", "ring") for n in range(3)], Sample("", (), 0, 1), [0])
    folder = draw_batch.draw_batch(drawer, {"student": drawer.field}, items, tmp_path / "out", True, 2, {})
    assert sorted(p.name for p in folder.glob("grid*")) == ["grid-001.png", "grid-002.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either a prompt, or a batch file by --prompts"),
        (["a", "--prompts", "p.csv"], "give either a prompt"),
        (["--prompts", "p.csv", "--image", "x.png"], "in a batch file the field 'source'"),
        (["--prompts", "gone.csv"], "gone.csv: no such file"),
        (["--prompts", "p.csv"], "p.csv, line 3, field 'seed': 'x'"),
        (["--prompts", "size.csv"], "size.csv, line 2: picture size 40x64: both sides must be multiples of 16"),
        (["a", "--image", "gone.png"], "gone.png: no such image file"),
        (["a", "--size", "64"], "--size: '64' is no size"),
        (["a", "--size", "64x40"], "the prompt: picture size 40x64"),
        (["a", "--steps", "1001"], "the prompt: steps is 1001; use 1 to 1000"),
        (["a", "--guidance", "0"], "the prompt: guidance is 0.0; use 1 (none)"),
        (["a", "--seed", "1", "--seed", "1"], "has the name of one of the prompt; name them apart"),
        (["a", "--seed", "1", "--seed", "2", "--out", "x.png"], "several pictures and a grid go to a folder"),
        (["a", "--seed", "1", "--seed", "2", "--out", "full"], "full: holds kept, and no older output of this command"),
        (["a", "--teacher", "x=y"], "--teacher and --base are for --grid"),
        (["a", "--grid", "--teacher", "x"], "--teacher 'x': write NAME=WEIGHTS"),
        (["a", "--grid", "--teacher", "a/b=y"], "'a/b'; use letters"),
        (["a", "--grid", "--teacher", "student=full"], "that name is the student's own"),
        (["a", "--grid", "--teacher", "x=full"], "full: neither a LoRA (a PEFT folder"),
        (["a", "--grid", "--teacher", "x=gone"], "--teacher x= 'gone': no such file or folder"),
        (["a", "--grid", "--base", "world"], "--base belongs to --teacher"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(run, student, tmp_path, arguments, words):
    (tmp_path / "p.csv").write_text("prompt,seed\na,1\nb,x\n")
    (tmp_path / "size.csv").write_text("prompt,size\na,64x40\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(student, *arguments)
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.startswith("danceopd: ")]  # loading shows a bar before it
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before


def test_teachers_that_are_not_known_or_gone_are_said(student, workspace, student_pipeline, tmp_path):
    with pytest.raises(UserError, match=r"not in the workspace it was made in.*--teacher NAME=WEIGHTS"):
        find_origins(student_pipeline)
    copy = tmp_path / "w"
    shutil.copytree(workspace, copy)
    shutil.rmtree(copy / "teachers" / "style-1")
    with pytest.raises(UserError, match="the teacher 'style' the student was made of is not there any more"):
        find_origins(copy / "students" / "world-1" / "pipeline")
    write_json(copy / "students" / "world-1" / "step.json", {"digest": "x", "facts": {}})
    with pytest.raises(UserError, match="does not say what the student was made of"):
        find_origins(copy / "students" / "world-1" / "pipeline")
    with pytest.raises(UserError, match="teacher 'style' is no whole checkpoint: it needs the base"):
        named_origins(None, {"style": str(workspace / "teachers" / "style-1")}, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda s: {k.replace(".weight", ".default.weight"): v for k, v in s.items()},
            "names of a PEFT model in memory",
        ),
        (lambda s: {k: v for k, v in s.items() if "lora_A" not in k}, "has no A (down)"),
        (lambda s: {k: v * float("nan") for k, v in s.items()}, "holds numbers that are not finite"),
    ],
)
def test_a_grids_teacher_is_held_to_what_a_recipes_is(run, student, tiny_base, tmp_path, spoil, said):
    backbone = load_backbone(tiny_base, SHAPE)
    add_lora(backbone.transformer, "t", LoraRecipe(rank=2), backbone.lora_targets, seed=0)
    state = load_file(save_diffusers_lora(backbone.transformer, "t", tmp_path / "plain"))
    save_file(spoil(state), tmp_path / "lora.safetensors")
    more = ("--grid", "--base", tiny_base, "--teacher", f"x={tmp_path / 'lora.safetensors'}")
    code, _, err = run(student, "a ring", *more, "--out", "drawn")
    assert code == 2 and said in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_students_pipeline_with_numbers_that_are_none_draws_nothing(run, student, tmp_path, value):
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    [file] = (copy / "transformer").glob("*.safetensors")
    state = load_file(file)
    save_file({k: v * float(value) for k, v in state.items()}, file)
    code, _, err = run(copy, "a ring", "--out", "a.png")
    assert code == 2 and "not finite" in err.splitlines()[-1] and not (tmp_path / "a.png").exists()
    with pytest.raises(UserError, match="not finite"):  # as `danceopd serve` opens it
        open_student(copy)


def test_a_failure_while_drawing_leaves_nothing(run, student, tmp_path, monkeypatch):
    from danceopd.inference import draw_batch

    def broken(image):
        raise RuntimeError("no space left")

    monkeypatch.setattr(draw_batch, "encode_picture", broken)
    monkeypatch.setattr(sys, "argv", ["danceopd", "generate", str(student), "a", "--seed", "1", "--seed", "2"])
    with pytest.raises(RuntimeError, match="no space left"):
        cli.main()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("ending", [*FORMATS, ".JPG"])
def test_a_file_has_the_format_its_name_says_and_is_drawn_over(run, student, tmp_path, ending):
    for seed in (1, 2):
        assert run(student, "red ring", "--seed", seed, "--steps", 1, "--out", f"p{ending}")[0] == 0
        with Image.open(tmp_path / f"p{ending}") as picture:
            assert (picture.format, picture.size) == (FORMATS[ending.lower()], (64, 64))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("p.bmp", "p.bmp: ends in none of .png, .jpg, .jpeg, .webp"),
        ("p", "p: ends in none of"),
        ("photo.png", "photo.png: is there already, and no older output of this command"),
        ("notes.png", "notes.png: is there already"),
        ("folder.png", "folder.png: a folder, and a file is to be written"),
        ("photo.png/p.png", "photo.png is a file"),
        ("x" * 300 + ".png", "no place for an output"),
    ],
)
def test_a_place_that_is_none_is_said_before_drawing(run, student, tmp_path, monkeypatch, out, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "notes.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    monkeypatch.setattr("danceopd.inference.generate.load_backbone", None)  # nothing is loaded
    code, _, err = run(student, "red ring", "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_prompt_that_is_cut_is_told(run, student):
    code, _, err = run(student, "a small green square " * 300, "--steps", 1)
    assert code == 0
    assert "1 of 1 prompts are cut at" in err
