"""Qwen-Image: `QwenImagePipeline` and, for editing, `QwenImageEditPlusPipeline` around `QwenImageTransformer2DModel`.

Particular to it: the text encoder is a Qwen2.5-VL that sees the source images while it reads the prompt, so that an
edit's embedding belongs to the pair; it reads causally, so that what comes before the prompt, the images, is the same
for every prompt. Source latents enter as whole pictures behind the picture's own, any number of them, each a frame of
its own in the rotary embedding. The autoencoder is a video one that sees one frame. The time input is sigma itself.
The stock pipeline makes source latents of about a megapixel whatever it draws; here a source has the picture's size.
Guidance is the stock pipeline's: each token's guided velocity is scaled to the length of the one under the prompt.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    calculate_dimensions,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2VLProcessor

from danceopd.backbones.base import Condition
from danceopd.backbones.packing import pack_parts, to_latents, to_tokens, unpack_parts
from danceopd.backbones.pipeline import PipelineBackbone
from danceopd.config.recipe import ModelRecipe
from danceopd.errors import UserError
from danceopd.files import read_json, write_json

_SEEN, _PROMPT, _EMPTY = 1, 2, 3  # an embedding's parts; the last one is what stands for the prompt where there is none


class PictureProcessor(Qwen2VLProcessor):
    """The stock processor without its side for videos, which needs torchvision and is never asked here."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class QwenImage(PipelineBackbone):
    """The Qwen-Image back end around one loaded pipeline.

    A prompt's embedding holds three parts: what comes before the prompt (its source images, if any), the prompt itself,
    and the empty prompt in its place, for guidance.
    """

    pipelines = (QwenImageEditPlusPipeline, QwenImagePipeline)
    prompt_sees_source = True
    lora_targets = (
        r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|(img|txt)_mlp\.net\.(0\.proj|2))"
    )

    def __init__(self, pipeline: DiffusionPipeline, settings: ModelRecipe, folder: Path | None = None):
        super().__init__(pipeline, settings, folder)
        self.most_sources = None if isinstance(pipeline, QwenImageEditPlusPipeline) else 0

    @classmethod
    def _given(cls, folder: Path) -> dict:
        if not (folder / "processor").is_dir():
            return {}
        return {"processor": PictureProcessor.from_pretrained(str(folder / "processor"), local_files_only=True)}

    def save(self, folder: Path, transformer: nn.Module) -> None:
        super().save(folder, transformer)
        if self._folder is not None and isinstance(self.pipeline, QwenImageEditPlusPipeline):
            # The processor as it came, videos and all.
            shutil.rmtree(Path(folder) / "processor")
            shutil.copytree(self._folder / "processor", Path(folder) / "processor")
            index = read_json(Path(folder) / "model_index.json")
            write_json(Path(folder) / "model_index.json", index | {"processor": ["transformers", "Qwen2VLProcessor"]})

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._token_grid(height, width)
        return rows * columns, self.transformer.config.in_channels

    def prompt_shape(self, edits: bool) -> tuple[int, int]:
        # The last one marks parts.
        return self.settings.max_sequence_length, self.transformer.config.joint_attention_dim + 1

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], sources: list[list[Tensor]] | None = None) -> Tensor:
        self._need_encoders()
        longest = self.settings.max_sequence_length
        ending = self._ending()
        packed = []
        # One by one: no padding, so that an embedding depends on nothing else, as in the stock pipeline.
        for prompt, pictures in zip(prompts, sources or [[]] * len(prompts), strict=True):
            shown = [self._shown(pixels) for pixels in pictures]
            full, empty = (self._embed(text, shown) for text in (prompt, ""))
            if len(empty) > longest:
                raise UserError(
                    f"model.max_sequence_length {longest}: {len(shown)} source image(s) and the empty "
                    f"prompt take {len(empty)} tokens already; set it higher"
                )
            before = len(empty) - ending
            packed.append([full[:before], full[before:longest], empty[before:]])
        return pack_parts(packed, longest + ending)

    def _length(self, prompt: str, sources: int) -> int:
        read, pipeline = self.pipeline.tokenizer, self.pipeline if sources else self._drawing()
        shown = "".join(f"Picture {n}: <|vision_start|><|image_pad|><|vision_end|>" for n in range(1, sources + 1))
        tokens = len(read(pipeline.prompt_template_encode.format(shown + prompt)).input_ids)
        tokens -= pipeline.prompt_template_encode_start_idx + self._ending()
        return tokens + (sources * (self._picture_tokens() - 1) if sources else 0)

    def _ending(self) -> int:
        """Tokens that the template has behind the prompt."""
        return len(self.pipeline.tokenizer(self.pipeline.prompt_template_encode.partition("{}")[2]).input_ids)

    def _drawing(self) -> QwenImagePipeline:
        """The pipeline whose template is for a prompt without source images."""
        if isinstance(self.pipeline, QwenImagePipeline):
            return self.pipeline
        return QwenImagePipeline(
            **{name: part for name, part in self.pipeline.components.items() if name != "processor"}
        )

    def _picture_tokens(self) -> int:
        """Tokens that a source image of the recipe's size takes in the text encoder."""
        ratio = self.settings.width / self.settings.height
        width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, ratio)
        reader = self.pipeline.processor.image_processor
        return reader.get_number_of_image_patches(height, width, {}) // reader.merge_size**2

    def _embed(self, prompt: str, pictures: list[Image.Image]) -> Tensor:
        """Embedding (L, D) of one prompt, by the editing template if there are pictures, else by the drawing one."""
        pipeline = self.pipeline
        if pictures:
            if not isinstance(pipeline, QwenImageEditPlusPipeline):
                raise UserError(
                    "this Qwen-Image base cannot edit a source image: its folder is a QwenImagePipeline's; "
                    "take a Qwen-Image-Edit-Plus base (2509 or later)"
                )
            return pipeline._get_qwen_prompt_embeds([prompt], pictures, device=pipeline.vae.device)[0][0].float()
        return self._drawing()._get_qwen_prompt_embeds([prompt], device=pipeline.vae.device)[0][0].float()

    def _shown(self, pixels: Tensor) -> Image.Image:
        """A source image (3, H, W) as the text encoder is shown it."""
        processor = self.pipeline.image_processor
        image = processor.postprocess(pixels[None].cpu().float())[0]
        width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, image.width / image.height)
        return processor.resize(image, height, width)

    def without_prompt(self, condition: Condition, empty: Tensor) -> Condition:
        """The same samples with the empty prompt, which has seen each sample's own source; `empty` has not."""
        embedding, marks = condition.prompt.split([condition.prompt.shape[2] - 1, 1], dim=2)
        marks = torch.where(marks == _PROMPT, 0, torch.where(marks == _EMPTY, _PROMPT, marks))
        return Condition(torch.cat([embedding, marks], dim=2), condition.source, condition.height, condition.width)

    def guide(self, without: Tensor, prompted: Tensor, scale: float) -> Tensor:
        guided = super().guide(without, prompted, scale)
        wanted, found = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (prompted, guided))
        return guided * (wanted / found)

    @classmethod
    def stock_guidance(cls, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale} | ({} if scale == 1 else {"negative_prompt": ""})

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' channels, (C, 1, 1)."""
        known = self.pipeline.vae.config
        mean, std = (torch.tensor(each).to(latents)[:, None, None] for each in (known.latents_mean, known.latents_std))
        return mean, std

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        latents = self.pipeline.vae.encode(self._to_vae(pixels)[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = self._statistics(latents)
        return to_tokens((latents - mean) / std)

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        z = to_latents(self._to_vae(latents), *self._token_grid(height, width))
        mean, std = self._statistics(z)
        return self.pipeline.vae.decode((z * std + mean)[:, :, None], return_dict=False)[0][:, :, 0].clamp(-1, 1)

    def velocity(self, transformer: ModelMixin, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        count = 0 if condition.source is None else self._source_count(z, condition.source)
        tokens = z if condition.source is None else torch.cat([z, condition.source.to(z)], dim=1)
        dtype = transformer.img_in.weight.dtype
        rows = [torch.cat(parts) for parts in unpack_parts(condition.prompt.to(dtype), _SEEN, _PROMPT)]
        prompt = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=prompt.device)
        mask = torch.arange(prompt.shape[1], device=prompt.device) < lengths[:, None]
        frame = (1, *self._token_grid(condition.height, condition.width))
        output = transformer(
            hidden_states=tokens.to(dtype),
            timestep=sigma,
            encoder_hidden_states=prompt,
            encoder_hidden_states_mask=None if len({len(row) for row in rows}) == 1 else mask,
            img_shapes=[[frame] * (1 + count)] * len(z),
            return_dict=False,
        )[0]
        return output[:, : z.shape[1]]

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        tokens, _ = self.latent_shape(height, width)
        if steps == 1:  # the scheduler stretches its grid to a last noise level above 0, and one point has no last one
            return torch.tensor([1.0, 0.0])
        return self._scheduled(sigmas=np.linspace(1.0, 1 / steps, steps), mu=self._shift(tokens))
