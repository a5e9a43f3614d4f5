"""Weights that processes share: no process holds more than some blocks whole, not even while it saves and exports."""

from __future__ import annotations

import json
import logging
import weakref
from contextlib import contextmanager

import pytest
import torch
from many_processes import together
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition, repeated_blocks
from danceopd.backbones.sharded import rows_of
from danceopd.config.load import load_recipe
from danceopd.config.recipe import DistillRecipe, LoraRecipe
from danceopd.errors import UserError
from danceopd.export.sharded import export_sharded
from danceopd.export.student import check_export, prove_export
from danceopd.preflight.memory import gathered_bytes
from danceopd.pretraining import world_base as wb
from danceopd.training import checkpoints as checkpoints_module
from danceopd.training import fsdp
from danceopd.training.checkpoints import Checkpoints
from danceopd.training.learner import new_learner
from danceopd.training.lockstep import Lockstep
from danceopd.training.processes import this_process
from danceopd.training.shard_files import NAME, SavedTensor


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rows_come_back_on_any_number_of_processes(tmp_path, count):
    whole = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    for rank in range(count):
        save_file({"w": whole[slice(*rows_of(7, rank, count))].clone()}, tmp_path / NAME.format(rank, count))
    saved = SavedTensor(tmp_path, "w", whole.shape, count)
    assert torch.equal(saved.rows(), whole)
    for others in (1, 2, 3, 4, 9):
        cut = [saved.rows(*rows_of(7, rank, others)) for rank in range(others)]
        assert torch.equal(torch.cat(cut), whole)
        assert all(part.shape[1:] == (2,) for part in cut)


def test_rows_are_cut_as_torch_cuts_them():
    for length in (1, 5, 8):
        for count in (1, 2, 3, 6):
            cut = [len(part) for part in torch.arange(length).chunk(count)]
            mine = [stop - start for start, stop in (rows_of(length, rank, count) for rank in range(count))]
            assert mine == cut + [0] * (count - len(cut))


def test_a_method_that_learns_twice_before_it_goes_back_is_told_so():
    class Others:
        said = iter([1])  # they go back, and this process has nothing to go back through

        def least(self, number):
            return next(self.said)

    with pytest.raises(RuntimeError, match="two passes that learn before one backward pass"):
        Lockstep(Others()).end()


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory):
    """A base of 4 and 16 blocks."""
    folder = tmp_path_factory.mktemp("base") / "deep"
    transformer = wb.new_transformer(192, 16, heads=2, head_dim=16, doubles=4, singles=16)
    wb.new_pipeline(wb.new_vae().eval(), transformer).save_pretrained(str(folder))
    return folder


class WholeBytes:
    """The most bytes of a network's weights and their gradients that were whole at any time, and of any one tensor
    that was asked for whole."""

    def __init__(self, network):
        self.most, self.largest, self.network = 0, 0, network
        for block in repeated_blocks(network):
            block.register_forward_pre_hook(self.look)
            block.register_full_backward_pre_hook(self.look)
        asked = DTensor.full_tensor

        def full_tensor(tensor, **how):
            self.largest = max(self.largest, tensor.numel() * tensor.element_size())
            return asked(tensor, **how)

        DTensor.full_tensor = full_tensor

    def look(self, *_):
        whole = [p for p in self.network.parameters() if not isinstance(p, DTensor)]
        grads = [p.grad for p in whole if p.grad is not None]
        self.most = max(self.most, sum(t.nbytes for t in [*whole, *grads]))


def sizes(network: nn.Module) -> dict:
    """Bytes of all weights, of those in no block, of the largest block, of the largest weight."""
    blocks = [sum(p.nbytes for p in block.parameters()) for block in repeated_blocks(network)]
    every = [p.nbytes for p in network.parameters()]
    return {"all": sum(every), "rest": sum(every) - sum(blocks), "block": max(blocks), "weight": max(every)}


