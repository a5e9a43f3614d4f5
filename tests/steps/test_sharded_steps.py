"""The steps that train, by two processes that share base, teachers and student."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from many_processes import together

from danceopd import steps
from danceopd.backbones import load_backbone
from danceopd.backbones.lora import add_lora, save_lora
from danceopd.config.load import load_recipe
from danceopd.config.recipe import DistillRecipe, LoraRecipe
from danceopd.evaluation import scoring
from danceopd.evaluation.validate import GateValidator
from danceopd.export.student import check_export
from danceopd.files import hash_folder, read_json
from danceopd.pretraining.world_base import SHAPE
from danceopd.steps.encodings import Encoder, open_backbone
from danceopd.steps.teachers import load_teachers
from danceopd.training.fsdp import share_out
from danceopd.training.processes import this_process

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
    "distill={trainable: lora, parallel: shard, lr: 0.01, steps: 2, batch: 4, rollout_steps: 4,"
    " rollout_stride: 2, precision: bfloat16}",
    "evaluate.per_task=2",
    "evaluate.steps=1",
]


def train_all(rank, base_folder, workspace):
    return make_all(base_folder, workspace, SETTINGS)


def make_all(base_folder, workspace, settings):
    recipe = load_recipe("world", [f"model.base={base_folder}", *settings])
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


def guide_all(rank, base_folder, workspace):
    """The same teachers, guided; nothing may train but the student."""
    import danceopd.finetune

    danceopd.finetune.finetune = None
    own = [f"teachers.{name}.guidance=1.5" for name in ("lora", "full")] + ["tasks.global_style.gates=[]"]
    return make_all(base_folder, workspace, [*SETTINGS, *own])


@pytest.mark.slow
def test_processes_that_share_weights_guide_teachers_without_another_training(tiny_base, tmp_path):
    first, _ = together(2, train_all, tiny_base, tmp_path)
    second, other = together(2, guide_all, tiny_base, tmp_path)
    assert second == other
    for name in ("lora", "full"):
        before, after = Path(first[name]), Path(second[name])
        assert before != after
        assert read_json(after / "field.json")["guidance"] == {"scale": 1.5, "batched": True}
        assert hash_folder(before, "**/*.safetensors") == hash_folder(after, "**/*.safetensors")
        assert read_json(after / steps.STEP)["facts"]["tuned"]["forwards"] == 3 * 4 * 2


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


CHOICE = [
    "data.world={t2i: {train: 2, val: 5, test: 1}, local_edit: {train: 2, val: 5, test: 1}}",
    "tasks={t2i: {teacher: style, needs_source: false, metrics: [scene_accuracy]},"
    " local_edit: {teacher: base, needs_source: true, metrics: [psnr],"
    " gates: [{metric: psnr, max_drop: 1, champion_margin: 1}]}}",
    "distill={lr: 0.05, steps: 1, batch: 2, select: {every: 1, per_task: 5}}",
    "evaluate={per_task: 5, steps: 2, batch: 2}",
]

TRAINED = {"lr": 0.05, "steps": 1, "batch": 2}


def prove_and_choose(rank, base_folder, workspace, style):
    """A teacher's proof and two validations of it as a student, the second of shared weights; and what was drawn."""
    drawn, sample = [], scoring.sample_pixels

    def counting(field, condition, seeds, count, *more):
        drawn.append(len(seeds))
        return sample(field, condition, seeds, count, *more)

    scoring.sample_pixels = counting
    teachers = f"teachers={{base: {{kind: base}}, style: {{kind: lora, path: {style}}}}}"
    recipe = load_recipe("world", [f"model.base={base_folder}", teachers, *CHOICE])
    base = steps.resolve_base(recipe, workspace)
    run = steps.Run(recipe, workspace, base, steps.build_data(recipe, workspace, repo=workspace))
    products = {name: steps.finetune_teacher(run, name) for name in recipe.teachers}
    proof, processes = sum(drawn), this_process()
    encoder = Encoder(run, open_backbone(run))
    fields, sets = load_teachers(encoder, products), encoder.held_out("val", 5)
    found = []
    for parallel in ("replicate", "shard"):
        spec = DistillRecipe(**TRAINED, parallel=parallel)
        shared = share_out(encoder.backbone, fields.values(), spec, "student", processes)
        assert (shared is not None) == (parallel == "shard" and processes.count > 1)
        validate = GateValidator(recipe, fields, sets, processes=processes)
        found += [validate(fields["style"]), validate(fields["style"])]
    scores = products["style"].facts["scores"]
    return {"scores": scores, "chosen": [vars(v) for v in found], "proof": proof, "drawn": sum(drawn)}


@pytest.mark.slow
def test_two_processes_prove_teachers_and_choose_a_state_as_one_does(tiny_base, tmp_path):
    backbone = load_backbone(tiny_base, SHAPE)
    add_lora(backbone.transformer, "style", LoraRecipe(rank=2), backbone.lora_targets, seed=0)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in backbone.transformer.named_parameters():
            if ".style." in name:
                weight.normal_(0, 0.2, generator=noise)
    save_lora(backbone.transformer, "style", tmp_path / "style")
    [alone] = together(1, prove_and_choose, tiny_base, tmp_path / "1", tmp_path / "style")
    assert alone["proof"] == 2 * 5 and alone["drawn"] == 10 + 2 * (4 + 2) * 5
    both = together(2, prove_and_choose, tiny_base, tmp_path / "2", tmp_path / "style")
    for found in both:
        for part in ("scores", "chosen"):  # other batches round otherwise
            assert dict(leaves(found[part])) == pytest.approx(dict(leaves(alone[part])), rel=1e-4, abs=1e-6)
    assert [found["drawn"] for found in both] == [alone["drawn"] * 3 // 5, alone["drawn"] * 2 // 5]


def leaves(tree, path=""):
    """The numbers of a tree by their path."""
    if isinstance(tree, dict | list):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(part, f"{path}/{key}")
    elif isinstance(tree, int | float):
        yield path, tree
