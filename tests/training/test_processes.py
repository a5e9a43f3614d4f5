"""Two processes (gloo, CPU) do what one does."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
import traceback
from datetime import timedelta

import pytest
import torch
from accelerate import PartialState
from many_processes import free_port, name_process, together
from safetensors.torch import load_file, save_file

from danceopd.backbones import load_backbone
from danceopd.backbones.sharded import whole
from danceopd.config.recipe import DistillRecipe, FinetuneRecipe, LoraRecipe
from danceopd.data.assemble import open_dataset
from danceopd.data.encode import encode_records
from danceopd.distill import distill
from danceopd.files import read_json, write_json
from danceopd.finetune import finetune
from danceopd.flow.fields import VelocityField
from danceopd.pretraining.world_base import SHAPE
from danceopd.training.checkpoints import Checkpoints
from danceopd.training.processes import Processes, share, this_process

WEIGHTS = {"t2i": 1.0, "local_edit": 2.0}
COMMON = {"lr": 1e-3, "steps": 3, "batch": 5, "log_every": 1, "warmup": 2, "lora": LoraRecipe(rank=4, alpha=8)}


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_a_batch_out_without_gap_or_overlap(parts, count):
    taken = [share(7, Processes(rank, count, torch.device("cpu")), parts) for rank in range(count)]
    assert sorted(i for process in taken for part in process for i in part) == list(range(7))
    assert all(part for process in taken for part in process)
    assert all(len(process) <= parts for process in taken)


def test_a_process_may_have_nothing_of_a_shape():
    assert share(1, Processes(1, 2, torch.device("cpu")), 3) == []


@pytest.mark.parametrize("shapes", [[1] * 8, [3, 1, 2, 2], [5, 3]])
def test_many_small_shapes_fall_on_all_processes_alike(shapes):
    taken = []
    for rank in range(4):
        before, mine = 0, 0
        for count in shapes:
            mine += sum(map(len, share(count, Processes(rank, 4, torch.device("cpu")), 2, before)))
            before += count
        taken.append(mine)
    assert taken == [2, 2, 2, 2]


def train(kind, base_folder, data, out, rank, changes, saves=None, stop_after=None):
    """Train the tiny base as this process; write the weights and the history."""
    base, dataset = load_backbone(base_folder, SHAPE), open_dataset(data)
    checkpoints = None if saves is None else Checkpoints(saves, 2, "a run")
    settings = COMMON | changes
    if kind == "finetune":
        encoded = encode_records(base, dataset.records("train", "local_edit"), 64, 64, None, "k", targets=True)
        field, history = finetune(base, "editor", encoded, FinetuneRecipe(prompt_dropout=0.5, **settings), checkpoints)
    else:
        records = [record for task in WEIGHTS for record in dataset.records("train", task)]
        encoded = encode_records(base, records, 64, 64, None, "k", targets=False)
        editor = base.new_transformer().requires_grad_(False)
        editor.proj_out.weight.mul_(2)
        teachers = {"base": VelocityField("base", base, base.transformer), "editor": VelocityField("e", base, editor)}
        teacher_of = {"t2i": "base", "local_edit": "editor"}

        def preview(field, step):
            field(torch.zeros(1, *base.latent_shape(64, 64)), torch.ones(1), encoded.condition([0]))
            if step == stop_after and rank == 1:  # one of them is told, all of them stop
                os.kill(os.getpid(), 15)

        spec = DistillRecipe(rollout_steps=3, preview_every=1, **settings)
        field, history = distill(base, encoded, teachers, teacher_of, WEIGHTS, spec, preview, checkpoints)
    weights = {n: whole(p.detach()).contiguous() for n, p in field.network.named_parameters()}
    save_file(weights, out / f"{rank}.safetensors")
    write_json(out / f"{rank}.json", history)


def wait_for_the_slow_one(rank, port, pipe):
    name_process(rank, 2, port)
    PartialState(cpu=True, timeout=timedelta(seconds=2))  # as a collective's own limit, in small
    mine = this_process()
    try:
        if mine.main:
            time.sleep(5)
        mine.wait()
        pipe.send("done")
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


@pytest.mark.slow
def test_waiting_for_one_that_works_alone_outlasts_a_collectives_limit():
    context, port = multiprocessing.get_context("spawn"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    started = [
        context.Process(target=wait_for_the_slow_one, args=(rank, port, there)) for rank, (_, there) in enumerate(pipes)
    ]
    for one in started:
        one.start()
    said = [here.recv() if here.poll(240) else "silent" for here, _ in pipes]
    for one in started:
        one.join(10)
        one.kill()
    assert said == ["done", "done"]


def run(count, *args):
    """Run `train` in so many processes; returns each one's weights and history, or Nones if they were interrupted."""
    args[3].mkdir()
    if None in together(count, job, *args):
        return [None] * count
    return [(load_file(args[3] / f"{r}.safetensors"), read_json(args[3] / f"{r}.json")) for r in range(count)]


