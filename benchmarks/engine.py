"""The distillation engine against the plain loop: samples per second, and the memory that models take.

python -m benchmarks.engine [--sizes tiny,mid,large] [--windows ...] [--reference PATH] [--json PATH]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.harness import Bar, Report, arguments, held_bytes, in_turns, names, paired_ratio, run_script
from benchmarks.plain import PlainLoop
from benchmarks.reference import Reference
from benchmarks.setting import SIZES, Setting, Size, make_setting
from danceopd.methods.base import UpdateFigures
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.queries import NAMED

SPEED_BARS = {"semantic": 3.0, "low_noise": 1.8}
MEMORY_BAR = 0.4
BARRED = ("tiny", "mid")
HOW = (
    "Student and three teachers are LoRAs of rank width/32, the grid has 16 steps, the batch mixes three tasks (two "
    "with a source image). Plain: batch 1, the whole grid, one merged copy of the transformer a teacher and one for "
    "the student, each prompt encoded in its turn. Both sides get the same draws and compute the same gradient "
    "(checked before timing), are timed in turns in one process with the same threads, one optimizer step a batch; "
    "a ratio is the median over rounds. Then the plain loop mended step by step: what each step multiplies the speed "
    "by."
)
COLUMNS = [
    "transformer",
    "window",
    "plain samples/s",
    "engine samples/s",
    "ratio",
    "of it prompt cache",
    "of it early stop",
    "of it batching",
]


def engine_update(setting: Setting, window: str, batch: int, seed: int) -> None:
    """One update as `danceopd.distill` makes it, draws included."""
    method, figures = DanceOPD(), UpdateFigures()
    with setting.learner.precision():
        for group in setting.groups(window, batch, seed):
            method.accumulate(setting.distillation, setting.learner, group, figures)
    setting.learner.update()


def gradient_difference(setting: Setting, plain: PlainLoop) -> float:
    """Length of the difference of both sides' gradients of one batch, relative to the gradient's."""
    groups = setting.groups("uniform", 3, seed=0)
    for group in groups:
        DanceOPD().accumulate(setting.distillation, setting.learner, group, UpdateFigures())
    plain.accumulate(groups)
    sides = []
    for parameters in (setting.learner.parameters, plain.parameters):
        sides.append(torch.cat([p.grad.flatten() for p in parameters]))
        for parameter in parameters:
            parameter.grad = None
    return float((sides[0] - sides[1]).norm() / sides[1].norm())


def contest(name: str, size: Size, windows: list[str], reference: Path | None) -> dict:
    """Time all sides at one size.

    Returns:
        Plain data: seconds by contender and round, bytes of models held, the gradients' relative difference.
    """
    setting = make_setting(size)
    plain = PlainLoop(setting)
    difference = gradient_difference(setting, plain)
    if difference > 1e-3:
        raise RuntimeError(f"{name}: the sides' gradients differ by {difference:.1e}; this would be no contest")
    variants = {
        "cached": PlainLoop(setting, cache_prompts=True, like=plain),
        "stopped": PlainLoop(setting, cache_prompts=True, stop_at_query=True, like=plain),
    }
    contenders: dict[str, Callable[[int], object]] = {}
    rounds: dict[str, int] = {}

    def enter(label: str, run: Callable[[int], object], times: int) -> None:
        if times:
            contenders[label], rounds[label] = run, times

    # Round 0 only warms up, with one sample a task.
    def loop(which: PlainLoop, window: str) -> Callable[[int], object]:
        return lambda number: which.update(setting.groups(window, size.batch if number else 3, number))

    with ExitStack() as stack:
        enter("plain", loop(plain, windows[0]), size.rounds)  # its cost is the same for every window
        enter("cached", loop(variants["cached"], windows[0]), size.ladder)
        if reference is not None:
            release = stack.enter_context(Reference(reference, setting, size.batch))
            enter("release", release.update, size.rounds)
        for window in windows:
            enter(f"stopped {window}", loop(variants["stopped"], window), size.ladder)
            enter(
                f"engine {window}",
                lambda number, w=window: engine_update(setting, w, size.batch if number else 3, number),
                size.rounds,
            )
        seconds = in_turns(contenders, rounds)
        memory = {"plain": held_bytes(*plain.networks), "engine": held_bytes(setting.backbone.transformer)}
        if reference is not None:
            memory["release"] = release.held
    encoder = held_bytes(setting.backbone.pipeline.text_encoder)
    parameters = sum(p.numel() for p in setting.bare.parameters())
    return {
        "size": name,
        "parameters": parameters,
        "rank": setting.rank,
        "batch": size.batch,
        "seconds": seconds,
        "model_bytes": memory,
        "text_encoder_bytes": encoder,
        "gradient_difference": difference,
    }


def speed_rows(found: dict, windows: list[str]) -> list[list]:
    """The table's rows of one size."""
    seconds, batch = found["seconds"], found["batch"]
    label = f"{found['size']} ({found['parameters'] / 1e6:.3g} M)"
    rows = []
    for window in windows:
        engine = seconds[f"engine {window}"]
        ladder: list = ["", "", ""]
        if "cached" in seconds:
            stopped = seconds[f"stopped {window}"]
            steps = [seconds["plain"], seconds["cached"], stopped, engine]
            ladder = [paired_ratio(a, b) for a, b in itertools.pairwise(steps)]
        rates = [batch / statistics.median(seconds["plain"]), batch / statistics.median(engine)]
        rows.append([label, window, *rates, paired_ratio(seconds["plain"], engine), *ladder])
    return rows