def train_save_export(rank, base_folder, folder, kind):
    processes = this_process()
    shape = wb.SHAPE.model_copy(update={"dtype": kind.pop("dtype", "float32")})
    base = load_backbone(base_folder, shape)
    size = sizes(base.transformer)
    known = {"lr": 1e-3, "steps": 3, "batch": 6, "rollout_steps": 3, "optimizer": "adamw"}
    spec = DistillRecipe(**(known | {"lora": LoraRecipe(rank=2, alpha=2), "parallel": "shard"} | kind))
    told = gathered_bytes(base.transformer, spec, base.lora_targets, base.transformer.dtype.itemsize)
    learner = new_learner(base, "student", spec)
    student = learner.field.network
    seen = WholeBytes(student)
    state = torch.randn(2, *base.latent_shape(64, 64), generator=torch.Generator().manual_seed(rank))
    condition = Condition(base.encode_prompts(["a", "b"]), None, 64, 64)
    for _ in range(2):
        for _ in range(rank + 1):  # one process has more to do than the other
            with learner.learning():
                velocity = base.velocity(student, state, torch.full((2,), 0.5), condition)
                learner.backward(velocity.float().square().mean())
        learner.update()
    trained = [p.to_local().nbytes for p in learner.parameters]
    moments = [s["exp_avg"].to_local().nbytes for s in learner.optimizer.state.values()]
    saves = Checkpoints(folder / "saves", 2, "run")
    saves.save(2, learner.state_dict(), processes)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(checkpoints_module, "write_rows", no_space)
        with pytest.raises(UserError, match=r"process 1 cannot write its shard .*nothing was saved"):
            saves.save(3, learner.state_dict(), processes)
    mine = folder / f"export-{rank}"
    mine.mkdir()
    settings = [f"model.base={base_folder}", f"model.dtype={shape.dtype}", "model.height=64", "model.width=64"]
    with raised_rows() as raised:
        export_sharded(learner.finish(), load_recipe("world", settings), mine, processes)
    return {
        "raised": max(raised),
        "most": seen.most,
        "told": told,
        "largest": seen.largest,
        "held": sum(trained),
        "moments": sum(moments),
        "size": size,
        "files": sorted(str(path.relative_to(mine)) for path in mine.rglob("*") if path.is_file()),
    }


@contextmanager
def raised_rows():
    """Counts the rows in float32, merged for a copy in 16 bits, that are there at once."""
    plain, kept, counts = fsdp._rows, [], [0]

    def counted(*given):
        found = plain(*given)
        if found.dtype != given[0].dtype:
            kept.append(weakref.ref(found))
            counts.append(sum(of() is not None for of in kept))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "_rows", counted)
        yield counts


def no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [{"trainable": "full"}, {"trainable": "lora", "dtype": "bfloat16", "precision": "bfloat16"}],
    ids=["full", "lora-bfloat16"],
)
def test_no_process_ever_holds_more_than_some_blocks(deep_base, tmp_path, kind):
    main, other = together(2, train_save_export, deep_base, tmp_path, dict(kind))
    size = main["size"]
    for one in (main, other):
        # One block is computed with, one fetched, and the gradients of one are whole; the rest is no block.
        assert 0 < one["most"] <= 2 * (size["rest"] + 2 * size["block"]) < size["all"]
        assert one["most"] <= one["told"] <= 4 * one["most"]  # which counts messages, and what is fetched, too
        assert one["largest"] <= 2 * size["weight"]  # of a trained copy in float32 beside a base in 16 bits
        assert one["moments"] == one["held"]
        assert one["raised"] == 0 if kind["trainable"] == "full" else 1 <= one["raised"] <= 2
    if kind["trainable"] == "full":
        assert main["held"] + other["held"] == size["all"]
        assert 0.4 < main["held"] / size["all"] < 0.6
    assert other["files"] == []  # the main process alone writes
    assert sorted(p.name for p in (tmp_path / "saves").iterdir()) == ["step-00000002"]
    folder = tmp_path / "export-0"
    check_export(folder)
    assert prove_export(folder) < 1e-5
    files = sorted((folder / "pipeline" / "transformer").glob("*.safetensors"))
    assert len(files) == 1 + 20  # the rest, and a file a block
    with safe_open(files[-1], framework="pt") as opened:
        dtypes = {str(opened.get_tensor(name).dtype) for name in opened.keys()}  # noqa: SIM118
    assert dtypes == {f"torch.{kind.get('dtype', 'float32')}"}
    assert ("lora/adapter_model.safetensors" in main["files"]) == (kind["trainable"] == "lora")


def test_a_damaged_shard_is_passed_over(tmp_path, caplog):
    """What one process made by itself, as two would have: the index names two files, one of them is damaged."""
    saves = Checkpoints(tmp_path, 2, "run")
    for step in (1, 2):
        path = saves.save(step, {"w": torch.zeros(2)})
        manifest = json.loads((path / checkpoints_module.MANIFEST).read_text())
        (path / NAME.format(0, 1)).write_bytes(b"rows")
        manifest[NAME.format(0, 1)] = checkpoints_module.hash_file(path / NAME.format(0, 1))
        (path / checkpoints_module.MANIFEST).write_text(json.dumps(manifest))
    (path / NAME.format(0, 1)).write_bytes(b"rowz")
    with caplog.at_level(logging.WARNING, "danceopd"):
        assert saves.newest()[0] == 1
    assert f"{path / NAME.format(0, 1)} is damaged" in caplog.text