def job(rank, kind, base_folder, data, out, changes, saves=None, stop_after=None):
    train(kind, base_folder, data, out, rank, changes, saves, stop_after)
    return True


def assert_close(found, wanted):
    """Sums are taken in another order: within a hundredth of the thousandth that AdamW moves a weight by a step."""
    for name, weight in wanted[0].items():
        torch.testing.assert_close(
            found[0][name], weight, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert [e["sigma_histogram"] for e in found[1]] == [e["sigma_histogram"] for e in wanted[1]]
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one["forwards_per_sample"] == pytest.approx(other["forwards_per_sample"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-10)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": "full"},
        {"trainable": "lora", "accumulate": 2, "ema": 0.5},
        {"trainable": "full", "parallel": "shard", "ema": 0.5},
        {"trainable": "full", "parallel": "shard", "accumulate": 2},
        {"trainable": "lora", "parallel": "shard", "accumulate": 2, "activation_checkpointing": True},
    ],
    ids=["full", "lora-parts", "sharded", "sharded-parts", "sharded-lora"],
)
def test_the_update_of_two_processes_is_that_of_one(tiny_base, small_data, tmp_path, changes):
    changes = changes | {"optimizer": "adamw"}
    [wanted] = run(1, "distill", tiny_base, small_data, tmp_path / "one", changes)
    found = run(2, "distill", tiny_base, small_data, tmp_path / "two", changes)
    for one in found:
        assert_close(one, wanted)
    for name, weight in found[0][0].items():
        assert torch.equal(weight, found[1][0][name]), name


@pytest.mark.slow
def test_two_processes_fine_tune_as_one(tiny_base, small_data, tmp_path):
    [wanted] = run(1, "finetune", tiny_base, small_data, tmp_path / "one", {})
    for one in run(2, "finetune", tiny_base, small_data, tmp_path / "two", {}):
        assert [e["loss"] for e in one[1]] == pytest.approx([e["loss"] for e in wanted[1]], rel=1e-4)
        for name, weight in wanted[0].items():
            torch.testing.assert_close(one[0][name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {"parallel": "replicate"},
        {"parallel": "shard"},
        {"parallel": "shard", "trainable": "lora", "optimizer": "muon"},
    ],
    ids=["replicate", "shard", "shard-lora-muon"],
)
def test_two_processes_stop_together_and_go_on(tiny_base, small_data, tmp_path, kind, caplog):
    changes = {"steps": 4, "checkpoint_every": 10, "ema": 0.5} | kind
    wanted = run(2, "distill", tiny_base, small_data, tmp_path / "whole", changes)
    saves = tmp_path / "saves"
    said = run(2, "distill", tiny_base, small_data, tmp_path / "broken", changes, saves, 2)
    assert said == [None, None]
    assert [p.name for p in saves.iterdir()] == ["step-00000002"]
    broken = shutil.copytree(saves, tmp_path / "as it broke off")
    found = run(2, "distill", tiny_base, small_data, tmp_path / "resumed", changes, saves)
    for one, other in zip(found, wanted, strict=True):
        assert one[1] == other[1]
        assert [n for n, w in other[0].items() if not torch.equal(one[0][n], w)] == []
    if kind["parallel"] == "replicate":
        return
    for count in (3, 1):  # on another number of them it is the same training, rounded otherwise
        shutil.copytree(broken, tmp_path / f"saves-{count}")
        for one in run(
            count, "distill", tiny_base, small_data, tmp_path / f"on-{count}", changes, tmp_path / f"saves-{count}"
        ):
            assert_close(one, wanted[0])
    [shard] = broken.glob("*/shard-00001-*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert Checkpoints(broken, 2, "a run").newest() is None
    assert f"{shard} is damaged" in caplog.text
