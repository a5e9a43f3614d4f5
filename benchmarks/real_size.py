"""Real sizes: random weights of FLUX.2-klein 4 B (or Z-Image 6 B) through every phase from data to generate.

    python -m benchmarks.real_size [--base klein|z_image] [--text-encoder real] [--side PIXELS] [--folder PATH]
                                   [--json PATH]
    python -m benchmarks.real_size --tiny     every line of it in a small size

The weights are of the published shapes, in bfloat16 and in the files' own layout, and are drawn file by file. Each
phase is a process of its own that runs the real command; what it takes of memory is set against what must be there and
against what `danceopd recipe check` says.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from benchmarks.gpu import KLEIN_4B, TINY
from benchmarks.harness import Bar, Report, arguments, run_script
from danceopd.backbones import open_outline
from danceopd.config.load import load_recipe
from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.files import write_atomic
from danceopd.preflight.fake_pass import Samples, kept_bytes
from danceopd.preflight.memory import samples_at_once, trained_parameters
from danceopd.preflight.outlook import look_ahead
from danceopd.pretraining.world_base import new_text_encoder, new_tokenizer

GIB = 2**30
TOKENS, STEPS, TEACHER = 24, 2, "editor"
FILE_BYTES = 2 * GIB  # of weights in one file, about
MOST, CLOSE = 1.25, 0.15
COLUMNS = ["phase", "peak GiB", "of it no file's", "must be there", "ratio", "estimate", "off by", "written GiB", "s"]
HOW = (
    "Random weights in bfloat16, drawn file by file, in the published shapes and layout: {what}. Pictures of "
    f"{{side}} x {{side}} pixels, {TOKENS} prompt tokens, LoRAs of rank {{rank}}, {STEPS} updates of batch 2 with "
    "activation checkpointing. Each command is a process of its own and its phases are told apart inside it; a peak is "
    "of the resident set, mapped files included. What must be there: what the same process takes at the tiny size "
    "(interpreter and libraries), and the weights in use once in the files' dtype, what trains in float32 with "
    "gradients and optimizer, and activations. The estimate is the package's own, above the same tiny size."
)


# ---------------------------------------------------------------------------------------------------- random weights


@dataclass(frozen=True)
class Base:
    """A base to be drawn.

    Attributes:
        name: for the reader.
        pipeline: makes the pipeline around everything but its transformer: (tokenizer, text encoder) -> pipeline.
        transformer: makes the network, called where it gets no memory.
        encoder: of prompts, called there too: vocabulary -> network.
        model: the recipe's `model` section, without its base.
        most_bytes: of weights in one file of the transformer.
    """

    name: str
    pipeline: Callable[[Any, nn.Module], Any]
    transformer: Callable[[], Any]
    encoder: Callable[[int], Any]
    model: dict
    most_bytes: int = FILE_BYTES


def klein(config: dict, text: str) -> Base:
    """FLUX.2-klein, with a text encoder that is small in depth (`small`), or Qwen3-4B (`real`)."""
    width, layers = config["joint_attention_dim"] // 3, [1, 2, 3]
    encoder: Callable[[int], Any] = lambda words: new_text_encoder(words, width)  # noqa: E731
    if text == "real":
        encoder, layers = lambda words: Qwen3ForCausalLM(qwen3_4b()), [9, 18, 27]
    channels = config["in_channels"] // 4
    model = {"backbone": "flux2_klein", "text_encoder_out_layers": layers}

    def pipeline(tokenizer: Any, part: nn.Module) -> Any:
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 16, 24, 32), layers_per_block=1, latent_channels=channels, norm_num_groups=2
        )
        network = Flux2Transformer2DModel(**TINY.config)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        return Flux2KleinPipeline(scheduler, vae, part, tokenizer, network)

    return Base("FLUX.2-klein", pipeline, lambda: Flux2Transformer2DModel(**config), encoder, model)


def z_image(config: dict, text: str) -> Base:
    """Z-Image; its class's own defaults are the published configuration. The text encoder is as for klein."""
    width = config.get("cap_feat_dim", 2560)

    def encoder(words: int) -> Any:
        return Qwen3Model(qwen3_4b()) if text == "real" else new_text_encoder(words, width).model

    def pipeline(tokenizer: Any, part: nn.Module) -> Any:
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 24, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=2,
            shift_factor=0.1,
            scaling_factor=0.4,
        )
        network = ZImageTransformer2DModel(**Z_TINY)
        return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, part, tokenizer, network)

    return Base("Z-Image", pipeline, lambda: ZImageTransformer2DModel(**config), encoder, {"backbone": "z_image"})


