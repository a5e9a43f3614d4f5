"""The update: whose gradient, whose teacher, which samples, and that it learns."""

from __future__ import annotations

import pytest
import torch

from danceopd.backbones import load_backbone
from danceopd.data.assemble import open_dataset
from danceopd.data.encoded import encode_records
from danceopd.distill import Distillation, distill
from danceopd.fields import VelocityField
from danceopd.finetune import finetune
from danceopd.objectives import velocity_matching_loss
from danceopd.queries import query_window
from danceopd.recipe import DistillRecipe, FinetuneRecipe, LoraRecipe
from danceopd.training import new_learner
from danceopd.world_base import SHAPE

TEACHER_OF = {"t2i": "base", "local_edit": "editor", "global_style": "editor"}
WEIGHTS = {"t2i": 1.0, "local_edit": 1.0, "global_style": 2.0}


@pytest.fixture
def base(tiny_base):
    return load_backbone(tiny_base, SHAPE)


@pytest.fixture
def encoded(base, small_data):
    return encode_records(base, open_dataset(small_data).records("train"), 64, 64, None, "k", targets=False)


def editor(base):
    """A teacher that differs from the base."""
    network = base.new_transformer()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "to_out" in name or "linear_out" in name:
                weight.mul_(20)
    return VelocityField("editor", base, network.requires_grad_(False))


def spec(**changes):
    return DistillRecipe(
        **({"lr": 1e-3, "steps": 3, "batch": 6, "rollout_steps": 3, "log_every": 1, "warmup": 2} | changes)
    )


def run(base, encoded, **changes):
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    return distill(base, encoded, teachers, TEACHER_OF, WEIGHTS, spec(**changes))


def test_one_update_sends_gradient_to_the_student_alone(base, encoded):
    learner = new_learner(base, "student", spec())
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    grid = base.sigmas(3, 64, 64)
    setup = Distillation(base, encoded, teachers, TEACHER_OF, WEIGHTS, grid)
    by_task = encoded.rows_by_task()
    rows = [by_task[t][i] for t in TEACHER_OF for i in range(2)]
    tags = [t for t in TEACHER_OF for _ in range(2)]
    figures = setup.update(learner, rows, tags, query_window("uniform"), torch.Generator().manual_seed(0))
    assert all(p.grad is not None for p in learner.parameters)
    for field in teachers.values():
        assert all(p.grad is None for p in field.network.parameters())
    assert figures.samples == 6
    assert {task: len(v) for task, v in figures.losses.items()} == {"t2i": 2, "local_edit": 2, "global_style": 2}
    assert max(figures.losses["t2i"]) < 1e-10  # the student still is the base, its drawing teacher
    assert min(figures.losses["local_edit"]) > 1e-4


def test_the_loss_is_the_float32_mean_and_stops_at_the_teacher():
    student = torch.randn(3, 4, 2, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(3, 4, 2, dtype=torch.bfloat16, requires_grad=True)
    loss = velocity_matching_loss(student, teacher)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (student.float() - teacher.float()).pow(2).flatten(1).mean(1))
    loss.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize(("trainable", "lr"), [("full", 5e-3), ("lora", 2e-2)])
def test_distillation_learns_and_leaves_the_base_as_it_was(base, encoded, trainable, lr):
    before = {name: p.clone() for name, p in base.transformer.named_parameters()}
    changes = {"trainable": trainable, "lora": LoraRecipe(rank=8, alpha=16), "steps": 25, "lr": lr}
    student, history = run(base, encoded, **changes)
    assert history[-1]["loss"]["local_edit"] < 0.6 * history[0]["loss"]["local_edit"]
    now = dict(base.transformer.named_parameters())
    for name, weight in before.items():
        kept = now[name] if name in now else now[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(kept, weight)
    assert not any(p.requires_grad for p in student.network.parameters())


def test_a_student_may_start_from_a_teacher_and_leaves_it_alone(base, encoded):
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    before = teachers["editor"].network.proj_out.weight.clone()
    _, history = distill(base, encoded, teachers, TEACHER_OF, WEIGHTS, spec(start="editor", steps=1))
    assert history[0]["loss"]["local_edit"] < 1e-10  # it still is its editing teacher
    assert history[0]["loss"]["t2i"] > 1e-4
    assert torch.equal(teachers["editor"].network.proj_out.weight, before)


def test_the_same_seed_gives_the_same_student_and_another_seed_another(base, encoded):
    def weights(seed):
        return run(base, encoded, seed=seed)[0].network.proj_out.weight

    first = weights(1)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_history_counts_every_query_and_its_forwards(base, encoded):
    _, history = run(base, encoded, steps=4, log_every=2, window="semantic")
    assert [entry["step"] for entry in history] == [2, 4]
    assert sum(sum(bins) for bins in history[0]["sigma_histogram"].values()) == 12
    assert all(4 <= entry["forwards_per_sample"] <= 4 + 2 for entry in history)


def test_a_schedule_asks_early_first_and_late_afterwards(base, encoded):
    phases = [{"until": 0.5, "window": [0.9, 1.0]}, {"until": 1.0, "window": [0.0, 0.4]}]
    _, history = run(base, encoded, steps=4, log_every=2, window=phases)
    early, late = ([sum(b) for b in zip(*e["sigma_histogram"].values(), strict=True)] for e in history)
    assert sum(early[8:]) == sum(early) == 12
    assert sum(late[:4]) == sum(late) == 12


def test_previews_come_at_their_steps_and_at_the_end(base, encoded):
    seen = []
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    distill(base, encoded, teachers, TEACHER_OF, WEIGHTS, spec(steps=5, preview_every=2),
            preview=lambda field, step: seen.append((field.name, step)))  # fmt: skip
    assert seen == [("student", 2), ("student", 4), ("student", 5)]


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_teacher_learns_its_task(base, small_data, trainable, optimizer):
    records = open_dataset(small_data).records("train", "global_style")
    encoded = encode_records(base, records, 64, 64, None, "k", targets=True)
    train = FinetuneRecipe(
        trainable=trainable, lora=LoraRecipe(rank=8, alpha=16), optimizer=optimizer, lr=1e-2, steps=40, batch=12,
        warmup=2, log_every=5, prompt_dropout=0.1,
    )  # fmt: skip
    _, history = finetune(base, "styler", encoded, train)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
