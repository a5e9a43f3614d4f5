"""Two processes (gloo, CPU) do what one does."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from datetime import timedelta

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from danceopd.backbones import load_backbone
from danceopd.backbones.sharded import whole
from danceopd.config.recipe import DistillRecipe, FinetuneRecipe, LoraRecipe
from danceopd.data.assemble import open_dataset
from danceopd.data.encoded import encode_records
from danceopd.distill import distill
from danceopd.errors import Interrupted
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
    torch.set_num_threads(1)
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


def name_process(rank, count, port):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, count, count, "127.0.0.1", port)
    os.environ.update(zip(names, map(str, values), strict=True))


def process(rank, count, port, pipe, *args):
    name_process(rank, count, port)
    try:
        train(args[0], args[1], args[2], args[3], rank, *args[4:])
        pipe.send("done")
    except Interrupted:
        pipe.send("interrupted")
        raise
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    """Run `train` in so many processes; returns each one's weights and history, or what they said if they stopped."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["danceopd.distill", "danceopd.backbones.flux2_klein", "danceopd.pretraining.world_base"]
    )
    port = free_port()
    args[3].mkdir()
    pipes, started = [], []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        started.append(context.Process(target=process, args=(rank, count, port, there, *args)))
        started[-1].start()
        there.close()
        pipes.append(here)
    said = [pipe.recv() for pipe in pipes]
    for one in started:
        one.join()
    assert set(said) <= {"done", "interrupted"}, said
    if "interrupted" in said:
        return said
    return [(load_file(args[3] / f"{r}.safetensors"), read_json(args[3] / f"{r}.json")) for r in range(count)]


def assert_close(found, wanted):
    """Sums are taken in another order: within a hundredth of the thousandth that AdamW moves a weight by a step."""
    for name, weight in wanted[0].items():
        torch.testing.assert_close(
            found[0][name], weight, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert [e["sigma_histogram"] for e in found[1]] == [e["sigma_histogram"] for e in wanted[1]]
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one["forwards_per_sample"] == pytest.approx(other["forwards_per_sample"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": "full"},
        {"trainable": "lora", "accumulate": 2, "ema": 0.5},
        {"trainable": "full", "parallel": "shard", "ema": 0.5},
        {"trainable": "full", "parallel": "shard", "accumulate": 2},
        {"trainable": "lora", "parallel": "shard", "accumulate": 2},
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
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_two_processes_stop_together_and_go_on(tiny_base, small_data, tmp_path, parallel):
    changes = {"parallel": parallel, "steps": 4, "checkpoint_every": 10, "ema": 0.5}
    wanted = run(2, "distill", tiny_base, small_data, tmp_path / "whole", changes)
    saves = tmp_path / "saves"
    said = run(2, "distill", tiny_base, small_data, tmp_path / "broken", changes, saves, 2)
    assert said == ["interrupted", "interrupted"]
    assert [p.name for p in saves.iterdir()] == ["step-00000002"]
    found = run(2, "distill", tiny_base, small_data, tmp_path / "resumed", changes, saves)
    for one, other in zip(found, wanted, strict=True):
        assert one[1] == other[1]
        assert [n for n, w in other[0].items() if not torch.equal(one[0][n], w)] == []
