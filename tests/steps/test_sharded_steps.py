"""The steps that train, by two processes that share base, teachers and student."""

from __future__ import annotations

import shutil
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


REPLICAS = [
    "data.world={t2i: {train: 6, val: 2, test: 5}, local_edit: {train: 6, val: 2, test: 5},"
    " global_style: {train: 6, val: 2, test: 5}}",
    "tasks.local_edit={teacher: base, needs_source: true, metrics: [psnr]}",
    "tasks.global_style={teacher: base, needs_source: true, metrics: [psnr]}",
    "tasks.t2i.gates=[]",
    "teachers={base: {kind: base}}",
    "distill={trainable: lora, lr: 0.05, steps: 1, batch: 4, rollout_steps: 2}",
    "evaluate={per_task: 5, steps: 2, batch: 2, drift: {records: 3, steps: [1, 2]}}",
]


def evaluate_all(rank, base_folder, workspace, settings):
    recipe = load_recipe("world", [f"model.base={base_folder}", *settings])
    base = steps.resolve_base(recipe, workspace)
    run = steps.Run(recipe, workspace, base, steps.build_data(recipe, workspace, repo=workspace))
    teachers = {name: steps.finetune_teacher(run, name) for name in recipe.teachers}
    return str(steps.evaluate_student(run, teachers, steps.distill_student(run, teachers)).folder)


@pytest.mark.slow
def test_several_processes_evaluate_as_one_does(tiny_base, tmp_path):
    [alone] = together(1, evaluate_all, tiny_base, tmp_path, REPLICAS)
    metrics = read_json(Path(alone) / "metrics.json")
    shutil.rmtree(alone)
    folders = together(3, evaluate_all, tiny_base, tmp_path, REPLICAS)
    assert folders == [alone] * 3
    again = read_json(Path(alone) / "metrics.json")
    for key in ("scores", "drift"):  # other batches round otherwise
        assert dict(leaves(again[key])) == pytest.approx(dict(leaves(metrics[key])), rel=1e-4, abs=1e-6)
    for key in ("records", "forwards", "passed"):
        assert again[key] == metrics[key]


def leaves(tree, path=""):
    """The numbers of a tree by their path."""
    if isinstance(tree, dict | list):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(part, f"{path}/{key}")
    elif isinstance(tree, int | float):
        yield path, tree
