"""The steps that train, by two processes that share base, teachers and student."""

from __future__ import annotations

from pathlib import Path

import pytest
from many_processes import together

from danceopd import steps
from danceopd.config.load import load_recipe
from danceopd.export.student import check_export
from danceopd.files import read_json

SETTINGS = [
    "data.world={t2i: {train: 8, val: 2, test: 2}, local_edit: {train: 8, val: 2, test: 2},"
    " global_style: {train: 8, val: 2, test: 2}}",
    "tasks.local_edit={teacher: base, needs_source: true, metrics: [psnr]}",
    "tasks.global_style={teacher: full, needs_source: true, metrics: [psnr]}",
    "tasks.t2i.teacher=lora",
    "tasks.t2i.gates=[]",
    "teachers={base: {kind: base},"
    " lora: {kind: finetune, task: t2i, train: {trainable: lora, lr: 0.1, steps: 2, batch: 4, parallel: shard}},"
    " full: {kind: finetune, task: global_style, train: {lr: 0.01, steps: 2, batch: 4, parallel: shard}}}",
    "distill={trainable: lora, parallel: shard, lr: 0.01, steps: 2, batch: 4, rollout_steps: 2, precision: bfloat16}",
    "evaluate.per_task=2",
    "evaluate.steps=1",
]


def train_all(rank, base_folder, workspace):
    recipe = load_recipe("world", [f"model.base={base_folder}", *SETTINGS])
    base = steps.resolve_base(recipe, workspace)
    data = steps.build_data(recipe, workspace, repo=workspace)
    run = steps.Run(recipe, workspace, base, data)
    teachers = {name: steps.finetune_teacher(run, name) for name in recipe.teachers}
    student = steps.distill_student(run, teachers)
    return {name: str(product.folder) for name, product in (teachers | {"student": student}).items()}


@pytest.mark.slow
def test_two_processes_make_teachers_and_student_of_shares(tiny_base, tmp_path):
    first, second = together(2, train_all, tiny_base, tmp_path)
    assert first == second
    student = Path(first["student"])
    check_export(student)
    assert read_json(student / steps.STEP)["facts"]["steps"] == 2
    assert {path.name for path in (student / "lora").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert read_json(Path(first["lora"]) / "field.json")["kind"] == "lora"
    full = Path(first["full"])
    assert read_json(full / "field.json")["kind"] == "full"
    assert len(list((full / "transformer").glob("*.safetensors"))) == 3  # a file a block, and one for the rest
