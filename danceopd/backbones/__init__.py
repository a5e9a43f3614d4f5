"""Model families by name, and the way from a recipe's `model` section to a loaded one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.config.recipe import ModelRecipe

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    import torch

    from danceopd.backbones.base import Backbone
    from danceopd.backbones.flux2_klein import Flux2Klein
    from danceopd.backbones.qwen_image import QwenImage
    from danceopd.backbones.sd3 import SD3
    from danceopd.backbones.z_image import ZImage

__all__ = ["FAMILIES", "load_backbone", "open_outline", "stock_guidance"]

# A module of this package, its class.
FAMILIES = {"flux2_klein": "Flux2Klein", "z_image": "ZImage", "sd3": "SD3", "qwen_image": "QwenImage"}


def load_backbone(
    folder: Path,
    settings: ModelRecipe,
    device: torch.device | str | None = None,
    transformer: bool = True,
    encodes_only: bool = False,
) -> Backbone:
    """Load the back end that `settings.backbone` names from a pipeline folder, onto a device.

    Args:
        folder: the pipeline's.
        settings: of the recipe.
        device: where it computes; default: where training does, the accelerator if there is one.
        transformer: whether the transformer goes there, too; else it stays on the CPU, to be shared out from there.
        encodes_only: prompts and pictures are all it is for: its transformer gets no memory, and is not read.

    Raises:
        UserError: if the folder holds no such pipeline, or this machine lacks what `attention` or `quantize` need.
    """
    from danceopd.backbones.kernels import quantize_frozen, set_attention
    from danceopd.devices import best_device

    backbone = _family(settings).load(Path(folder), settings, device or best_device(), transformer, encodes_only)
    if encodes_only:
        return backbone
    set_attention(backbone.transformer, settings.attention)
    if settings.quantize is not None:
        quantize_frozen(backbone.transformer, settings.quantize)
    return backbone


def open_outline(folder: Path, settings: ModelRecipe) -> Backbone:
    """A back end without weights or text encoders, from a pipeline folder's configurations: for shapes and grids.

    Raises:
        UserError: if the folder holds no such pipeline.
    """
    return _family(settings).outline(Path(folder), settings)


def stock_guidance(settings: ModelRecipe, scale: float) -> dict[str, Any]:
    """Arguments by which the stock pipeline of a recipe's family draws with a scale of guidance of ours; 1: without."""
    return _family(settings).stock_guidance(scale)


def _family(settings: ModelRecipe) -> type[Flux2Klein | ZImage | SD3 | QwenImage]:
    module = import_module(f"{__name__}.{settings.backbone}")  # diffusers is slow to import
    return getattr(module, FAMILIES[settings.backbone])
