"""The networks that metrics look at pictures with, from folders on the machine; weights are read as safetensors only.

Pictures are prepared by the image processor that lies beside the weights, by Pillow whatever else is installed, so that
figures from two machines can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from danceopd.errors import UserError
from danceopd.text import check_json_files


def _open(folder: Path, what: str, load: Callable[[], Any]) -> Any:
    check_json_files(folder)
    try:
        return load()
    except Exception as error:  # transformers raises many kinds for files it cannot use
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: cannot be opened as {what} ({text}); it needs the model's config.json, "
            "model.safetensors and preprocessor_config.json"
        ) from error


def _offline(folder: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}


def _processor(folder: Path) -> Callable[[np.ndarray], Tensor]:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(**_offline(folder), backend="pil")
    return lambda pictures: processor(images=list(pictures), return_tensors="pt")["pixel_values"]


class Clip:
    """CLIP (Radford et al., 2021): embeddings of pictures and texts in one space.

    Args:
        folder: of a `CLIPModel` with its tokenizer and image processor.
        device: where it runs.

    Raises:
        UserError: if the folder does not hold them.
    """

    def __init__(self, folder: Path, device: torch.device | str):
        from transformers import AutoTokenizer, CLIPModel

        self._device = device
        model = _open(folder, "a CLIP model", lambda: _read(CLIPModel, folder, "clip"))
        self._model = model.to(device).requires_grad_(False).eval()
        self._prepare = _open(folder, "a CLIP model's image processor", lambda: _processor(folder))
        self._tokens = _open(
            folder, "a CLIP model's tokenizer", lambda: AutoTokenizer.from_pretrained(**_offline(folder))
        )

    @torch.inference_mode()
    def images(self, pictures: np.ndarray) -> Tensor:
        """Embeddings (B, C) of length 1 of pictures (B, H, W, 3) uint8, float32, on the CPU."""
        pooled = self._model.vision_model(pixel_values=self._prepare(pictures).to(self._device)).pooler_output
        return functional.normalize(self._model.visual_projection(pooled).float(), dim=-1).cpu()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Embeddings (B, C) of length 1; what is longer than the model reads (77 tokens for CLIP's own) is cut off."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokens(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pooled = self._model.text_model(**tokens.to(self._device)).pooler_output
        return functional.normalize(self._model.text_projection(pooled).float(), dim=-1).cpu()

    @torch.inference_mode()
    def grams(self, pictures: np.ndarray) -> Tensor:
        """Gram matrices (B, 3, C * C) of the patches' centred features after a third, two thirds and all of the layers.

        Features are centred because a few large ones, the same in every picture, would make all matrices alike.
        """
        states = self._model.vision_model(
            pixel_values=self._prepare(pictures).to(self._device), output_hidden_states=True
        ).hidden_states
        last = len(states) - 1
        grams = []
        for depth in (max(1, last // 3), max(1, 2 * last // 3), last):
            patches = states[depth][:, 1:].float()  # without the class token
            centred = patches - patches.mean(dim=1, keepdim=True)
            grams.append((centred.transpose(1, 2) @ centred / centred.shape[1]).flatten(1))
        return torch.stack(grams, dim=1).cpu()


class Dino:
    """A vision transformer trained by self-distillation (DINOv2, Oquab et al., 2023).

    Args:
        folder: of a model of the DINO families with its image processor.
        device: where it runs.

    Raises:
        UserError: if the folder does not hold them.
    """

    FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3_vit")

    def __init__(self, folder: Path, device: torch.device | str):
        from transformers import AutoModel

        self._device = device
        model = _open(folder, "a DINO model", lambda: _read(AutoModel, folder, *self.FAMILIES))
        self._model = model.to(device).requires_grad_(False).eval()
        self._before = 1 + getattr(self._model.config, "num_register_tokens", 0)
        self._prepare = _open(folder, "a DINO model's image processor", lambda: _processor(folder))

    def _tokens(self, pictures: np.ndarray) -> Tensor:
        return self._model(pixel_values=self._prepare(pictures).to(self._device)).last_hidden_state.float()

    @torch.inference_mode()
    def images(self, pictures: np.ndarray) -> Tensor:
        """The class token's features (B, C) of pictures (B, H, W, 3) uint8, float32, on the CPU."""
        return self._tokens(pictures)[:, 0].cpu()

    @torch.inference_mode()
    def self_similarity(self, pictures: np.ndarray) -> Tensor:
        """Cosines between all pairs of a picture's N patches, (B, N, N)."""
        patches = functional.normalize(self._tokens(pictures)[:, self._before :], dim=-1)
        return (patches @ patches.transpose(1, 2)).cpu()


def _read(model: Any, folder: Path, *families: str) -> Any:
    """A model from a folder's safetensors, whole and of one of some families."""
    from transformers import AutoConfig

    family = AutoConfig.from_pretrained(**_offline(folder)).model_type
    if family not in families:
        raise ValueError(f"its config.json says {family}, not {' or '.join(families)}")
    found, told = model.from_pretrained(**_offline(folder), use_safetensors=True, output_loading_info=True)
    if told["missing_keys"]:
        raise ValueError(f"{len(told['missing_keys'])} weights are missing, {sorted(told['missing_keys'])[0]} first")
    return found


class Inception:
    """The Inception-v3 network that FID and KID are published with, by torch-fidelity.

    Args:
        weights: torch-fidelity's file of them.
        device: where it runs.
    """

    def __init__(self, weights: Path, device: torch.device | str):
        from torchmetrics.image.fid import NoTrainInceptionV3

        def load() -> Any:
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
            return network.to(device)

        self._device, self._network = device, _open(weights, "torch-fidelity's Inception weights", load)

    @torch.inference_mode()
    def images(self, pictures: np.ndarray) -> Tensor:
        """Features (B, 2048) of pictures (B, H, W, 3) uint8, on the CPU."""
        return self._network(torch.from_numpy(pictures).permute(0, 3, 1, 2).to(self._device)).cpu()


class Lpips:
    """Learned perceptual distance (Zhang et al., 2018) over AlexNet, by torchmetrics."""

    def __init__(self, device: torch.device | str):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self._device = device
        self._metric = LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True).to(device)

    @torch.inference_mode()
    def distance(self, drawn: Tensor, wanted: Tensor) -> Tensor:
        """LPIPS (B,) between pictures (B, 3, H, W) in [0, 1], at least 0."""
        return self._metric(drawn.to(self._device), wanted.to(self._device)).reshape(-1).cpu()
