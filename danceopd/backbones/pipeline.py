"""What every back end shares: one diffusers pipeline folder, its transformer, its encoders, and the ways in and out."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers import AutoTokenizer

from danceopd.backbones.base import LOADING, SETTINGS, Condition, kind_of
from danceopd.backbones.bases import INDEX, OTHER_FORMATS, components
from danceopd.backbones.lora import plain_copy
from danceopd.backbones.packing import to_latents, to_tokens
from danceopd.backbones.sharded import is_sharded, outline_of
from danceopd.backbones.weights import empty_transformer, read_transformer, stored_dtype, weight_files
from danceopd.config.recipe import ModelRecipe
from danceopd.errors import UserError
from danceopd.files import forget_origin
from danceopd.text import check_json_files, read_object

log = logging.getLogger(__name__)


class PipelineBackbone:
    """A back end around one loaded diffusers pipeline; a family adds what is particular to it (see `Backbone`)."""

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]]  # what its folders are opened with, by their index
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    lora_targets: ClassVar[str]
    prompt_sees_source: ClassVar[bool] = False
    most_sources: int | None = None

    def __init__(self, pipeline: DiffusionPipeline, settings: ModelRecipe, folder: Path | None = None):
        """Wrap a loaded pipeline; `folder` is where its text encoders can be read again once they were freed."""
        self.pipeline = pipeline
        self.settings = settings
        self._folder = folder
        for name in ("transformer", "vae", *self.encoders):
            module = getattr(pipeline, name)
            if module is not None:
                module.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        folder: Path,
        settings: ModelRecipe,
        device: torch.device | str = "cpu",
        transformer: bool = True,
        encodes_only: bool = False,
    ) -> Self:
        """Load a pipeline folder onto a device.

        Args:
            folder: the pipeline's.
            settings: of the recipe.
            device: where it computes.
            transformer: whether the transformer goes there, too; else it stays on the CPU as it lies in its files,
                mapped into memory, and so do others that are read later: to be shared out from there.
            encodes_only: read no weight of the transformer, which then has none.

        Raises:
            UserError: if the folder holds no such pipeline, or its transformer's weights do not fit.
        """
        folder = Path(folder)
        kind, network = cls._kinds(folder)
        # The text encoders stay as they were saved: the same embeddings here and wherever the student is opened.
        dtypes = {**dict.fromkeys(cls.encoders, "auto"), "default": torch.float32}
        weights = folder / "transformer"
        dtype = getattr(torch, settings.dtype) if transformer else stored_dtype(weights)
        given = {
            "transformer": empty_transformer(network, weights)
            if encodes_only
            else read_transformer(network, weights, dtype, {})
        }
        try:
            given |= cls._given(folder)
            pipeline = kind.from_pretrained(str(folder), local_files_only=True, dtype=dtypes, **given)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: no {kind.__name__} folder ({' '.join(str(error).split())})") from error
        for name in components(folder / INDEX):
            part = getattr(pipeline, name, None)
            if isinstance(part, nn.Module) and (name != "transformer" or (transformer and not encodes_only)):
                part.to(device)
        backbone = cls(pipeline, settings, folder)
        backbone._as_stored = not transformer
        return backbone

    @classmethod
    def outline(cls, folder: Path, settings: ModelRecipe) -> Self:
        """The back end of a folder's configuration files alone: its transformer and autoencoder have no weights.

        Raises:
            UserError: if the folder holds no such pipeline.
        """
        kind, network = cls._kinds(folder)
        index = read_object(folder / INDEX)
        parts: dict[str, Any] = dict.fromkeys(components(folder / INDEX))
        try:
            for name, of in (("transformer", network), ("vae", getattr(diffusers, str(index["vae"][1])))):
                with init_empty_weights():
                    parts[name] = of.from_config(of.load_config(str(folder / name)))
            scheduler = getattr(diffusers, str(index["scheduler"][1]))
            parts["scheduler"] = scheduler.from_pretrained(str(folder / "scheduler"), local_files_only=True)
            for name in parts:
                if name.startswith("tokenizer") and (folder / name / "tokenizer.json").is_file():
                    parts[name] = AutoTokenizer.from_pretrained(str(folder / name), local_files_only=True)
            return cls(kind(**parts), settings)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{folder}: no {kind.__name__} folder ({' '.join(str(error).split())})") from error

    @classmethod
    def _kinds(cls, folder: Path) -> tuple[type[DiffusionPipeline], type[ModelMixin]]:
        """The classes of a pipeline folder and of its transformer."""
        known = {kind.__name__: kind for kind in cls.pipelines}
        takes = " or ".join(known)
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder}: no {takes} folder (no {INDEX} there)")
        check_json_files(folder)
        index = read_object(folder / INDEX)
        if index.get("_class_name") not in known:
            raise UserError(f"{folder}: a {index.get('_class_name')} folder, and this model.backbone takes {takes}")
        name = str((index.get("transformer") or [None])[-1])
        if not hasattr(diffusers, name):
            raise UserError(f"{folder}: no {takes} folder ({INDEX} names {name} as its transformer)")
        return known[index["_class_name"]], getattr(diffusers, name)

    @classmethod
    def _given(cls, folder: Path) -> dict[str, Any]:
        """Components that the family opens in its own way."""
        return {}

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def distilled(self) -> bool | None:
        return None

    @property
    def _patch(self) -> int:
        """Pixels a token is wide and high."""
        return self.pipeline.vae_scale_factor * 2

    def _shift(self, tokens: int, most: float = 1.15) -> float:
        """How far the grid is pushed towards noise for a number of tokens: the stock pipelines' `calculate_shift`.

        Args:
            tokens: of the picture.
            most: the family's shift at 4,096 tokens, where the scheduler names none.
        """
        known = self.pipeline.scheduler.config
        few, many = known.get("base_image_seq_len", 256), known.get("max_image_seq_len", 4096)
        low, high = known.get("base_shift", 0.5), known.get("max_shift", most)
        slope = (high - low) / (many - few)
        return tokens * slope + (low - slope * few)

    def _scheduled(self, **how: Any) -> Tensor:
        """The noise levels (steps + 1,) that the scheduler sets when its pipeline calls it this way."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(device="cpu", **how)
        return scheduler.sigmas.clone()

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a picture's tokens."""
        if height % self._patch or width % self._patch:
            raise UserError(f"picture size {height}x{width}: both sides must be multiples of {self._patch}")
        return height // self._patch, width // self._patch

    @staticmethod
    def _source_count(z: Tensor, source: Tensor) -> int:
        """How many source images of the picture's size the tokens (B, S, C) are."""
        count, rest = divmod(source.shape[1], z.shape[1])
        if rest:
            raise UserError(
                f"{source.shape[1]} tokens of source images beside {z.shape[1]} of the picture: every "
                "source image must have the picture's size"
            )
        return count

    def tokens_lost(self, prompts: list[str], sources: int = 0) -> list[int]:
        longest, template = self.settings.max_sequence_length, self._length("", sources)
        # A token stands for at least one byte, so only a long prompt needs to be read.
        return [
            max(0, self._length(prompt, sources) - longest) if template + len(prompt.encode()) > longest else 0
            for prompt in prompts
        ]

    def _length(self, prompt: str, sources: int) -> int:
        """Tokens of a prompt in its template."""
        raise NotImplementedError

    def _chat_length(self, prompt: str, thinking: bool) -> int:
        text = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        return len(self.pipeline.tokenizer(text).input_ids)

    def without_prompt(self, condition: Condition, empty: Tensor) -> Condition:
        return replace(condition, prompt=empty.to(condition.prompt).expand_as(condition.prompt))

    def guide(self, without: Tensor, prompted: Tensor, scale: float) -> Tensor:
        return (1 - scale) * without + scale * prompted

    @classmethod
    def stock_guidance(cls, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale}

    def free_encoders(self) -> None:
        if self._folder is None:
            raise ValueError("this pipeline was not read from a folder; its text encoders could not come back")
        self.pipeline.register_modules(**dict.fromkeys(self.encoders))
        self._freed = True

    _freed = False
    _as_stored = False  # whether transformers wait on the CPU in their files' dtype

    def _need_encoders(self) -> None:
        if not self._freed:
            return
        log.info("reading the text encoders again")
        kept = {name: part for name, part in self.pipeline.components.items() if name not in self.encoders}
        dtypes = dict.fromkeys(self.encoders, "auto")
        again = type(self.pipeline).from_pretrained(str(self._folder), local_files_only=True, dtype=dtypes, **kept)
        found = {name: getattr(again, name) for name in self.encoders}
        for module in found.values():
            if module is not None:
                module.to(self.pipeline.vae.device).requires_grad_(False).eval()
        self.pipeline.register_modules(**found)
        self._freed = False

    def new_transformer(self, folder: Path | None = None, dtype: torch.dtype | None = None) -> Any:
        if folder is None:
            return plain_copy(self.transformer)
        folder = Path(folder)
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
        dtype = dtype or (stored_dtype(folder) if self._as_stored else getattr(torch, self.settings.dtype))
        other = read_transformer(kind_of(self.transformer), folder, dtype, self.transformer.config)
        if other.config.in_channels != self.transformer.config.in_channels:
            raise UserError(
                f"{folder}: {other.config.in_channels} latent channels, the base has "
                f"{self.transformer.config.in_channels}: not the same latent space"
            )
        return other.to(self.transformer.device)

    def save(self, folder: Path, transformer: nn.Module) -> None:
        kept = self._encoders_of_the_folder()
        if not kept:
            self._need_encoders()
        for name, part in self.pipeline.components.items():
            if name.startswith(("tokenizer", "processor")) and part is not None:
                # A tokenizer's file would tell how it was last called; every call sets both anew.
                backend = (part.tokenizer if name == "processor" else part).backend_tokenizer
                backend.no_padding()
                backend.no_truncation()
        before = {"transformer": self.pipeline.transformer} | {name: getattr(self.pipeline, name) for name in kept}
        elsewhere = is_sharded(transformer) or next(transformer.parameters()).is_meta
        try:
            self.pipeline.transformer = _class_of(transformer) if elsewhere else transformer
            self.pipeline.register_modules(**dict.fromkeys(kept))
            self.pipeline.save_pretrained(str(folder), safe_serialization=True)
        finally:
            self.pipeline.register_modules(**before)
        self._copy_encoders(kept, Path(folder))
        forget_origin(folder)
        settings = self.settings.model_dump(mode="json", exclude={"base", "revision", "transformer", *LOADING})
        (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def _encoders_of_the_folder(self) -> list[str]:
        """Text encoders whose files can be copied as they lie, without being read."""
        if self._folder is None:
            return []
        own = [name for name in self.encoders if name in components(self._folder / INDEX)]
        return own if all(weight_files(self._folder / name) for name in own) else []

    def _copy_encoders(self, names: list[str], folder: Path) -> None:
        index = read_object(folder / INDEX)
        for name in names:
            assert self._folder is not None
            shutil.copytree(self._folder / name, folder / name, ignore=shutil.ignore_patterns(*OTHER_FORMATS))
            index[name] = read_object(self._folder / INDEX)[name]
        if names:
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _to_vae(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.pipeline.vae.device, self.pipeline.vae.dtype)


def _class_of(network: Any) -> Any:
    """What stands in a pipeline's folder for a transformer whose files are written by themselves."""
    outline = outline_of(network)
    outline.save_pretrained = lambda folder: None
    return outline


class ShiftedLatentsBackbone(PipelineBackbone):
    """A back end whose `AutoencoderKL` has a shift and a scale, and whose tokens are 2x2 patches of its latents."""

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = vae.encode(self._to_vae(pixels)).latent_dist.mode()
        return to_tokens((latents - vae.config.shift_factor) * vae.config.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        vae = self.pipeline.vae
        z = to_latents(self._to_vae(latents), *self._token_grid(height, width))
        z = z / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(z, return_dict=False)[0].clamp(-1, 1)
