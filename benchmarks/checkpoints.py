"""Saving and loading a training state: the engine's checkpoints against torch.save of the same state.

python -m benchmarks.checkpoints [--sizes tiny,mid] [--json PATH]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import Report, arguments, in_turns, names, paired_ratio, run_script
from benchmarks.setting import SIZES, load_base
from danceopd.config.recipe import DistillRecipe
from danceopd.files import hash_file
from danceopd.training.checkpoints import Checkpoints
from danceopd.training.learner import new_learner

ROUNDS = 5
HOW = (
    "The state of full-weight training with AdamW (weights and two moments, float32) after one update, median of "
    f"{ROUNDS} rounds in turns on one disk, caches warm. Ours: safetensors + JSON, SHA-256 of both in a manifest, one "
    "rename; loading verifies the hashes. Bare: `torch.save`, `torch.load(weights_only=True)`, which notice nothing. "
    "Hashed: the same with the file's SHA-256 written and checked. A ratio over 1: ours is faster."
)
COLUMNS = ["transformer", "what", "ours", "torch.save, bare", "torch.save, hashed", "bare / ours", "hashed / ours"]


def training_state(name: str) -> dict:
    """What the engine saves of a learner: weights, optimizer, schedule."""
    backbone = load_base(SIZES[name])
    spec = DistillRecipe(trainable="full", lr=1e-4, steps=10, batch=1)
    learner = new_learner(backbone, "student", spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in learner.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    learner.update()
    return {"learner": learner.state_dict(), "generator": generator.get_state()}


def save_hashed(state: dict, path: Path) -> None:
    torch.save(state, path)
    path.with_suffix(".sha256").write_text(hash_file(path))


def load_hashed(path: Path) -> dict:
    if path.with_suffix(".sha256").read_text() != hash_file(path):
        raise RuntimeError(f"{path}: damaged")
    return torch.load(path, weights_only=True)


def same(one: object, other: object) -> bool:
    """Whether two trees of dicts, lists and tensors are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def measure_size(name: str) -> list[list]:
    """The table's rows of one size."""
    state = training_state(name)
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as scratch:
        folder, bare, hashed = Path(scratch) / "ours", Path(scratch) / "bare.pt", Path(scratch) / "hashed.pt"
        checkpoints = Checkpoints(folder, keep=1, run="benchmark")
        contenders: dict[str, Callable[[int], object]] = {
            "save ours": lambda number: checkpoints.save(number, state),
            "save bare": lambda number: torch.save(state, bare),
            "save hashed": lambda number: save_hashed(state, hashed),
            "load ours": lambda number: checkpoints.newest(),
            "load bare": lambda number: torch.load(bare, weights_only=True),
            "load hashed": lambda number: load_hashed(hashed),
        }
        seconds = in_turns(contenders, dict.fromkeys(contenders, ROUNDS))
        if not (same(checkpoints.newest()[1], state) and same(load_hashed(hashed), state)):
            raise RuntimeError(f"{name}: a state came back changed; this would be no contest")
        sizes = [sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()), bare.stat().st_size]
    rows = []
    for what in ("save", "load"):
        ours, plain, checked = (seconds[f"{what} {kind}"] for kind in ("ours", "bare", "hashed"))
        medians = [1000 * statistics.median(side) for side in (ours, plain, checked)]
        rows.append([name, f"{what}, ms", *medians, paired_ratio(plain, ours), paired_ratio(checked, ours)])
    ours, plain = (size / 1e6 for size in sizes)
    return [*rows, [name, "size, MB", ours, plain, plain, plain / ours, plain / ours]]


def measure(options: argparse.Namespace) -> list[Report]:
    rows = [row for name in options.sizes for row in measure_size(name)]
    return [Report("checkpoints", "Checkpoints: save and load", HOW, COLUMNS, rows)]


def parser() -> argparse.ArgumentParser:
    parser = arguments("checkpoints: save and load against torch.save")
    parser.add_argument("--sizes", type=names(list(SIZES)), default=["tiny", "mid"])
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
