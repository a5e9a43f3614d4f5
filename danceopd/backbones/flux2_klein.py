"""FLUX.2-klein: `Flux2KleinPipeline` with `Flux2Transformer2DModel`, a Qwen3 text encoder and `AutoencoderKLFlux2`.

Particular to it: latents are 2x2-patchified, scaled by the autoencoder's batch-norm statistics and packed to tokens;
source images enter as extra tokens behind the picture's own, with reference ids T = 10, 20 and so on, and the output is
cut back to the picture's tokens; the time input is sigma itself; the prompt embedding stacks hidden states of the text
encoder. The pipeline's own static functions do all of this, so that both agree by construction.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, ModelMixin
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.backbones.pipeline import PipelineBackbone


class Flux2Klein(PipelineBackbone):
    """The FLUX.2-klein back end around one loaded pipeline."""

    pipelines = (Flux2KleinPipeline,)
    # PEFT matches by suffix: `attn.to_out` alone would also hit the double blocks' module list of that name.
    lora_targets = (
        r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|linear_in|linear_out)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )

    @property
    def distilled(self) -> bool | None:
        return bool(self.pipeline.config.get("is_distilled", False))

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._token_grid(height, width)
        return rows * columns, self.transformer.config.in_channels

    def prompt_shape(self, edits: bool) -> tuple[int, int]:
        return self.settings.max_sequence_length, self.transformer.config.joint_attention_dim

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], sources: list[list[Tensor]] | None = None) -> Tensor:
        self._need_encoders()
        return self.pipeline._get_qwen3_prompt_embeds(
            self.pipeline.text_encoder,
            self.pipeline.tokenizer,
            prompts,
            max_sequence_length=self.settings.max_sequence_length,
            hidden_states_layers=list(self.settings.text_encoder_out_layers),
        ).float()

    def _length(self, prompt: str, sources: int) -> int:
        return self._chat_length(prompt, thinking=False)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        latents = self.pipeline._encode_vae_image(self._to_vae(pixels), generator=None)
        return self.pipeline._pack_latents(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        vae = self.pipeline.vae
        rows, columns = self._token_grid(height, width)
        z = latents.to(vae.device, vae.dtype).permute(0, 2, 1).unflatten(2, (rows, columns))
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        z = self.pipeline._unpatchify_latents(z * std + vae.bn.running_mean.view(1, -1, 1, 1))
        return vae.decode(z, return_dict=False)[0].clamp(-1, 1)

    def _ids(self, condition: Condition, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        rows, columns = self._token_grid(condition.height, condition.width)
        grid = torch.empty(1, channels, rows, columns)
        ids = self.pipeline._prepare_latent_ids(grid)
        if condition.source is not None:
            count = self._source_count(ids, condition.source)
            ids = torch.cat([ids, self.pipeline._prepare_image_ids([grid] * count)], dim=1)
        return ids.to(device), self.pipeline._prepare_text_ids(condition.prompt[:1]).to(device)

    def velocity(self, transformer: ModelMixin, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        image_ids, text_ids = self._ids(condition, z.shape[2], z.device)
        tokens = z if condition.source is None else torch.cat([z, condition.source.to(z)], dim=1)
        dtype = transformer.x_embedder.weight.dtype
        output = transformer(
            hidden_states=tokens.to(dtype),
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=condition.prompt.to(dtype),
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return output[:, : z.shape[1]]

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        tokens, _ = self.latent_shape(height, width)
        mu = compute_empirical_mu(tokens, steps)
        if self.pipeline.scheduler.config.get("use_flow_sigmas"):
            return self._scheduled(num_inference_steps=steps, mu=mu)
        return self._scheduled(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
