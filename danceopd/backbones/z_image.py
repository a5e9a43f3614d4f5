"""Z-Image: `ZImagePipeline` with `ZImageTransformer2DModel`, a Qwen3 text encoder and `AutoencoderKL`.

Particular to it: the transformer takes lists of latents and patchifies them itself; its time input is 1 - sigma and its
output is -v; prompts keep their own lengths. Editing is the transformer's omni call, as in `ZImageOmniPipeline`: the
source's latents are a second, clean picture, and the prompt comes in three parts around the place of the source. The
base has no SigLIP tower, so the source enters by its latents alone. The pipelines' own functions encode the prompts.
Its pipelines guide by v_cond + g (v_cond - v_empty), so their `guidance_scale` g is `guidance` g + 1 here, where for
every family 1 is the plain field and the scale multiplies the whole difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, ZImageOmniPipeline, ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import (
    get_default_z_image_sigmas,
)
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.backbones.packing import pack_parts, to_latents, to_tokens, unpack_parts
from danceopd.backbones.pipeline import ShiftedLatentsBackbone
from danceopd.config.recipe import ModelRecipe
from danceopd.errors import UserError


class ZImage(ShiftedLatentsBackbone):
    """The Z-Image back end around one loaded pipeline.

    A prompt's embedding holds four parts: the prompt as the drawing template has it, and the three of the editing
    template. A task asks for its own, so that one prompt cache serves every route.
    """

    pipelines = (ZImagePipeline,)
    most_sources = 1
    lora_targets = r".*\.(to_q|to_k|to_v|to_out\.0|w1|w2|w3)"

    def __init__(self, pipeline: ZImagePipeline, settings: ModelRecipe, folder: Path | None = None):
        super().__init__(pipeline, settings, folder)
        if self.transformer.config.siglip_feat_dim is not None:
            raise UserError(f"{folder}: an omni checkpoint with a SigLIP tower; give a Z-Image base without one")

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._token_grid(height, width)
        return rows * columns, 4 * self.transformer.config.in_channels

    def prompt_shape(self, edits: bool) -> tuple[int, int]:
        return self.settings.max_sequence_length, self.transformer.config.cap_feat_dim + 1  # the last one marks parts

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], sources: list[list[Tensor]] | None = None) -> Tensor:
        self._need_encoders()
        longest, pipeline = self.settings.max_sequence_length, self.pipeline
        device = pipeline.vae.device
        drawing = pipeline._encode_prompt(list(prompts), device, max_sequence_length=longest)
        editing = ZImageOmniPipeline._encode_prompt(
            pipeline, list(prompts), device, max_sequence_length=longest, num_condition_images=1
        )
        before, _, after = editing[0]  # these two are the same for every prompt
        parts = [[one.float(), *(part.float() for part in three)] for one, three in zip(drawing, editing, strict=True)]
        return pack_parts(parts, 2 * longest + len(before) + len(after))

    def _length(self, prompt: str, sources: int) -> int:
        # The editing template puts the source's marks outside of what the limit is for.
        return self._chat_length(prompt, thinking=True)

    def velocity(self, transformer: ModelMixin, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = transformer.cap_embedder[1].weight.dtype
        rows, columns = self._token_grid(condition.height, condition.width)
        pictures = self._pictures(z.to(dtype), rows, columns)
        prompt = condition.prompt.to(dtype)
        if condition.source is None:
            inputs: dict[str, Any] = {"x": pictures, "cap_feats": [parts[0] for parts in unpack_parts(prompt, 1, 1)]}
        else:
            if condition.source.shape != z.shape:
                raise UserError("Z-Image edits one source image of the picture's own size per sample")
            sources = self._pictures(condition.source.to(dtype), rows, columns)
            inputs = {
                "x": [list(pair) for pair in zip(sources, pictures, strict=True)],
                "cap_feats": unpack_parts(prompt, 2, 4),
                "siglip_feats": [None] * len(z),
                "image_noise_mask": [[0, 1]] * len(z),  # the source is clean
            }
        output = transformer(t=(1000 - 1000 * sigma) / 1000, return_dict=False, **inputs)[0]
        return -to_tokens(torch.stack(output)[:, :, 0])

    @classmethod
    def stock_guidance(cls, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}  # its pipelines count from the plain field on

    @staticmethod
    def _pictures(tokens: Tensor, rows: int, columns: int) -> list[Tensor]:
        return list(to_latents(tokens, rows, columns).unsqueeze(2).unbind())

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        tokens, _ = self.latent_shape(height, width)
        return self._scheduled(sigmas=get_default_z_image_sigmas(steps), mu=self._shift(tokens))