Z_TINY = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 48}
Z_TINY |= {"axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32]}
BASES = {"klein": (klein, KLEIN_4B.config, TINY.config), "z_image": (z_image, {}, Z_TINY)}


def qwen3_4b() -> Qwen3Config:
    """The published configuration of Qwen3-4B."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )


def make_base(base: Base, folder: Path) -> None:
    """The pipeline's folder; the transformer's weights, and those of a large text encoder, are never whole."""
    tokenizer = new_tokenizer()
    with init_empty_weights():
        network, encoder = base.transformer(), base.encoder(len(tokenizer))
    pipeline = base.pipeline(tokenizer, new_text_encoder(len(tokenizer)))
    pipeline.save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(0)
    write_random(network, folder / "transformer", "diffusion_pytorch_model", base.most_bytes, generator)
    write_random(encoder, folder / "text_encoder", "model", base.most_bytes, generator)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", type(encoder).__name__]
    write_atomic(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def write_random(network: Any, folder: Path, stem: str, most: int, generator: torch.Generator) -> None:
    """A network's configuration and random weights in bfloat16 as files of about `most` bytes, with their index."""
    shutil.rmtree(folder)
    folder.mkdir()
    if hasattr(network, "to_json_string"):
        (folder / "config.json").write_text(network.to_json_string())
    else:
        network.config.architectures, network.config.dtype = [type(network).__name__], torch.bfloat16
        network.config.save_pretrained(folder)
    files = list(in_files(dict(network.named_parameters()), most))
    where = {}
    for number, names in enumerate(files, start=1):
        name = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        where |= dict.fromkeys(names, name)
        save_file(
            {key: random_weight(key, of, generator) for key, of in names.items()}, folder / name, {"format": "pt"}
        )
    total = 2 * sum(of.numel() for names in files for of in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def in_files(weights: dict[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Weights in their order, as many together as a file of about `most` bytes holds in bfloat16."""
    mine: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if mine and 2 * sum(of.numel() for of in (*mine.values(), weight)) > most:
            yield mine
            mine = {}
        mine[name] = weight
    yield mine


def random_weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """A weight that keeps activations of a size: a matrix by its width, a norm's of one, a bias of nothing."""
    if like.ndim < 2:
        fill = 0.0 if name.endswith("bias") else 1.0
        return torch.full(like.shape, fill, dtype=torch.bfloat16)
    width = math.prod(like.shape[1:])
    scale = 1.0 if "embed_tokens" in name else math.sqrt(3 / width)
    return torch.empty(like.shape, dtype=torch.bfloat16).uniform_(-scale, scale, generator=generator)


# -------------------------------------------------------------------------------------------------------- the phases


def recipe_of(base: Base, folder: Path, rank: int, side: int) -> dict:
    """A recipe that runs every phase on the base: one task is drawn by the base, one edited by a teacher of the run.

    Args:
        base: what is drawn.
        folder: its pipeline's.
        rank: of the LoRAs.
        side: of all pictures, in pixels.
    """
    training = {"trainable": "lora", "lora": {"rank": rank, "alpha": rank}, "steps": STEPS, "batch": 2}
    training |= {"precision": "bfloat16", "activation_checkpointing": True, "warmup": 1, "log_every": 1}
    sizes = {"train": 3, "val": 1, "test": 1}
    gate = {"metric": "psnr", "max_drop": 100.0, "champion_margin": 100.0}
    return {
        "name": "real_size",
        "model": base.model
        | {"base": str(folder), "height": side, "width": side, "max_sequence_length": TOKENS, "dtype": "bfloat16"},
        "data": {"world": {"t2i": sizes, "local_edit": sizes}},
        "tasks": {
            "t2i": {"teacher": "base", "needs_source": False, "metrics": ["psnr"], "gates": [gate]},
            "local_edit": {"teacher": TEACHER, "needs_source": True, "metrics": ["psnr"]},
        },
        "teachers": {
            "base": {"kind": "base"},
            TEACHER: {"kind": "finetune", "task": "local_edit", "train": training | {"lr": 0.02}},
        },
        "distill": training
        | {"lr": 1e-3, "accumulate": 2, "rollout_steps": 3, "window": "early_steps", "checkpoint_every": 1},
        "evaluate": {"per_task": 1, "steps": 2, "batch": 1, "pictures": 1, "drift": None},
        "register_as": {"model": "real-size", "experiment": "real-size"},
    }


@dataclass(frozen=True)
class Measured:
    """What the phases of one base took: {phase: figures of its stretch}, and what the preflight said."""

    stretches: dict[str, dict]
    preflight: int


Run = Callable[[list[str], Path], dict]


def run_phases(folder: Path, recipe: dict, run: Run) -> Measured:
    """Every phase in turn; `run` runs a command, given its arguments and a folder for scratch files.

    Raises:
        UserError: with the end of its output, if a command fails.
    """
    file, place = folder / "recipe.yaml", ["--workspace", str(folder / "runs")]
    write_atomic(file, yaml.safe_dump(recipe))
    of = ["--recipe", str(file)]
    commands = {
        "check": ["recipe", "check", str(file), *place],
        "data build": ["data", "build", *of, *place],
        "encodings": ["data", "cache", *of, *place, "--out", str(folder / "encodings")],
        "teacher": ["finetune", TEACHER, *of, *place],
        "student": ["distill", *of, *place],
        "evaluation": ["evaluate", *of, *place],
        "registration": ["register", *of, *place],
        "generate": ["generate", "STUDENT", "a red square", "--steps", "2", "--out", str(folder / "out.png")],
    }
    stretches: dict[str, dict] = {}
    preflight = 0
    for name, command in commands.items():
        if "STUDENT" in command:
            [student] = (folder / "runs" / "students").glob("*/pipeline")
            command[command.index("STUDENT")] = str(student)
        print(f"benchmarks: real_size {name}", file=sys.stderr)
        told = run(command, folder)
        preflight = told["estimates"].get("preflight", preflight)
        for stretch in told["stretches"]:
            stretches[stretch["name"] if ":" in stretch["name"] else name] = stretch
    return Measured(stretches, preflight)


def run_command(command: list[str], folder: Path) -> dict:
    """One command of `danceopd` in a process of its own, measured."""
    here, figures = Path(__file__).parents[1], folder / "figures.json"
    environment = os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.real_size_worker", str(figures), *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        end = " ".join(done.stderr.strip().splitlines()[-8:])
        raise UserError(f"danceopd {' '.join(command[:2])} ended with {done.returncode}: {end}")
    return json.loads(figures.read_text())


# ------------------------------------------------------------------------------------------------- what must be there


def must_be_there(recipe: Recipe, folder: Path) -> dict[str, int]:
    """Bytes by phase, besides what the tiny size takes: weights once, what trains, activations."""
    outline = open_outline(folder, recipe.model)
    weights, encoders = stored(folder / "transformer"), stored(folder / "text_encoder") + stored(folder / "vae")
    parameters = trained_parameters(outline.transformer, recipe.distill, outline.lora_targets)
    adapter, training = 4 * parameters, 16 * parameters
    samples = Samples(samples_at_once(recipe.distill, 1), recipe.model.height, recipe.model.width, edits=True)
    kept = kept_bytes(outline, recipe.distill, samples)
    return {
        "data build": 0,
        "encodings": encoders,
        "teacher: read": weights + encoders,
        "teacher: updates": weights + training + kept,
        "teacher: proof": weights + adapter,
        "student: read, preflight": weights + adapter + encoders,
        "student: updates": weights + adapter + training + kept,
        "student: export": weights + 2 * adapter,
        "evaluation": weights + 2 * adapter + encoders,
        "registration": 0,
        "generate": weights + encoders,
    }


# By phase of this benchmark: what `recipe check` calls it.
CALLED = {
    "data build": None,
    "encodings": "encode",
    "teacher: read": "load",
    "teacher: updates": f"fine-tune {TEACHER}",
    "teacher: proof": f"prove {TEACHER}",
    "student: read, preflight": "load",
    "student: updates": "distill",
    "student: export": "export",
    "evaluation": "evaluate",
    "registration": "register",
    "generate": "generate",
}


def estimates(recipe: Recipe, workspace: Path) -> dict[str, int]:
    """What `danceopd recipe check` says of each phase's memory, in bytes."""
    said = {phase.name: phase.memory for phase in look_ahead(recipe, workspace).phases}
    return {phase: 0 if called is None else said[called] for phase, called in CALLED.items()}


def stored(folder: Path) -> int:
    """Bytes of a network's weights as they lie in their files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------- the report


def measure_in(folder: Path, options: argparse.Namespace, run: Run = run_command) -> Report:
    """The report, over an empty folder."""
    make, config, tiny = BASES[options.base]
    floor, recipe = measured(make(tiny, "small"), folder / "tiny", 4, options.side, run)
    base, found, place = make(tiny, "small"), floor, folder / "tiny"
    if not options.tiny:
        place = folder / "real"
        base = make(config, options.text_encoder)
        found, recipe = measured(base, place, options.rank, options.side, run)
    must, said = must_be_there(recipe, place / "base"), estimates(recipe, place / "runs")
    rows = [row(name, found.stretches[name], floor.stretches[name], of, said[name]) for name, of in must.items()]
    bars = [
        Bar("peak of any phase to what must be there", max(cells[4] for cells in rows), MOST, False),
        Bar("the estimate's greatest error, as a share of the peak", max(abs(c[6]) for c in rows), CLOSE, False),
    ]
    weights = sum(p.numel() for p in open_outline(place / "base", recipe.model).transformer.parameters())
    text = "Qwen3-4B" if options.text_encoder == "real" else "a text encoder of its width and few layers"
    what = f"{base.name} of {weights:,} weights, {text}, the autoencoder's own class at a small size"
    how = HOW.format(what=what, side=options.side, rank=recipe.distill.lora.rank)
    return Report("real_size", f"{base.name} at its real size", how, COLUMNS, rows, bars)


def row(phase: str, stretch: dict, floor: dict, needed: int, estimate: int) -> list:
    """The table's row of one phase; so many bytes must be there, and are said to be, besides the floor."""
    peak, there, said = (size / GIB for size in (stretch["peak"], floor["peak"] + needed, floor["peak"] + estimate))
    cells = [phase, peak, stretch["anonymous"] / GIB, there, peak / there, said, said / peak - 1]
    return [*cells, stretch["written"] / GIB, stretch["seconds"]]


def measured(base: Base, folder: Path, rank: int, side: int, run: Run) -> tuple[Measured, Recipe]:
    """Draw a base and run every phase on it."""
    folder.mkdir(parents=True)
    make_base(base, folder / "base")
    found = run_phases(folder, recipe_of(base, folder / "base", rank, side), run)
    return found, load_recipe(str(folder / "recipe.yaml"), [])


def measure(options: argparse.Namespace) -> list[Report]:
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("real_size.py reads Linux's /proc; run it on Linux")
    with tempfile.TemporaryDirectory(prefix="real-size-", dir=options.folder) as scratch:
        return [measure_in(Path(scratch), options)]


def parser() -> argparse.ArgumentParser:
    parser = arguments("every phase at a real size: memory, disk and time")
    parser.add_argument("--base", choices=list(BASES), default="klein")
    parser.add_argument("--text-encoder", choices=("small", "real"), default="small")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRAs")
    parser.add_argument("--side", type=int, default=64, help="of all pictures, in pixels; default: 64")
    parser.add_argument("--tiny", action="store_true", help="every line of it in a small size")
    parser.add_argument("--folder", type=Path, help="where there is room for the files; default: the system's own")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
