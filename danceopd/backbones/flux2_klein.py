"""FLUX.2-klein: `Flux2KleinPipeline` with `Flux2Transformer2DModel`, a Qwen3 text encoder and `AutoencoderKLFlux2`.

Particular to it: latents are 2x2-patchified, scaled by the autoencoder's batch-norm statistics and packed to tokens;
a source image enters as extra tokens behind the picture's own, with reference ids T = 10, and the output is cut back to
the picture's tokens; the time input is sigma itself; the prompt embedding stacks hidden states of the text encoder.
The pipeline's own static functions do all of this, so that both agree by construction.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from danceopd.adapters import plain_copy
from danceopd.backbones.base import LOADING, SETTINGS, Condition
from danceopd.errors import UserError
from danceopd.files import forget_origin
from danceopd.recipe import ModelRecipe

log = logging.getLogger(__name__)


class Flux2Klein:
    """The FLUX.2-klein back end around one loaded pipeline."""

    # PEFT matches by suffix: `attn.to_out` alone would also hit the double blocks' module list of that name.
    lora_targets = (
        r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|linear_in|linear_out)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )

    def __init__(self, pipeline: Flux2KleinPipeline, settings: ModelRecipe, folder: Path | None = None):
        """Wrap a loaded pipeline; `folder` is where its text encoder can be read again once it was freed."""
        self.pipeline = pipeline
        self.settings = settings
        self._folder = folder
        for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: Path, settings: ModelRecipe, device: torch.device | str = "cpu") -> Flux2Klein:
        """Load a pipeline folder onto a device.

        Raises:
            UserError: if the folder holds no such pipeline.
        """
        dtype = getattr(torch, settings.dtype)
        # The text encoder stays as it was saved: the same embeddings here and wherever the student is opened.
        dtypes = {"transformer": dtype, "text_encoder": "auto", "default": torch.float32}
        try:
            pipeline = Flux2KleinPipeline.from_pretrained(str(folder), local_files_only=True, dtype=dtypes)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: no Flux2KleinPipeline folder ({' '.join(str(error).split())})") from error
        return cls(pipeline.to(device), settings, Path(folder))

    @property
    def transformer(self) -> Flux2Transformer2DModel:
        return self.pipeline.transformer

    @property
    def _patch(self) -> int:
        return self.pipeline.vae_scale_factor * 2

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        if height % self._patch or width % self._patch:
            raise UserError(f"picture size {height}x{width}: both sides must be multiples of {self._patch}")
        return (height // self._patch) * (width // self._patch), self.transformer.config.in_channels

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        self._need_encoder()
        return self.pipeline._get_qwen3_prompt_embeds(
            self.pipeline.text_encoder,
            self.pipeline.tokenizer,
            prompts,
            max_sequence_length=self.settings.max_sequence_length,
            hidden_states_layers=list(self.settings.text_encoder_out_layers),
        ).float()

    def free_encoders(self) -> None:
        if self._folder is None:
            raise ValueError("this pipeline was not read from a folder; its text encoder could not come back")
        self.pipeline.register_modules(text_encoder=None)

    def _need_encoder(self) -> None:
        if self.pipeline.text_encoder is not None:
            return
        log.info("reading the text encoder again")
        encoder = Qwen3ForCausalLM.from_pretrained(
            str(self._folder / "text_encoder"), local_files_only=True, dtype="auto"
        )
        encoder = encoder.to(self.transformer.device).requires_grad_(False).eval()
        self.pipeline.register_modules(text_encoder=encoder)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = self.pipeline._encode_vae_image(pixels.to(vae.device, vae.dtype), generator=None)
        return self.pipeline._pack_latents(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        vae = self.pipeline.vae
        rows, columns = height // self._patch, width // self._patch
        z = latents.to(vae.device, vae.dtype).permute(0, 2, 1).unflatten(2, (rows, columns))
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        z = self.pipeline._unpatchify_latents(z * std + vae.bn.running_mean.view(1, -1, 1, 1))
        return vae.decode(z, return_dict=False)[0].clamp(-1, 1)

    def _ids(self, condition: Condition, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        rows, columns = condition.height // self._patch, condition.width // self._patch
        grid = torch.empty(1, channels, rows, columns)
        ids = self.pipeline._prepare_latent_ids(grid)
        if condition.source is not None:
            ids = torch.cat([ids, self.pipeline._prepare_image_ids([grid])], dim=1)
        return ids.to(device), self.pipeline._prepare_text_ids(condition.prompt[:1]).to(device)

    def velocity(self, transformer: nn.Module, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
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
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        grid = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=grid, mu=compute_empirical_mu(tokens, steps))
        return scheduler.sigmas.clone()

    def new_transformer(self, folder: Path | None = None, dtype: torch.dtype | None = None) -> Flux2Transformer2DModel:
        if folder is None:
            return plain_copy(self.transformer)
        folder = Path(folder)
        dtype = dtype or getattr(torch, self.settings.dtype)
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
        try:
            other, report = Flux2Transformer2DModel.from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True, dtype=dtype
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: no transformer checkpoint ({' '.join(str(error).split())})") from error
        wrong = report["missing_keys"] + report["unexpected_keys"]
        if wrong:
            raise UserError(f"{folder}: the checkpoint does not fit its config; first keys: {', '.join(wrong[:3])}")
        if other.config.in_channels != self.transformer.config.in_channels:
            raise UserError(f"{folder}: {other.config.in_channels} latent channels, the base has "
                            f"{self.transformer.config.in_channels}: not the same latent space")  # fmt: skip
        return other.to(self.transformer.device)

    def save(self, folder: Path, transformer: nn.Module) -> None:
        self._need_encoder()
        # A tokenizer's file would tell how it was last called; every call sets both anew.
        self.pipeline.tokenizer.backend_tokenizer.no_padding()
        self.pipeline.tokenizer.backend_tokenizer.no_truncation()
        frozen = self.pipeline.transformer
        try:
            self.pipeline.transformer = transformer
            self.pipeline.save_pretrained(str(folder), safe_serialization=True)
        finally:
            self.pipeline.transformer = frozen
        forget_origin(folder)
        settings = self.settings.model_dump(mode="json", exclude={"base", "revision", *LOADING})
        (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
