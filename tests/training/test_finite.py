"""Not a number ends training: which step, task and records, nothing saved; and a few batches left out, if allowed."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch

from danceopd.backbones import load_backbone
from danceopd.config.recipe import MERGES, METHODS, DistillRecipe, FinetuneRecipe, LoraRecipe
from danceopd.data.assemble import open_dataset
from danceopd.data.encode import encode_records
from danceopd.distill import distill
from danceopd.errors import UserError
from danceopd.finetune import finetune
from danceopd.flow.fields import VelocityField
from danceopd.pretraining.world_base import SHAPE
from danceopd.training.checkpoints import Checkpoints
from danceopd.training.finite import not_finite

COMMON = {"trainable": "lora", "lora": LoraRecipe(rank=2, alpha=4), "lr": 1e-3, "steps": 4, "batch": 4, "warmup": 1}
COMMON |= {"log_every": 1, "checkpoint_every": 1}


class Bench:
    """A tiny base, and records of which one is spoiled."""

    def __init__(self, folder, data, spoiled: str | None = "t2i"):
        self.base = load_backbone(folder, SHAPE)
        records = [r for task in ("t2i", "local_edit") for r in open_dataset(data).records("train", task)[:3]]
        encoded = encode_records(self.base, records, 64, 64, None, "k", targets=True)
        prompts, targets, rows = encoded.prompts[:].clone(), encoded.targets[:].clone(), encoded.prompt_row.clone()
        if spoiled is not None:
            self.row = encoded.tasks.index(spoiled)
            self.id = records[self.row].id
            targets[encoded.target_row[self.row]] = math.nan
            prompts = torch.cat([prompts, torch.full_like(prompts[:1], math.nan)])
            rows[self.row] = len(prompts) - 1
        names = [record.id for record in records]
        self.encoded = replace(
            encoded, prompts=prompts, targets=targets, prompt_row=rows, ids=lambda rows: [names[row] for row in rows]
        )
        teacher = self.base.new_transformer().requires_grad_(False)
        teacher.proj_out.weight.mul_(2)
        self.teachers = {"base": VelocityField("base", self.base, teacher)}

    def distill(self, folder=None, **changes):
        spec = DistillRecipe(rollout_steps=2, **{**COMMON, **changes})
        of = dict.fromkeys(("t2i", "local_edit"), "base")
        saves = None if folder is None else Checkpoints(folder, 9, "run")
        return distill(self.base, self.encoded, self.teachers, of, dict.fromkeys(of, 1.0), spec, checkpoints=saves)

    def finetune(self, folder=None, **changes):
        saves = None if folder is None else Checkpoints(folder, 9, "run")
        return finetune(self.base, "painter", self.encoded, FinetuneRecipe(**{**COMMON, **changes}), saves)


@pytest.fixture
def bench(tiny_base, small_data):
    return lambda spoiled="t2i": Bench(tiny_base, small_data, spoiled)


def test_a_spoiled_record_ends_distillation_by_its_name(bench, tmp_path):
    found = bench()
    said = rf"distill: the loss is not a number at step \d, task t2i, records {found.id}; nothing is exported"
    with pytest.raises(UserError, match=said):
        found.distill(tmp_path, steps=8)
    for saved in tmp_path.glob("*/state.safetensors"):
        from safetensors.torch import load_file

        assert all(t.isfinite().all() for t in load_file(saved).values() if t.is_floating_point())


def test_a_spoiled_target_ends_fine_tuning_by_its_name(bench):
    found = bench("local_edit")
    said = rf"teachers.painter.train: the loss is not a number at step \d, task local_edit, records {found.id};"
    with pytest.raises(UserError, match=said):
        found.finetune(steps=8)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in MERGES])
def test_every_method_is_watched(bench, method):
    with pytest.raises(UserError, match=r"distill: the (loss|gradient) is not a number at step \d, task t2i"):
        bench().distill(steps=8, method=method, trainable="full", lr=1e-4)


@pytest.mark.slow
def test_a_few_bad_batches_are_left_out_counted_and_kept_over_a_restart(bench, caplog, tmp_path):
    found = bench()
    with caplog.at_level(logging.WARNING, "danceopd"):
        student, history = found.distill(tmp_path, steps=8, skip_bad_batches=8)
    left_out = [line for line in caplog.messages if "batch left out" in line]
    assert left_out and left_out[-1].endswith(f"{len(left_out)} of 8")
    assert all(torch.isfinite(p).all() for p in student.network.parameters())
    losses = [value for entry in history for value in entry["loss"].values()]
    assert losses and all(map(math.isfinite, losses))
    with pytest.raises(UserError, match=rf"skip_bad_batches leave some batches out \({len(left_out) - 1} were\)"):
        bench().distill(steps=8, skip_bad_batches=len(left_out) - 1)


def test_weights_that_overflow_are_never_handed_over(bench, monkeypatch, tmp_path):
    found = bench(None)
    with pytest.raises(UserError, match=r"distill: (weights are not finite|the (loss|gradient) is not a number)"):
        spec = {"lr": 1.0, "trainable": "full", "steps": 6}
        step = torch.optim.AdamW.step

        def blow_up(self, *args, **more):
            step(self, *args, **more)
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.inf)

        monkeypatch.setattr(torch.optim.AdamW, "step", blow_up)
        found.distill(tmp_path, **spec)
    assert not list(tmp_path.glob("step-*"))


def test_good_training_is_as_before(bench):
    _, history = bench(None).distill()
    assert len(history) == 4 and all(math.isfinite(entry["grad_norm"]) for entry in history)


def test_rows_are_found_where_samples_have_several_losses():
    losses = {"a": [1.0, math.nan, 1.0, 1.0], "b": [1.0, 1.0]}
    assert not_finite(losses, [5, 6, 7], ["a", "b", "a"]) == [5]
    assert not_finite({"a": [1.0, math.inf]}, [5, 7], ["a", "a"]) == [7]


@pytest.mark.parametrize("value", ["1e30", ".inf", ".nan", "-1", "0", "11"])
def test_a_rate_that_cannot_be_is_refused_in_the_recipe(value):
    from danceopd.config.load import load_recipe

    with pytest.raises(UserError, match=r"distill.lr"):
        load_recipe("world", [f"distill.lr={value}"])
