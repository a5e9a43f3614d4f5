"""Two LoRA teachers become one student, on a tiny model of every family, from its shipped recipe at other sizes.

The training records are of two sizes, each trained on at its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_families import base_field, every_family, noise_of, png, with_lora
from tiny_models import FAMILIES, SD3

from danceopd import steps
from danceopd.backbones import load_backbone, qwen_image
from danceopd.backbones.bases import SHIPPED
from danceopd.backbones.lora import adapter_parameters, save_lora
from danceopd.cli.recipe import check
from danceopd.config.load import RECIPES as RECIPE_PACKAGE
from danceopd.config.load import load_recipe
from danceopd.config.recipe import CheckpointTeacher, Recipe
from danceopd.config.shipped import shipped_names
from danceopd.data.encode import encode_records
from danceopd.data.records import Record, write_shard
from danceopd.errors import UserError
from danceopd.evaluation.metrics import read_picture
from danceopd.evaluation.samplings import Samplings
from danceopd.evaluation.scoring import draw_field
from danceopd.flow.field_io import load_field
from danceopd.flow.rollout import roll_out
from danceopd.inference.generate import encode_picture

RECIPES = {
    "flux2_klein": "flux2_klein_local_global",
    "z_image": "zimage_local_global",
    "sd3": "sd35_two_loras",
    "qwen_image": "qwen_image_edit",
}
STEPS = 3  # of a rollout
SCALE = 2.0  # of their random weights: teachers with something to teach
SIZES = [
    "model.height=64",
    "model.width=64",
    "model.sizes=own",
    "distill.lora={rank: 8, alpha: 8}",
    "distill.steps=16",
    "distill.lr=0.03",
    "distill.warmup=2",
    "distill.batch=8",
    "distill.accumulate=1",
    f"distill.rollout_steps={STEPS}",
    "evaluate.steps=2",
    "evaluate.per_task=2",
    "evaluate.batch=4",
    "evaluate.drift=null",
]
RECORDS = {(64, 64): ("train", "train", "val", "test"), (32, 96): ("train", "train")}


def recipe_of(family, folder) -> Recipe:
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in family.settings.items()}
    sizes = [
        f"model.base={folder}",
        *(f"model.{key}={value}" for key, value in own.items()),
        *SIZES,
    ]
    return load_recipe(RECIPES[family.name], sizes)


def teach(recipe: Recipe, base) -> dict:
    """A LoRA folder for each of the recipe's teachers where it looks for it; {task: its field}."""
    fields = {}
    for seed, (task, spec) in enumerate(recipe.tasks.items()):
        fields[task] = with_lora(base, spec.teacher, seed)
        for parameter in adapter_parameters(base.transformer, spec.teacher):
            parameter.data.mul_(SCALE)
        save_lora(base.transformer, spec.teacher, recipe.teachers[spec.teacher].path)
    return fields


def write_dataset(recipe: Recipe, fields: dict, folder) -> None:
    """Records whose targets are what the recipe's teachers draw, but for the lowest rows of an edit, which stay."""
    records = []
    for task, field in fields.items():
        for size, splits in RECORDS.items():
            plain = [
                Record(
                    f"{task}/{i}/{size[1]}",
                    task,
                    f"{task} {i}",
                    png(i, *size) if recipe.tasks[task].needs_source else None,
                    None,
                    split,
                )
                for i, split in enumerate(splits)
            ]
            encoded = encode_records(field.backbone, plain, *size, None, "k", targets=False)
            samplings = Samplings(recipe, lambda field=field: field.backbone.encode_prompts([""])[0])
            asked, spec = samplings.drawn(recipe.tasks[task].teacher, field)
            drawn = draw_field(asked, encoded, [record.id for record in plain], spec)
            for record, picture in zip(plain, drawn, strict=True):
                if record.source is not None:
                    picture[-4:] = read_picture(record.source, *size, record.id)[-4:]
                records.append(replace(record, target=encode_picture(Image.fromarray(picture))))
    folder.mkdir()
    write_shard(records, folder / "records.parquet")


