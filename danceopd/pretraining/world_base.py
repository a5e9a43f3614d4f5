"""Makes the small world's bases: tiny FLUX.2-klein pipeline folders (`danceopd world build-base`).

Nobody pre-trains a real base inside a distillation run, and nobody does here: the folders this writes ship with the
package. Two stages, both on pictures the world draws afresh: an autoencoder (the latent space all fields share), then
a flow-matching transformer that draws from captions and can repeat a reference picture, as a base checkpoint with
reference inputs can; it knows neither the edits nor the styles. A third, for the base of open words: the same
transformer on captions of which half leave something open.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from danceopd.backbones.base import Condition
from danceopd.backbones.flux2_klein import Flux2Klein
from danceopd.config.recipe import ModelRecipe
from danceopd.data import world
from danceopd.files import atomic_folder, hash_folder, write_atomic, write_json
from danceopd.flow.losses import flow_matching_loss
from danceopd.training.optim import build_optimizer, lr_factor

log = logging.getLogger(__name__)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
PROMPT_TOKENS = 24
OUT_LAYERS = (1, 2, 3)
SHAPE = ModelRecipe(
    base="world",
    height=world.SIZE,
    width=world.SIZE,
    max_sequence_length=PROMPT_TOKENS,
    text_encoder_out_layers=OUT_LAYERS,
)


@dataclass(frozen=True)
class BuildPlan:
    """How long each stage trains. The defaults made the shipped base.

    That of open words went on from it for 10,500 steps, in two stretches that its JSON file names; `open_steps: 10500`
    is as long, with today's captions throughout.
    """

    vae_steps: int = 5000
    vae_batch: int = 32
    vae_lr: float = 5e-3
    steps: int = 8000
    open_steps: int = 0
    batch: int = 48
    lr: float = 0.03
    seed: int = 0


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """(H, W, 3) uint8 pictures as (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _varied_picture(rng: random.Random) -> np.ndarray:
    """A picture for the autoencoder: plain, styled, recolored by a random affine map, or random pixel-art."""
    scene = world.random_scene(rng, novel=rng.random() < 0.1, fewest=0, most=4)
    kind = rng.random()
    if kind < 0.35:
        return world.render(scene)
    if kind < 0.65:
        return world.render(scene, rng.choice(list(world.STYLES)))
    noise = np.random.default_rng(rng.getrandbits(32))
    if kind < 0.9:
        mix, shift = noise.normal(0, 0.5, (3, 3)), noise.uniform(0, 255, 3)
        mixed = (world.render(scene)[:: world.SCALE, :: world.SCALE] - 128.0) @ mix + shift
    else:
        mixed = noise.uniform(0, 255, (6, 3))[noise.integers(0, 6, (world.GRID, world.GRID))]
    pixels = np.clip(mixed, 0, 255).astype(np.uint8)
    return pixels.repeat(world.SCALE, 0).repeat(world.SCALE, 1)


def new_vae() -> AutoencoderKLFlux2:
    """An untrained autoencoder: factor 8, 4 latent channels, so 16 tokens of 16 numbers for 64x64 pixels.

    Few normalization groups: with as many groups as channels the last layers forget absolute color.
    """
    return AutoencoderKLFlux2(
        block_out_channels=(8, 16, 24, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=world.SIZE,
    )


@torch.no_grad()
def start_near_identity(vae: AutoencoderKLFlux2) -> None:
    """Start the autoencoder as plain averaging down and plain repeating up.

    Residual branches and attention start at zero, the resampling convolutions as a mean and as a copy, and constant
    channels dominate what the normalization layers see, so that these begin nearly linear: without that, absolute
    color is what they remove, and it takes tens of thousands of steps to bring it back.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                wide, narrow = module.conv_shortcut.weight.shape[:2]
                module.conv_shortcut.weight.copy_(torch.eye(wide, narrow)[..., None, None])
                module.conv_shortcut.bias.copy_(_constant_channels(wide))
                module.conv_shortcut.bias[: min(wide, narrow)] = 0
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
            nn.init.zeros_(module.to_out[0].bias)
        elif isinstance(module, Downsample2D):
            nn.init.zeros_(module.conv.weight)
            module.conv.weight[:, :, :2, :2] = torch.eye(len(module.conv.weight))[..., None, None] / 4
            nn.init.zeros_(module.conv.bias)
        elif isinstance(module, Upsample2D):
            nn.init.dirac_(module.conv.weight)
            nn.init.zeros_(module.conv.bias)
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        seen = min(conv.weight.shape[:2])
        nn.init.dirac_(conv.weight)
        conv.bias.copy_(_constant_channels(len(conv.bias)))
        conv.bias[:seen] = 0


def _constant_channels(count: int) -> torch.Tensor:
    return torch.tensor([2.0, -2.0]).repeat(count // 2 + 1)[:count]


def train_vae(plan: BuildPlan) -> AutoencoderKLFlux2:
    """Train the autoencoder on varied pictures; its decoder learns to forgive small errors in the latents.

    Latents are disturbed by noise relative to their own spread (up to 0.3 of it), which makes the decoder robust to
    what a few Euler steps leave behind, and leaves nothing to gain from the scale of the latents.
    """
    torch.manual_seed(plan.seed)
    vae = new_vae()
    start_near_identity(vae)
    vae = vae.to(memory_format=torch.channels_last)
    rng, noise = random.Random(plan.seed), torch.Generator().manual_seed(plan.seed)
    optimizer = build_optimizer(vae.parameters(), "adamw", plan.vae_lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, plan.vae_steps, 100))
    started = time.monotonic()
    for step in range(plan.vae_steps):
        x = to_tensor([_varied_picture(rng) for _ in range(plan.vae_batch)]).to(memory_format=torch.channels_last)
        z = vae.encode(x).latent_dist.mode()
        spread = z.detach().std(dim=(0, 2, 3), keepdim=True)
        level = 0.3 * torch.rand(len(z), 1, 1, 1, generator=noise)
        y = vae.decode(z + level * spread * torch.randn(z.shape, generator=noise)).sample
        loss = F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-5 * z.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == plan.vae_steps - 1:
            log.info("vae step %d/%d loss %.5f, %.0f s", step, plan.vae_steps, loss.item(), time.monotonic() - started)
    _set_latent_statistics(vae, rng)
    return vae.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def _set_latent_statistics(vae: AutoencoderKLFlux2, rng: random.Random) -> None:
    """Fill the batch-norm statistics FLUX.2 scales its latents by, and give the unused log-variance a small value."""
    x = to_tensor([world.render(world.random_scene(rng), rng.choice([None, *world.STYLES])) for _ in range(1024)])
    z = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(128)])
    tokens = Flux2KleinPipeline._patchify_latents(z)
    vae.bn.running_mean.copy_(tokens.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(tokens.var(dim=(0, 2, 3)))
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = math.log(1e-2 * float(z.var()))


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLFlux2, pictures: list[np.ndarray]) -> float:
    """Mean PSNR in dB of decoded over encoded pictures, on 8-bit values: the ceiling of every dB figure."""
    values = []
    for part in to_tensor(pictures).split(128):
        y = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((y - part) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
        values.append(-10 * torch.log10(error))
    return torch.cat(values).mean().item()


def new_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer trained on the world's wordings: a known word is one token, anything else is spelt."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Qwen2Tokenizer()._tokenizer
    assert bpe is not None
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = world.corpus()
    bpe.train_from_iterator(corpus + [word for text in corpus for word in text.split()], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, additional_special_tokens=specials[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "right"
    return tokenizer


def new_text_encoder(vocabulary: int, hidden: int = 64, seed: int = 0) -> Qwen3ForCausalLM:
    """A frozen, untrained Qwen3 of three layers.

    Its token embeddings are far larger than what the layers add, so a word keeps its identity in any context.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
    return model.requires_grad_(False).eval()


def new_transformer(
    joint_dim: int, channels: int, heads: int = 4, head_dim: int = 32, doubles: int = 1, singles: int = 2, seed: int = 0
) -> Flux2Transformer2DModel:
    """An untrained FLUX.2 transformer; the defaults are the shipped base's."""
    torch.manual_seed(seed)
    return Flux2Transformer2DModel(
        in_channels=channels,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=joint_dim,
        timestep_guidance_channels=64,
        mlp_ratio=2.0,
        axes_dims_rope=(head_dim // 4,) * 4,
        guidance_embeds=False,
    )


def new_pipeline(vae: AutoencoderKLFlux2, transformer: Flux2Transformer2DModel | None = None) -> Flux2KleinPipeline:
    """The pieces as one stock pipeline."""
    tokenizer = new_tokenizer()
    encoder = new_text_encoder(len(tokenizer))
    if transformer is None:
        transformer = new_transformer(len(OUT_LAYERS) * encoder.config.hidden_size, 4 * vae.config.latent_channels)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return Flux2KleinPipeline(scheduler, vae, encoder, tokenizer, transformer)


Drawings = tuple[list[str], list[world.Scene]]


def _closed_drawings(rng: random.Random, count: int) -> Drawings:
    """Captions that determine their scenes; one in twenty is empty."""
    scenes = [world.random_scene(rng) for _ in range(count)]
    return ["" if rng.random() < 0.05 else world.caption(world.Wanted.exactly(s), rng) for s in scenes], scenes


def _open_drawings(rng: random.Random, count: int) -> Drawings:
    """Captions, half of them open, each with one of the scenes it allows; one in twenty is empty."""
    prompts, scenes = [], []
    for _ in range(count):
        leaves_open = rng.random() < 0.5
        wanted = world.random_wishes(rng) if leaves_open else world.Wanted.exactly(world.random_scene(rng))
        scenes.append(world.allowed_scene(wanted, rng))
        prompts.append("" if rng.random() < 0.05 else world.caption(wanted, rng))
    return prompts, scenes


def _repeats(rng: random.Random, count: int) -> tuple[list[str], list[np.ndarray]]:
    """References to repeat, one in five of them in a style."""
    styles = [rng.choice([None, None, None, None, *world.STYLES]) for _ in range(count)]
    pictures = [world.render(world.random_scene(rng, fewest=0, most=4), style) for style in styles]
    return [rng.choice(world.REPEATS) for _ in pictures], pictures


@dataclass(frozen=True)
class Stage:
    """One stretch of the transformer's training.

    Attributes:
        name: for its random draws and its log.
        steps: updates.
        drawings: captions with their scenes, three batches in four.
        shift: moves noise levels, evenly drawn, towards noise: s u / (1 + (s - 1) u), as a scheduler's shift does.
    """

    name: str
    steps: int
    drawings: Callable[[random.Random, int], Drawings]
    shift: float


def train_transformer(
    backbone: Flux2Klein, network: Flux2Transformer2DModel, stage: Stage, plan: BuildPlan
) -> Flux2Transformer2DModel:
    """Flow matching on captions and on repeated references; never an edit, never a styled drawing from words."""
    network.requires_grad_(True)
    optimizer = build_optimizer(network.parameters(), "muon", plan.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, stage.steps, 200))
    rng, noise = random.Random(f"{stage.name}/{plan.seed}"), torch.Generator().manual_seed(plan.seed)
    started, drawing_loss = time.monotonic(), 0.0
    for step in range(stage.steps):
        repeat = rng.random() >= 0.75
        if repeat:
            prompts, pictures = _repeats(rng, plan.batch)
        else:
            prompts, scenes = stage.drawings(rng, plan.batch)
            pictures = [world.render(scene) for scene in scenes]
        x = backbone.encode_images(to_tensor(pictures))
        condition = Condition(backbone.encode_prompts(prompts), x if repeat else None, world.SIZE, world.SIZE)
        eps, even = torch.randn(x.shape, generator=noise), torch.rand(len(x), generator=noise)
        sigma = stage.shift * even / (1 + (stage.shift - 1) * even)
        loss = flow_matching_loss(backbone, network, x, condition, eps, sigma).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if not repeat:
            drawing_loss += 0.02 * (loss.item() - drawing_loss)
        if step % 250 == 0 or step == stage.steps - 1:
            seconds = time.monotonic() - started
            log.info("%s step %d/%d loss %.4f, %.0f s", stage.name, step, stage.steps, drawing_loss, seconds)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def measure_base(backbone: Flux2Klein, count: int = 256) -> dict[str, Any]:
    """What the base can do, on held-out scenes: reconstruction, drawing by sampling steps, repeating a reference."""
    from danceopd.config.recipe import EvaluateRecipe
    from danceopd.data.encode import encode_records
    from danceopd.evaluation.scoring import score_records
    from danceopd.flow.fields import VelocityField

    rng = random.Random("base-figures")
    plain = [world.render(world.random_scene(rng, novel=True)) for _ in range(count)]
    styled = [world.render(world.random_scene(rng, novel=True), rng.choice(list(world.STYLES))) for _ in range(count)]
    spec, base = EvaluateRecipe(), VelocityField("base", backbone, backbone.transformer)
    drawing = list(world.world_records({"t2i": {"test": 2 * count}}, seed=1, open_share=0.5))
    valid: dict[str, Any] = {}
    for kind in (False, True):
        records = [r for r in drawing if r.facts()["open"] == kind]
        encoded = encode_records(backbone, records, world.SIZE, world.SIZE, None, "", False)
        valid["open" if kind else "closed"] = {
            steps: score_records(base, encoded, records, ("valid",), spec.model_copy(update={"steps": steps})).means[
                "valid"
            ]
            for steps in (1, 2, 4, 8, 16)
        }
    repeats = [
        replace(r, prompt=world.REPEATS[0], target=r.source)
        for r in world.world_records({"global_style": {"test": count}}, seed=1)
    ]
    encoded = encode_records(backbone, repeats, world.SIZE, world.SIZE, None, "", False)
    return {
        "reconstruction_psnr_plain": reconstruction_psnr(backbone.pipeline.vae, plain),
        "reconstruction_psnr_styled": reconstruction_psnr(backbone.pipeline.vae, styled),
        "valid_by_steps": valid,
        "repeat_psnr": score_records(base, encoded, repeats, ("psnr",), spec).means["psnr"],
    }


def build_base(out: Path, plan: BuildPlan, count: int = 256) -> dict:
    """Make the base and write it whole: the pipeline folder `out`, its hash `out`.sha256, its figures `out`.json."""
    started = time.monotonic()
    vae = train_vae(plan)
    trained = time.monotonic()
    backbone = Flux2Klein(new_pipeline(vae), SHAPE)
    network = backbone.new_transformer()
    stages = [Stage("base", plan.steps, _closed_drawings, 1.0)]
    if plan.open_steps:
        stages.append(Stage("open", plan.open_steps, _open_drawings, 1.5))
    for stage in stages:
        network = train_transformer(backbone, network, stage, plan)
    backbone.pipeline.transformer = network
    seconds = {"vae_seconds": round(trained - started), "transformer_seconds": round(time.monotonic() - trained)}
    return export_base(backbone, Path(out), {"plan": asdict(plan), **seconds}, count)


def export_base(backbone: Flux2Klein, out: Path, facts: dict, count: int = 256) -> dict:
    """Write the base's folder with half-precision autoencoder weights, and measure what was written."""
    with atomic_folder(out) as scratch:
        backbone.save(scratch, backbone.transformer)
        _halve(scratch / "vae" / "diffusion_pytorch_model.safetensors")
    written = Flux2Klein.load(out, SHAPE)
    figures = facts | {
        "figures": measure_base(written, count),
        "parameters": sum(p.numel() for p in written.transformer.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
    }
    write_json(out.with_suffix(".json"), figures)
    write_atomic(out.with_suffix(".sha256"), hash_folder(out) + "\n")
    return figures


def _halve(path: Path) -> None:
    tensors = load_file(path)
    save_file(
        {n: t.half() if t.is_floating_point() and not n.startswith("bn.") else t for n, t in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
