"""Model FLOP utilisation of the engine on one GPU, at FLUX.2-klein-4B size; finds the fastest settings.

    python -m benchmarks.gpu [--json PATH]
    python -m benchmarks.gpu --tiny --device cpu      every line of it, on any machine, in a small size

Random weights in bfloat16 made on the device, 1024 px (4096 image tokens) and 512 prompt tokens, a LoRA student and
three LoRA teachers on one base. Ends with code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.float8 import Float8Linear, in_float8
from benchmarks.forwards import mean_steps
from benchmarks.harness import Bar, Report, arguments, held_bytes, names, run_script
from benchmarks.setting import STEPS, wake
from danceopd.backbones.base import Condition
from danceopd.backbones.flux2_klein import Flux2Klein
from danceopd.backbones.lora import add_lora
from danceopd.config.recipe import DistillRecipe, LoraRecipe, ModelRecipe
from danceopd.data.encoded import EncodedRecords
from danceopd.errors import UserError
from danceopd.flow.fields import Field, VelocityField
from danceopd.flow.rollout import roll_out, rollout_drift
from danceopd.methods.base import Distillation, Group, UpdateFigures
from danceopd.methods.danceopd import DanceOPD
from danceopd.pretraining.world_base import new_text_encoder, new_vae
from danceopd.training.learner import Learner, new_learner

TEACHERS = ("first", "second", "third")
ROLLOUT_STEPS = 2  # of the grid that are timed
TARGET = 0.45
COMPILE = ("off", "default", "reduce-overhead")
SDPA = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
SWITCH = ("off", "on")
ROLLOUT = ("own", "merged", "float8")
GROWS = 1.02  # a larger batch that gains less ends the search for it
HOW = (
    "Utilisation is the model's floating-point operations (counted on the network's graph, recomputation left out; a "
    "LoRA student's backward pass needs no gradient of the frozen weights) over time, as a share of the bfloat16 "
    "matrix product rate measured first on the same card. Rollout: {steps} grid steps of the whole batch, no gradient. "
    "Update: routed teachers, student forward and backward, AdamW. Samples a second is for the `semantic` window. "
    "Median of {iterations} after a warm-up. Search: batch and checkpointing first, until memory ends or it gains no "
    "more; then attention kernels, then the rollout's weights, then compilation of the rollout alone, then of the "
    "update. float8: a merged copy, its blocks' products in float8 (a trial, no setting of a recipe). Drift: how far a "
    "copy's states lie from the student's own after those steps, as a share of the way from the noise."
)
COLUMNS = [
    "batch",
    "checkpointing",
    "attention",
    "rollout of",
    "compiled",
    "update compiled",
    "rollout TFLOP/s",
    "share",
    "drift",
    "update TFLOP/s",
    "share",
    "samples/s",
    "peak GB",
]


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        config: of the transformer.
        pixels: side of the picture; 16 of them make a token's side.
        prompt_tokens: length of the prompt embedding.
        rank: of every LoRA.
        matrices: sides of the square matrices whose product is timed.
    """

    config: dict
    pixels: int
    prompt_tokens: int
    rank: int
    matrices: tuple[int, ...]


# The transformer's published config (black-forest-labs/FLUX.2-klein-base-4B).
KLEIN_4B = Scale(
    {
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "guidance_embeds": False,
    },
    pixels=1024,
    prompt_tokens=512,
    rank=64,
    matrices=(4096, 8192, 16384),
)
TINY = Scale(
    {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "timestep_guidance_channels": 32,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (8, 8, 8, 8),
        "guidance_embeds": False,
    },
    pixels=64,
    prompt_tokens=8,
    rank=4,
    matrices=(64, 128),
)


@dataclass(frozen=True)
class Settings:
    """What is searched over."""

    batch: int
    checkpointing: str = "off"
    sdpa: str = "auto"
    rollout: str = "own"
    rollout_compile: str = "off"
    compile: str = "off"

    def cells(self) -> list:
        return [self.batch, self.checkpointing, self.sdpa, self.rollout, self.rollout_compile, self.compile]


@dataclass(frozen=True)
class Flops:
    """Of one sample."""

    forward: float
    update: float


@dataclass(frozen=True)
class Timing:
    """Of one batch: seconds of a rollout step and of an update; bytes at the peak of each (None where unknown)."""

    rollout_step: float
    update: float
    drift: float
    rollout_peak: int | None
    update_peak: int | None


