"""Stable Diffusion 3.5: `StableDiffusion3Pipeline` with `SD3Transformer2DModel`, two CLIP encoders and T5.

Particular to it: the transformer takes latents as pictures and 1000 sigma as time; a prompt is its CLIP and T5 tokens
and one pooled vector beside them, which travels here as the first rows of the embedding. It draws; it cannot edit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, StableDiffusion3Pipeline
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.backbones.packing import to_latents, to_tokens
from danceopd.backbones.pipeline import ShiftedLatentsBackbone
from danceopd.errors import UserError


class SD3(ShiftedLatentsBackbone):
    """The Stable Diffusion 3.5 back end around one loaded pipeline."""

    pipelines = (StableDiffusion3Pipeline,)
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    most_sources = 0
    lora_targets = r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._token_grid(height, width)
        largest = self.transformer.config.pos_embed_max_size
        if max(rows, columns) > largest:
            raise UserError(
                f"picture size {height}x{width}: this base takes at most {largest * self._patch} pixels per side"
            )
        return rows * columns, 4 * self.transformer.config.in_channels

    def prompt_shape(self, edits: bool) -> tuple[int, int]:
        known = self.transformer.config
        pooled = -(-known.pooled_projection_dim // known.joint_attention_dim)
        tokens = self.pipeline.tokenizer_max_length + self.settings.max_sequence_length  # CLIP's, then T5's
        return pooled + tokens, known.joint_attention_dim

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], sources: list[list[Tensor]] | None = None) -> Tensor:
        self._need_encoders()
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.pipeline.vae.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_sequence_length,
        )
        width = tokens.shape[2]
        pooled = F.pad(pooled.float(), (0, -pooled.shape[1] % width)).unflatten(1, (-1, width))
        return torch.cat([pooled, tokens.float()], dim=1)

    def tokens_lost(self, prompts: list[str], sources: int = 0) -> list[int]:
        if self.pipeline.tokenizer_3 is not None:
            return super().tokens_lost(prompts, sources)
        longest = self.pipeline.tokenizer_max_length  # CLIP's alone
        return [max(0, len(self.pipeline.tokenizer(prompt).input_ids) - longest) for prompt in prompts]

    def _length(self, prompt: str, sources: int) -> int:
        return len(self.pipeline.tokenizer_3(prompt).input_ids)

    def _prompt_parts(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) and pooled vector (B, P)."""
        length = self.transformer.config.pooled_projection_dim
        rows = -(-length // prompt.shape[2])
        return prompt[:, rows:], prompt[:, :rows].flatten(1)[:, :length]

    def velocity(self, transformer: ModelMixin, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        if condition.source is not None:
            raise UserError("Stable Diffusion 3.5 cannot edit a source image; give it drawing tasks only")
        dtype = transformer.context_embedder.weight.dtype
        tokens, pooled = self._prompt_parts(condition.prompt.to(dtype))
        output = transformer(
            hidden_states=to_latents(z.to(dtype), *self._token_grid(condition.height, condition.width)),
            timestep=1000 * sigma,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return to_tokens(output)

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        tokens, _ = self.latent_shape(height, width)
        dynamic = self.pipeline.scheduler.config.get("use_dynamic_shifting")
        return self._scheduled(num_inference_steps=steps, mu=self._shift(tokens, most=1.16) if dynamic else None)
