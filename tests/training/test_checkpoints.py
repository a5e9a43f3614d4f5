"""Training that was stopped, in any way, ends as training that was not."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from danceopd import steps
from danceopd.backbones import load_backbone
from danceopd.config.load import load_recipe
from danceopd.config.recipe import DistillRecipe, FinetuneRecipe, LoraRecipe, SelectRecipe
from danceopd.data.assemble import open_dataset
from danceopd.data.encode import encode_records
from danceopd.distill import distill
from danceopd.errors import Interrupted, UserError
from danceopd.files import hash_file, read_json
from danceopd.finetune import finetune
from danceopd.flow.fields import VelocityField
from danceopd.pretraining.world_base import SHAPE
from danceopd.training import checkpoints as checkpoints_module
from danceopd.training.checkpoints import Checkpoints, flatten, stop_when_asked, unflatten
from danceopd.training.learner import Learner
from danceopd.training.selection import Validation

WEIGHTS = {"t2i": 1.0, "local_edit": 2.0}
COMMON = {"lr": 1e-3, "steps": 8, "batch": 4, "log_every": 3, "warmup": 2, "checkpoint_every": 2}
LORA = LoraRecipe(rank=4, alpha=8)


class Crash(Exception):
    pass


@functools.cache
def load(base_folder):
    return load_backbone(base_folder, SHAPE)


@functools.cache
def encode(base_folder, data, tasks, targets):
    records = [record for task in tasks for record in open_dataset(data).records("train", task)]
    return encode_records(load(base_folder), records, 64, 64, None, "k", targets=targets)


def train(kind, base_folder, data, folder=None, preview=None, run="a run", **changes):
    """Distill or fine-tune the tiny base; returns the trained weights by name, and the history."""
    base = copy.deepcopy(load(base_folder))
    settings = COMMON | {"lora": LORA} | changes
    saves = None if folder is None else Checkpoints(folder, settings.get("keep_checkpoints", 2), run)
    if kind == "finetune":
        encoded = encode(base_folder, data, ("local_edit",), True)
        field, history = finetune(base, "editor", encoded, FinetuneRecipe(prompt_dropout=0.3, **settings), saves)
    else:
        encoded = encode(base_folder, data, tuple(WEIGHTS), False)
        editor = base.new_transformer().requires_grad_(False)
        editor.proj_out.weight.mul_(2)
        teachers = {
            "base": VelocityField("base", base, base.transformer),
            "editor": VelocityField("editor", base, editor),
        }
        teacher_of = {"t2i": "base", "local_edit": "editor"}
        spec = DistillRecipe(rollout_steps=3, **settings)
        field, history = distill(
            base, encoded, teachers, teacher_of, WEIGHTS, spec, preview, saves, validate=arbitrary_taste
        )
    return {name: p.detach().clone() for name, p in field.network.named_parameters()}, history


def arbitrary_taste(field):
    """A validation by the weights alone that likes some state on the way best, and no later one for being later."""
    weights = b"".join(p.detach().numpy().tobytes() for p in field.network.parameters())
    return Validation(zlib.crc32(weights) / 2**32, {})


def crash_at(monkeypatch, count):
    """Make the update after the first `count` raise."""
    update, seen = Learner.update, itertools.count()

    def crashing(self):
        if next(seen) == count:
            raise Crash
        return update(self)

    monkeypatch.setattr(Learner, "update", crashing)


def crashed(monkeypatch, count, *args, **changes):
    with monkeypatch.context() as patch:
        crash_at(patch, count)
        with pytest.raises(Crash):
            train(*args, **changes)


def assert_same(found, wanted):
    assert found[1] == wanted[1]
    assert set(found[0]) == set(wanted[0])
    assert [name for name, weight in wanted[0].items() if not torch.equal(found[0][name], weight)] == []


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["distill", "finetune"])
@pytest.mark.parametrize("trainable", ["full", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_resumed_after_a_crash_as_if_there_was_none(
    kind, trainable, optimizer, tiny_base, small_data, tmp_path, monkeypatch, caplog
):
    changes = {"trainable": trainable, "optimizer": optimizer}
    wanted = train(kind, tiny_base, small_data, **changes)
    crashed(monkeypatch, 5, kind, tiny_base, small_data, tmp_path, **changes)
    with caplog.at_level(logging.INFO, "danceopd"):
        found = train(kind, tiny_base, small_data, tmp_path, **changes)
    assert "resumed after step 4 of 8" in caplog.text
    assert_same(found, wanted)


@pytest.mark.slow
def test_averages_and_the_best_state_belong_to_the_checkpoint(tiny_base, small_data, tmp_path, monkeypatch):
    changes = {"ema": 0.8, "accumulate": 2, "select": SelectRecipe(every=1)}
    wanted = train("distill", tiny_base, small_data, **changes)
    crashed(monkeypatch, 5, "distill", tiny_base, small_data, tmp_path, **changes)
    assert_same(train("distill", tiny_base, small_data, tmp_path, **changes), wanted)


@pytest.mark.slow
def test_saving_changes_nothing_and_the_finished_state_is_kept(tiny_base, small_data, tmp_path):
    wanted = train("distill", tiny_base, small_data, checkpoint_every=0)
    assert_same(train("distill", tiny_base, small_data, tmp_path), wanted)
    seen = []
    again = train("distill", tiny_base, small_data, tmp_path, preview=lambda field, step: seen.append(step))
    assert_same(again, wanted)
    assert seen == []  # nothing was left to do


class Clock:
    """A monotonic clock that an update moves on by so many minutes."""

    def __init__(self, monkeypatch, minutes: float):
        self.now, update = time.monotonic(), Learner.update
        monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: self.now)

        def slow(learner):
            self.now += 60 * minutes
            return update(learner)

        monkeypatch.setattr(Learner, "update", slow)


def steps_saved(folder) -> list[int]:
    return sorted(int(p.name.partition("-")[2]) for p in folder.iterdir())


@pytest.mark.parametrize(
    ("minutes", "saved"),
    [
        (17, [3, 6, 8]),
        *(
            pytest.param(minutes, saved, marks=pytest.mark.slow)
            for minutes, saved in ((0, [8]), (15, [2, 4, 6, 8]), (16, [2, 4, 6, 8]), (100, [8]))
        ),
    ],
)
def test_a_save_is_due_after_so_many_minutes_too(tiny_base, small_data, tmp_path, monkeypatch, minutes, saved):
    Clock(monkeypatch, 8.1)  # minutes an update takes
    often = {"checkpoint_every": 100, "keep_checkpoints": 10, "checkpoint_minutes": minutes}
    train("distill", tiny_base, small_data, tmp_path, **often)
    assert steps_saved(tmp_path) == saved


@pytest.mark.slow
def test_a_save_by_steps_counts_for_the_minutes_as_well(tiny_base, small_data, tmp_path, monkeypatch):
    Clock(monkeypatch, 8.1)
    often = {"checkpoint_every": 3, "keep_checkpoints": 10, "checkpoint_minutes": 16}
    train("distill", tiny_base, small_data, tmp_path, **often)
    assert steps_saved(tmp_path) == [2, 3, 5, 6, 8]


def test_checkpoint_every_zero_saves_nothing(tiny_base, small_data, tmp_path):
    train("finetune", tiny_base, small_data, tmp_path / "none", checkpoint_every=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_falls_back_loudly(tiny_base, small_data, tmp_path, monkeypatch, caplog, name):
    wanted = train("distill", tiny_base, small_data)
    crashed(monkeypatch, 7, "distill", tiny_base, small_data, tmp_path)
    flip_a_byte(tmp_path / "step-00000006" / name)
    with caplog.at_level(logging.INFO, "danceopd"):
        found = train("distill", tiny_base, small_data, tmp_path)
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(tmp_path / "step-00000006") in warning.getMessage() and "passing it over" in warning.getMessage()
    assert "resumed after step 4 of 8" in caplog.text
    assert_same(found, wanted)


@pytest.mark.slow
def test_with_none_whole_training_starts_anew(tiny_base, small_data, tmp_path, monkeypatch, caplog):
    wanted = train("distill", tiny_base, small_data)
    crashed(monkeypatch, 7, "distill", tiny_base, small_data, tmp_path)
    flip_a_byte(tmp_path / "step-00000006" / "state.json")
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    found = train("distill", tiny_base, small_data, tmp_path)
    assert "none of 2 checkpoint(s) is whole; training starts anew" in caplog.text
    assert_same(found, wanted)


def test_another_runs_checkpoint_is_refused(tiny_base, small_data, tmp_path, monkeypatch):
    crashed(monkeypatch, 5, "distill", tiny_base, small_data, tmp_path, run="one")
    with pytest.raises(UserError, match=r"a checkpoint of another run \(one, this is two\); give this run a folder"):
        train("distill", tiny_base, small_data, tmp_path, run="two")
    assert (tmp_path / "step-00000004").is_dir()


def test_only_the_last_are_kept_and_none_is_a_pickle(tiny_base, small_data, tmp_path):
    train("distill", tiny_base, small_data, tmp_path, checkpoint_every=1, keep_checkpoints=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006", "step-00000007", "step-00000008"]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.name for p in files} == {"state.safetensors", "state.json", "manifest.json"}
    for path in files:
        load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    manifest = read_json(tmp_path / "step-00000008" / "manifest.json")
    assert manifest["state.json"] == hash_file(tmp_path / "step-00000008" / "state.json")


def test_those_ahead_never_push_out_the_one_just_saved(tmp_path):
    saves = Checkpoints(tmp_path, 1, "r")
    saves.save(4, {"x": torch.ones(2)})
    (tmp_path / "step-00000006").mkdir()  # a damaged one
    assert saves.newest()[0] == 4
    saves.save(5, {"x": torch.zeros(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.slow
def test_a_crash_in_the_middle_of_a_save_leaves_nothing_half_written(
    tiny_base, small_data, tmp_path, monkeypatch, caplog
):
    wanted = train("distill", tiny_base, small_data)
    with monkeypatch.context() as patch:
        seen = itertools.count()

        def failing(tensors, path):
            save_file(tensors, path)
            if next(seen) == 1:
                raise OSError("disk full")

        patch.setattr("danceopd.training.checkpoints.save_file", failing)
        with pytest.raises(OSError, match="disk full"):
            train("distill", tiny_base, small_data, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    (tmp_path / ".step-00000004.deadbeef").mkdir()  # what kill -9 leaves
    assert_same(train("distill", tiny_base, small_data, tmp_path), wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006", "step-00000008"]


def test_what_is_flattened_comes_back():
    tree = {"a": [1, (2.5, None)], 3: {"t": torch.arange(4), "b": True}, "empty": {}, "nan": [torch.tensor(1.0)]}
    tensors: dict = {}
    back = unflatten(json.loads(json.dumps(flatten(tree, "state", tensors))), tensors)
    assert torch.equal(back[3].pop("t"), tree[3].pop("t"))
    assert back == tree
    with pytest.raises(TypeError, match="state/x: a set cannot be kept"):
        flatten({"x": {1}}, "state", {})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_loop_saves_and_exits_with_the_code_to_retry(tiny_base, small_data, tmp_path, number):
    wanted = train("distill", tiny_base, small_data, preview_every=1)
    before = signal.getsignal(number)

    def stop(field, step):
        if step == 3:
            os.kill(os.getpid(), number)

    said = r"interrupted after step 3 of 8 and saved; the same command goes on from .*step-00000003"
    with pytest.raises(Interrupted, match=said) as caught:
        train("distill", tiny_base, small_data, tmp_path, preview=stop, preview_every=1)
    assert caught.value.code == 75
    assert signal.getsignal(number) is before
    assert_same(train("distill", tiny_base, small_data, tmp_path, preview_every=1), wanted)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])  # a background job's ignores it
def test_a_second_ctrl_c_interrupts_at_once(caplog, before):
    kept = signal.signal(signal.SIGINT, before)
    try:
        interrupt_twice(caplog)
    finally:
        signal.signal(signal.SIGINT, kept)


def interrupt_twice(caplog):
    with stop_when_asked() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and "Ctrl-C again stops at once" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def body():
        with stop_when_asked() as stop:
            found.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_the_command_line_ends_with_the_code_to_retry(monkeypatch, capsys):
    from danceopd.cli import main as cli

    class Stopped:
        def main(self, **_):
            raise Interrupted("interrupted after step 3 of 8")

    monkeypatch.setattr(cli, "root_command", Stopped)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 75
    assert capsys.readouterr().err == "danceopd: interrupted after step 3 of 8\n"


# ---------------------------------------------------------------------------------------------------- the chain's steps

SMALL = [
    "data.world={t2i: {train: 8, val: 2, test: 2}, local_edit: {train: 8, val: 2, test: 2},"
    " global_style: {train: 8, val: 2, test: 2}}",
    "teachers.local_edit={kind: base}",
    "teachers.global_style={kind: base}",
    "distill.steps=5",
    "distill.batch=6",
    "distill.rollout_steps=2",
    "distill.preview_every=1",
    "distill.checkpoint_every=2",
    "evaluate.steps=2",
]


def student(base_folder, workspace, *settings):
    recipe = load_recipe("world", [f"model.base={base_folder}", *SMALL, *settings])
    base, data = steps.resolve_base(recipe, workspace), steps.build_data(recipe, workspace, repo=workspace)
    teachers = {
        name: steps.finetune_teacher(steps.Run(recipe, workspace, base, data), name) for name in recipe.teachers
    }
    return steps.distill_student(steps.Run(recipe, workspace, base, data), teachers)


@pytest.mark.slow
def test_a_retried_step_goes_on_and_makes_the_same_product(tiny_base, tmp_path, monkeypatch, caplog):
    wanted = student(tiny_base, tmp_path / "a")
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(Crash):
            student(tiny_base, tmp_path / "b")
    [saves] = (tmp_path / "b" / "checkpoints").iterdir()
    assert saves.name == f"students-{wanted.folder.name}"
    with caplog.at_level(logging.INFO, "danceopd"):
        # How often it is saved changes neither the product's name nor what is in it, previews included.
        found = student(tiny_base, tmp_path / "b", "distill.checkpoint_every=3", "distill.keep_checkpoints=1")
    assert "resumed after step 2 of 5" in caplog.text
    assert (found.folder.name, found.digest) == (wanted.folder.name, wanted.digest)
    assert len(list((found.folder / "previews").glob("step-*.png"))) == 5
    assert list((tmp_path / "b" / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_another_recipe_does_not_meet_the_checkpoint(tiny_base, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(Crash):
            student(tiny_base, tmp_path)
    with caplog.at_level(logging.INFO, "danceopd"):
        student(tiny_base, tmp_path, "distill.lr=0.002")
    assert "resumed" not in caplog.text
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


# ------------------------------------------------------------------------------------------------------- real processes

LONG = {"steps": 30, "checkpoint_every": 2, "preview_every": 1, "optimizer": "muon"}


def start(base_folder, data, folder, out):
    """This file as a process that distills: it says each step, and writes the weights and the history at the end."""
    command = [sys.executable, __file__, *map(str, (base_folder, data, folder, out))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_step(process, count):
    """Read until the process has done `count` steps of its own; returns the first step it said."""
    first = int(process.stdout.readline())
    for _ in range(count - 1):
        process.stdout.readline()
    return first


def ended(out):
    return load_file(out / "weights.safetensors"), read_json(out / "history.json")


@pytest.mark.slow
def test_killed_at_ten_random_moments(tiny_base, small_data, tmp_path):
    changes = LONG | {"steps": 60, "ema": 0.9, "accumulate": 2}
    wanted = train("distill", tiny_base, small_data, **changes)
    saves, moments, said = tmp_path / "saves", random.Random(7), []
    # Each of them takes its imports from one server, not from the disk.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["danceopd.distill", "danceopd.backbones.flux2_klein", "danceopd.pretraining.world_base"]
    )
    for kill in [True] * 10 + [False]:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_train_and_say, args=(tiny_base, small_data, saves, tmp_path, changes, there))
        process.start()
        there.close()
        if kill:
            said += [here.recv() for _ in range(moments.randint(1, 5))]
            time.sleep(moments.uniform(0, 0.15))
            process.kill()
        said += _rest(here)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill else 0)
    assert said[-1] == 60
    assert len(said) > 60  # some steps were done again
    assert_same(ended(tmp_path), wanted)
    assert sorted(p.name for p in saves.iterdir()) == ["step-00000058", "step-00000060"]


def _rest(pipe) -> list[int]:
    rest = []
    try:
        while True:
            rest.append(pipe.recv())
    except EOFError:
        return rest


def _train_and_say(base_folder, data, saves, out, changes, pipe):
    torch.set_num_threads(1)

    def say(field, step):
        pipe.send(step)
        time.sleep(0.03)

    _write(train("distill", base_folder, data, saves, say, **changes), out)


@pytest.mark.slow
def test_a_process_that_gets_sigterm_saves_and_is_resumed(tiny_base, small_data, tmp_path):
    wanted = train("distill", tiny_base, small_data, **LONG)
    saves = tmp_path / "saves"
    process = start(tiny_base, small_data, saves, tmp_path)
    wait_for_step(process, 5)
    process.terminate()
    said = process.communicate()[0].split()
    assert process.returncode == 75
    last = int(said[-1]) if said else 5
    assert (saves / f"step-{last:08d}").is_dir()
    process = start(tiny_base, small_data, saves, tmp_path)
    assert wait_for_step(process, 1) == last + 1
    process.communicate()
    assert process.returncode == 0
    assert_same(ended(tmp_path), wanted)


def _say(field, step):
    print(step, flush=True)
    time.sleep(0.1)  # so that whoever reads this has the time to kill us before the end


def _main(base_folder, data, folder, out):
    torch.set_num_threads(1)
    weights, history = train("distill", Path(base_folder), Path(data), Path(folder), _say, **LONG)
    _write((weights, history), Path(out))


def _write(trained, out):
    weights, history = trained
    save_file({name: weight.contiguous() for name, weight in weights.items()}, out / "weights.safetensors")
    (out / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    _main(*sys.argv[1:])