@contextmanager
def building(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Make new modules on a device in a dtype at once, rather than elsewhere first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def new_backbone(scale: Scale, device: str, dtype: torch.dtype) -> Flux2Klein:
    """A pipeline around a random transformer; its autoencoder and text encoder are only there to complete it."""
    with building(device, dtype):
        network = Flux2Transformer2DModel(**scale.config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = Flux2KleinPipeline(scheduler, new_vae(), new_text_encoder(8), None, network)
    return Flux2Klein(pipeline, ModelRecipe(base="random", height=scale.pixels, width=scale.pixels))


def count_flops(scale: Scale) -> Flops:
    """Count one sample's operations on a network without memory.

    Forward: the student with its LoRA. Update: a teacher's forward, the student's forward and backward.
    """
    backbone = new_backbone(scale, "meta", torch.float32)
    network = backbone.transformer
    add_lora(network, "student", LoraRecipe(rank=scale.rank, alpha=scale.rank), backbone.lora_targets, 0)
    condition = Condition(
        torch.empty(1, scale.prompt_tokens, scale.config["joint_attention_dim"], device="meta"),
        None,
        scale.pixels,
        scale.pixels,
    )
    z = torch.empty(1, *backbone.latent_shape(scale.pixels, scale.pixels), device="meta")
    sigma = torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as forward:
        velocity = backbone.velocity(network, z, sigma, condition)
    with FlopCounterMode(display=False) as backward:
        velocity.square().mean().backward()
    return Flops(forward.get_total_flops(), 2 * forward.get_total_flops() + backward.get_total_flops())


@dataclass(frozen=True)
class Contest:
    """The engine, ready at one setting."""

    backbone: Flux2Klein
    distillation: Distillation
    learner: Learner
    group: Group
    float8: list[Float8Linear]

    def walker(self) -> Field:
        """What rollouts follow, brought up to date."""
        field = self.learner.walker
        for layer in self.float8:
            layer.renew()
        return field

    @torch.no_grad()
    def roll(self) -> None:
        stop = torch.full((len(self.group.rows),), ROLLOUT_STEPS)
        with self.learner.precision():
            roll_out(self.learner.walker, self.group.noise, self.group.grid, stop, self.group.condition)

    def drift(self) -> float:
        """How far a merged copy leads from the student itself; 0 where there is none."""
        stop = torch.full((len(self.group.rows),), ROLLOUT_STEPS)
        own, walker = self.learner.field, self.learner.walker
        if own is walker:
            return 0.0
        with self.learner.precision():
            return rollout_drift(own, walker, self.group.noise, self.group.grid, stop, self.group.condition)

    def update(self) -> None:
        """With its query at the noise: no rollout. A merged copy is brought up to date, too."""
        with self.learner.precision():
            DanceOPD().accumulate(self.distillation, self.learner, self.group, UpdateFigures())
        self.learner.update()
        self.walker()


def prepare(scale: Scale, settings: Settings, device: str) -> Contest:
    """Build base, teachers, student and one batch on the device."""
    backbone = new_backbone(scale, device, torch.bfloat16)
    lora = LoraRecipe(rank=scale.rank, alpha=scale.rank)
    for seed, name in enumerate(TEACHERS):
        add_lora(backbone.transformer, name, lora, backbone.lora_targets, seed)
        wake(backbone.transformer, name, seed)
    spec = DistillRecipe(
        trainable="lora",
        lora=lora,
        lr=1e-5,
        steps=1000,
        batch=settings.batch,
        rollout_steps=STEPS,
        precision="bfloat16",
        compile=settings.compile,
        rollout_weights="own" if settings.rollout == "own" else "merged",
        rollout_compile=settings.rollout_compile,
        activation_checkpointing=settings.checkpointing == "on",
    )
    learner = new_learner(backbone, "student", spec)
    wake(backbone.transformer, "student", len(TEACHERS))
    float8 = in_float8(learner.walker.network) if settings.rollout == "float8" else []
    teachers = {name: VelocityField(name, backbone, backbone.transformer, adapter=name) for name in TEACHERS}
    count, side = settings.batch, scale.pixels
    shape = backbone.latent_shape(side, side)
    prompt = torch.randn(
        count, scale.prompt_tokens, scale.config["joint_attention_dim"], device=device, dtype=torch.bfloat16
    )
    tags = [TEACHERS[i % len(TEACHERS)] for i in range(count)]
    nothing = torch.empty(0)
    encoded = EncodedRecords(
        tags,
        prompt,
        torch.arange(count),
        nothing,
        torch.full((count,), -1),
        nothing,
        torch.full((count,), -1),
        side,
        side,
    )
    distillation = Distillation(backbone, encoded, teachers, dict(zip(TEACHERS, TEACHERS, strict=True)), STEPS)
    group = Group(
        rows=list(range(count)),
        tags=tags,
        weights=torch.full((count,), 1 / count),
        condition=Condition(prompt, None, side, side),
        dropped=torch.zeros(count, dtype=torch.bool),
        trained=Condition(prompt, None, side, side),
        noise=torch.randn(count, *shape, device=device),
        grid=distillation.grid(side, side),
        levels=distillation.levels(side, side),
        stop=torch.zeros(count, 1, dtype=torch.int64),
        seeds=[],
        last=True,
    )
    return Contest(backbone, distillation, learner, group, float8)


def timed(run: Callable[[], object], device: str, iterations: int) -> tuple[float, int | None]:
    """Median seconds of a call after a warm-up, and the device's peak bytes."""
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run()
    seconds = []
    for _ in range(iterations):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() if on_gpu else None


def matrix_rate(scale: Scale, device: str, iterations: int) -> dict[int, float]:
    """Operations a second of bfloat16 matrix products, by the matrices' side."""
    rates = {}
    for side in scale.matrices:
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        repeats = 10

        def multiply(a=a, b=b, repeats=repeats) -> None:
            for _ in range(repeats):
                torch.mm(a, b)

        seconds, _ = timed(multiply, device, iterations)
        rates[side] = 2 * side**3 * repeats / seconds
    return rates


def release_memory(device: str) -> None:
    """Give back what the last setting held."""
    torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def try_settings(scale: Scale, settings: Settings, device: str, iterations: int) -> Timing | str:
    """Time one setting, or say in a line why it cannot run."""
    kernel = SDPA[settings.sdpa]
    try:
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            contest = prepare(scale, settings, device)
            rollout, rollout_peak = timed(contest.roll, device, iterations)
            drift = contest.drift()
            update, update_peak = timed(contest.update, device, iterations)
        return Timing(rollout / ROLLOUT_STEPS, update, drift, rollout_peak, update_peak)
    except torch.OutOfMemoryError:
        return "out of memory"
    except torch.AcceleratorError as error:
        raise DeviceLost(str(error).strip().splitlines()[0][:80]) from error
    except RuntimeError as error:  # a kernel or compiler that does not take this
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
    finally:
        contest = None
        with suppress(torch.AcceleratorError):
            release_memory(device)


class DeviceLost(Exception):
    """A kernel broke this process's hold on its device: nothing more can be tried here."""


@dataclass
class Search:
    """All settings that were tried, with what came of them."""

    scale: Scale
    device: str
    iterations: int
    steps_before_query: float
    tried: dict[Settings, Timing | str]

    def score(self, settings: Settings) -> float:
        """Samples a second; 0 if it cannot run."""
        timing = self.tried[settings]
        if isinstance(timing, str):
            return 0.0
        return settings.batch / (self.steps_before_query * timing.rollout_step + timing.update)

    def attempt(self, settings: Settings) -> bool:
        """Try a setting once; returns whether it runs."""
        if settings not in self.tried:
            print(f"benchmarks: gpu {settings}", file=sys.stderr)
            try:
                self.tried[settings] = try_settings(self.scale, settings, self.device, self.iterations)
            except DeviceLost as lost:
                self.tried[settings] = f"device lost: {lost}"
                raise
            # A machine that is lent for minutes may go before the table is printed.
            print(f"benchmarks: gpu {self.score(settings):.4g} samples/s, {self.tried[settings]}", file=sys.stderr)
        return not isinstance(self.tried[settings], str)

    def best(self) -> Settings:
        """The fastest so far.

        Raises:
            UserError: if none runs.
        """
        best = max(self.tried, key=self.score)
        if not self.score(best):
            raise UserError(f"no setting runs on this device; first: {next(iter(self.tried.values()))}")
        return best

    def run(self, options: argparse.Namespace) -> None:
        """Batch and checkpointing first, then attention kernels, the rollout's weights, its compilation, the update's:
        each from the best before it."""
        for checkpointing in options.checkpointing:
            before = 0.0
            for batch in sorted(options.batch):
                settings = Settings(batch, checkpointing)
                if not self.attempt(settings) or self.score(settings) < GROWS * before:
                    break
                before = self.score(settings)
        best = self.best()
        for sdpa in options.sdpa:
            self.attempt(replace(best, sdpa=sdpa))
        best = self.best()
        for rollout in options.rollout:
            self.attempt(replace(best, rollout=rollout))
        for rollout, mode in product(options.rollout, options.rollout_compile):
            if rollout != "own":  # which is compiled together with the update
                self.attempt(replace(best, rollout=rollout, rollout_compile=mode))
        best = self.best()
        for mode in options.compile:
            self.attempt(replace(best, compile=mode))


def row(search: Search, settings: Settings, flops: Flops, rate: float) -> list:
    """The table's row of one setting."""
    timing = search.tried[settings]
    if isinstance(timing, str):
        return [*settings.cells(), timing, "", "", "", "", "", ""]
    rollout = flops.forward * settings.batch / timing.rollout_step
    update = flops.update * settings.batch / timing.update
    peak = "unknown" if timing.update_peak is None else max(timing.rollout_peak, timing.update_peak) / 1e9
    return [
        *settings.cells(),
        rollout / 1e12,
        rollout / rate,
        timing.drift,
        update / 1e12,
        update / rate,
        search.score(settings),
        peak,
    ]


def memory_notes(scale: Scale, device: str, timing: Timing) -> list[str]:
    """What models hold with three teachers, against a copy of the transformer for each."""
    contest = prepare(scale, Settings(batch=1), device)
    network = contest.backbone.transformer
    held = held_bytes(network)
    adapters = sum(p.nbytes for name, p in network.named_parameters() if "lora_" in name)
    plain = (len(TEACHERS) + 1) * (held - adapters) + adapters / (len(TEACHERS) + 1)
    release_memory(device)
    notes = [
        f"Models held with a LoRA student and three LoRA teachers (rank {scale.rank}, float32 adapters): "
        f"{held / 1e9:.3g} GB, of it {adapters / 1e9:.3g} GB adapters; a copy for each would hold "
        f"{plain / 1e9:.3g} GB; ratio {held / plain:.3f}."
    ]
    if timing.update_peak is not None:
        notes.append(
            f"Peak allocated at the fastest settings: {timing.rollout_peak / 1e9:.3g} GB in the rollout, "
            f"{timing.update_peak / 1e9:.3g} GB in the update."
        )
    return notes


def measure(options: argparse.Namespace) -> list[Report]:
    scale, device = TINY if options.tiny else KLEIN_4B, options.device
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError("gpu: no GPU that this build of torch sees; to try it out: --tiny --device cpu")
    if device == "cpu" and not options.tiny:
        raise UserError("gpu: FLUX.2-klein-4B is too large for --device cpu; add --tiny")
    rates = matrix_rate(scale, device, options.iterations)
    rate = max(rates.values())
    flops = count_flops(scale)
    grid = new_backbone(scale, "meta", torch.float32).sigmas(STEPS, scale.pixels, scale.pixels)
    search = Search(scale, device, options.iterations, mean_steps("semantic", grid), {})
    lost = None
    try:
        search.run(options)
    except DeviceLost as error:
        lost = error
    best = search.best()
    rows = [row(search, settings, flops, rate) for settings in sorted(search.tried, key=search.score, reverse=True)]
    first = dict(zip(("rollout", "update"), (i for i, name in enumerate(COLUMNS) if name == "share"), strict=True))
    shares = {what: rows[0][place] for what, place in first.items()}
    products = ", ".join(f"{side}: {value / 1e12:.4g}" for side, value in rates.items())
    notes = [
        f"bfloat16 matrix products, TFLOP/s by side: {products}; shares are of the best.",
        f"One sample: forward {flops.forward / 1e12:.3g} TFLOP, update {flops.update / 1e12:.3g} TFLOP; "
        f"{search.steps_before_query:.2f} grid steps before a `semantic` query.",
        f"Fastest: {', '.join(f'{name} {value}' for name, value in asdict(best).items())}.",
        *([] if lost else memory_notes(scale, device, search.tried[best])),
    ]
    if lost:
        notes.append(f"The device was lost at the last setting, and the search ended there: {lost}.")
    bars = [] if options.tiny else [Bar(f"{what}: share of the matrix rate", shares[what], TARGET) for what in shares]
    title = "GPU: utilisation at FLUX.2-klein-4B size" + (" (tiny trial, not a result)" if options.tiny else "")
    how = HOW.format(steps=ROLLOUT_STEPS, iterations=options.iterations)
    details = {
        "tried": [asdict(s) | {"outcome": t if isinstance(t, str) else asdict(t)} for s, t in search.tried.items()]
    }
    return [Report("gpu", title, how, COLUMNS, rows, bars, notes, details=details)]


def batches(text: str) -> list[int]:
    """An argument type: a comma-separated list of batch sizes."""
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: write sizes as 1,2,4")
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    parser = arguments("model FLOP utilisation of rollout and update on one GPU; finds the fastest settings")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to try the script out")
    parser.add_argument("--batch", type=batches, default=[1, 2, 4, 8, 16, 32], help="sizes, tried until memory ends")
    parser.add_argument("--checkpointing", type=names(SWITCH), default=list(SWITCH))
    parser.add_argument("--sdpa", type=names(list(SDPA)), default=list(SDPA), help="attention kernels")
    parser.add_argument("--rollout", type=names(ROLLOUT), default=list(ROLLOUT), help="weights the rollout follows")
    parser.add_argument("--rollout-compile", type=names(COMPILE), default=["off", "default"], help="of a merged copy")
    parser.add_argument("--compile", type=names(COMPILE), default=["off", "default"], help="of the update")
    parser.add_argument("--iterations", type=int, default=5)
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