@pytest.mark.slow
@every_family
def test_two_lora_teachers_become_one_student(folder_of, family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipe's paths are relative
    monkeypatch.setattr(qwen_image, "CONDITION_IMAGE_SIZE", 64 * 64)  # how large its text encoder is shown a source
    recipe = recipe_of(family, folder_of(family))
    assert {teacher.kind for teacher in recipe.teachers.values()} == {"lora"} and len(recipe.teachers) == 2
    base = load_backbone(folder_of(family), recipe.model)
    write_dataset(recipe, teach(recipe, base), tmp_path / recipe.data.inputs[0])

    workspace = tmp_path / "runs"
    product = steps.resolve_base(recipe, workspace)
    data = steps.build_data(recipe, workspace, repo=tmp_path)
    teachers = {
        name: steps.finetune_teacher(steps.Run(recipe, workspace, product, data), name) for name in recipe.teachers
    }
    student = steps.distill_student(steps.Run(recipe, workspace, product, data), teachers)
    report = steps.evaluate_student(steps.Run(recipe, workspace, product, data), teachers, student)
    assert (report.folder / "report.html").is_file()

    exported = load_backbone(student.pipeline, recipe.model.model_copy(update={"dtype": "float32"}))
    base = load_backbone(folder_of(family), recipe.model)
    ready = steps.open_training(steps.Run(recipe, workspace, product, data), teachers)
    far, near = 0.0, 0.0  # over both tasks: SD 3.5 has only the prompt to tell them by, and learns their mean first
    for task, rows in ready.encoded.rows_by_task().items():
        taught = load_field(base, task, teachers[recipe.tasks[task].teacher].folder)
        fields = (base_field(base), base_field(exported), taught)
        groups = [ready.encoded.condition(group) for group in ready.encoded.shape_groups(rows)]
        assert {(each.height, each.width) for each in groups} == set(RECORDS)
        for condition in groups:  # at the last step, near which these recipes ask
            count, grid = len(condition), base.sigmas(STEPS, condition.height, condition.width)
            noise = noise_of(base, count, condition.height, condition.width)
            state = roll_out(fields[0], noise, grid, torch.full((count,), STEPS - 1), condition).state
            with torch.no_grad():
                before, after, wanted = (field(state, grid[STEPS - 1].expand(count), condition) for field in fields)
            far, near = far + (before - wanted).square().sum(), near + (after - wanted).square().sum()
    assert near < 0.95 * far


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_names(RECIPE_PACKAGE))
def test_recipe_check_tells_what_every_shipped_recipe_takes(folder_of, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where nothing lies that a recipe names
    monkeypatch.setenv("COLUMNS", "300")
    shipped = load_recipe(name)
    family = next(family for family in FAMILIES if family.name == shipped.model.backbone)
    settings = [] if shipped.model.base in SHIPPED else [f"model.base={folder_of(family)}"]
    if family is SD3:  # the tiny one has no places for more
        settings += ["model.height=256", "model.width=256"]
    absent = [each.path for each in shipped.teachers.values() if isinstance(each, CheckpointTeacher)]
    absent += shipped.data.inputs
    with pytest.raises(UserError, match="no such file or folder") if absent else nullcontext() as refused:
        check(name, settings, gpus=8, tflops=300.0, workspace=tmp_path)
    told = capsys.readouterr().out
    for word in ("base", *shipped.teachers, "data", "memory per GPU", "activations", "per update of", "on 8 GPUs that"):
        assert word in told
    assert all(path in told and path in str(refused.value) for path in absent)
    if "local_global" in name:  # as published (arXiv 2606.27377): what decides how long it takes
        spec = shipped.distill
        assert (spec.lora.rank, spec.lr, spec.rollout_steps, spec.steps) == (128, 2e-4, 16, 3000)
        assert (shipped.model.height, shipped.model.width) == (1024, 1024)
        assert "per update of 32" in told and "in 3,000 updates" in told