def report(contests: list[dict], windows: list[str]) -> Report:
    """The table, the bars and what else was found."""
    rows, bars, notes = [], [], []
    for found in contests:
        mine = speed_rows(found, windows)
        rows += mine
        held = found["model_bytes"]
        ratio = held["engine"] / held["plain"]
        if found["size"] in BARRED:
            for row in mine:
                if row[1] in SPEED_BARS:
                    bars.append(Bar(f"{found['size']}, {row[1]}: samples/s over plain", row[4], SPEED_BARS[row[1]]))
            bars.append(Bar(f"{found['size']}: model memory over plain", ratio, MEMORY_BAR, at_least=False))
        notes.append(
            f"{found['size']}: models take {held['engine'] / 1e6:.1f} MB against {held['plain'] / 1e6:.1f} MB, ratio "
            f"{ratio:.3f} (LoRA rank {found['rank']}, batch {found['batch']}); gradients of both sides differ by "
            f"{found['gradient_difference']:.0e} of their length."
        )
        if "release" in found["seconds"]:
            ratios = ", ".join(
                f"{paired_ratio(found['seconds']['release'], found['seconds'][f'engine {w}']):.3g} {w}" for w in windows
            )
            rate = found["batch"] / statistics.median(found["seconds"]["release"])
            notes.append(
                f"{found['size']}: the authors' release makes {rate:.3g} samples/s on this transformer; the engine "
                f"over it: {ratios}; its models take {held['release'] / 1e6:.1f} MB, ratio "
                f"{held['engine'] / held['release']:.3f}."
            )
    notes.append(
        "Model memory: bytes of all distinct parameter and buffer storages of the transformers held while training, "
        "adapters included. The text encoder, which only the plain loop still needs by then "
        f"({contests[0]['text_encoder_bytes'] / 1e6:.1f} MB here), is left out of both; so are optimizer state, which "
        "is the same, and activations, which grow with the batch and which `accumulate` bounds."
    )
    return Report(
        "engine", "Engine against the plain loop", HOW, COLUMNS, rows, bars, notes, details={"contests": contests}
    )


def measure(options: argparse.Namespace) -> list[Report]:
    contests = [contest(name, SIZES[name], options.windows, options.reference) for name in options.sizes]
    return [report(contests, options.windows)]


def parser() -> argparse.ArgumentParser:
    parser = arguments("samples per second and model memory: the engine against the plain loop")
    parser.add_argument("--sizes", type=names(list(SIZES)), default=["tiny", "mid", "large"])
    parser.add_argument("--windows", type=names(list(NAMED)), default=["semantic", "low_noise", "uniform"])
    parser.add_argument(
        "--reference", type=Path, metavar="PATH", help="a checkout of the authors' release to measure too"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
