"""Tiny pipelines of the real classes with random weights, and the stock pipelines' own steps to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from danceopd.backbones.packing import to_latents, to_tokens
from danceopd.backbones.qwen_image import PictureProcessor
from danceopd.config.recipe import ModelRecipe
from danceopd.files import read_json, write_json
from danceopd.pretraining import world_base as wb


@dataclass(frozen=True)
class Family:
    """A model family on test.

    Attributes:
        name: as a recipe's `model.backbone` names it.
        make: writes a tiny pipeline folder.
        settings: of the model section, besides base and size.
        open_stock: (folder, whether to edit) -> the stock pipeline.
        call: stock arguments that switch guidance off and say the prompt's length.
        to_stock: our noise (B, N, C), rows, columns -> the stock pipeline's latents.
        from_stock: its latents -> ours.
        edits: whether it can edit a source image.
    """

    name: str
    make: Callable[[Path], None]
    settings: dict
    open_stock: Callable[[Path, bool], DiffusionPipeline]
    call: dict
    to_stock: Callable[[Tensor, int, int], Tensor]
    from_stock: Callable[[Tensor], Tensor]
    edits: bool = True

    def shape(self, height: int = 64, width: int = 64) -> ModelRecipe:
        """The recipe's model section."""
        return ModelRecipe(base="tiny", backbone=self.name, height=height, width=width, **self.settings)


@torch.no_grad()
def stock_latents(
    family: Family,
    pipeline: DiffusionPipeline,
    prompts: list[str],
    noise: Tensor,
    height: int,
    width: int,
    steps: int,
    image: Image.Image | None = None,
    guidance: dict | None = None,
) -> Tensor:
    """The latents (B, N, C) that the stock pipeline holds after all its steps from given noise (B, N, C).

    Without guidance, or with the arguments for it that `guidance` gives.
    """
    seen = {}

    def keep(pipe, step, timestep, tensors):
        seen.update(tensors)
        return {}

    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        prompt=list(prompts),
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
        latents=family.to_stock(noise, height // 16, width // 16),
        callback_on_step_end=keep,
        **({} if image is None else {"image": image}),
        **(family.call | (guidance or {})),
    )
    return family.from_stock(seen["latents"])


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """Factor 8, with latents that are shifted and scaled."""
    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=0.36,
        shift_factor=0.11,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


@torch.no_grad()
def lively(transformer: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: layers that start at zero would hide what is behind them."""
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn_like(parameter) * 0.3 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return transformer


# ------------------------------------------------------------------------------------------------------------- FLUX.2


def make_flux2(folder: Path) -> None:
    torch.manual_seed(0)
    transformer = wb.new_transformer(192, 16, heads=2, head_dim=16, doubles=1, singles=1)
    wb.new_pipeline(wb.new_vae().eval(), lively(transformer)).save_pretrained(str(folder))


FLUX2 = Family(
    name="flux2_klein",
    make=make_flux2,
    settings={"max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)},
    open_stock=lambda folder, edit: Flux2KleinPipeline.from_pretrained(str(folder)),
    call={"guidance_scale": 1.0, "max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)},
    to_stock=lambda noise, rows, columns: noise.permute(0, 2, 1).unflatten(2, (rows, columns)),
    from_stock=lambda latents: latents,
)


# ------------------------------------------------------------------------------------------------------------ Z-Image


class OmniWithoutSiglip(ZImageOmniPipeline):
    """The stock omni pipeline for a base that has no SigLIP tower; its own encoding would need bfloat16."""

    def prepare_siglip_embeds(self, images, batch_size, device, dtype):
        return [[] for _ in range(batch_size)]

    def prepare_image_latents(self, images, batch_size, device, dtype):
        known = self.vae.config
        modes = [self.vae.encode(image).latent_dist.mode()[0].unsqueeze(1) for image in images]
        return [[(mode - known.shift_factor) * known.scaling_factor for mode in modes] for _ in range(batch_size)]


def make_z_image(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = wb.new_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = (scheduler, tiny_vae(), Qwen3Model(config).eval(), tokenizer, lively(transformer))
    ZImagePipeline(*parts).save_pretrained(str(folder))


def open_z_image(folder: Path, edit: bool) -> DiffusionPipeline:
    pipeline = ZImagePipeline.from_pretrained(str(folder))
    return OmniWithoutSiglip(**pipeline.components, siglip=None, siglip_processor=None) if edit else pipeline


Z_IMAGE = Family(
    name="z_image",
    make=make_z_image,
    settings={"max_sequence_length": 48},
    open_stock=open_z_image,
    call={"guidance_scale": 0.0, "max_sequence_length": 48},
    to_stock=to_latents,
    from_stock=to_tokens,
)


# ---------------------------------------------------------------------------------------------- Stable Diffusion 3.5


def clip_tokenizer() -> CLIPTokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet()
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(sorted(pieces))}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    letters = [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], extra_ids=0)


def make_sd3(folder: Path) -> None:
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()

    def clip_encoder(width: int) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
        return CLIPTextModelWithProjection(config).eval()

    config = T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=36,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        lively(transformer),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        tiny_vae(),
        clip_encoder(16),
        clip,
        clip_encoder(20),
        clip,
        T5EncoderModel(config).eval(),
        t5,
    ).save_pretrained(str(folder))


SD3 = Family(
    name="sd3",
    make=make_sd3,
    settings={"max_sequence_length": 48},
    open_stock=lambda folder, edit: StableDiffusion3Pipeline.from_pretrained(str(folder)),
    call={"guidance_scale": 1.0, "max_sequence_length": 48},
    to_stock=to_latents,
    from_stock=to_tokens,
    edits=False,
)


# --------------------------------------------------------------------------------------------------------- Qwen-Image


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, and what the templates and the vision tower need."""
    specials = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return Qwen2Tokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], additional_special_tokens=specials[1:])


def make_qwen_image(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{piece}|>")
        for name, piece in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        **ids,
    )
    processor = PictureProcessor(Qwen2VLImageProcessorPil(), tokenizer)
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.1, 2.0],
    ).eval()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    parts = (scheduler, vae, encoder, tokenizer, processor, lively(transformer))
    QwenImageEditPlusPipeline(*parts).save_pretrained(str(folder))
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"processor": ["transformers", "Qwen2VLProcessor"]})


def open_qwen_image(folder: Path, edit: bool) -> DiffusionPipeline:
    if not edit:
        return QwenImagePipeline.from_pretrained(str(folder))
    processor = PictureProcessor.from_pretrained(str(folder / "processor"))  # the stock one needs torchvision
    return QwenImageEditPlusPipeline.from_pretrained(str(folder), processor=processor)


QWEN_IMAGE = Family(
    name="qwen_image",
    make=make_qwen_image,
    settings={"max_sequence_length": 1024},
    open_stock=open_qwen_image,
    call={"true_cfg_scale": 1.0, "max_sequence_length": 1024},
    to_stock=lambda noise, rows, columns: noise,
    from_stock=lambda latents: latents,
)

FAMILIES = (FLUX2, Z_IMAGE, SD3, QWEN_IMAGE)
EDITORS = tuple(family for family in FAMILIES if family.edits)
