"""Fields on disk: a teacher's or student's folder, written whole and read back as a velocity field.

A field folder holds `field.json` and, by its `kind`: nothing else (`base`), `transformer/` (`full`, diffusers' own
layout), or `lora/` (`lora`, PEFT's own layout).
"""

from __future__ import annotations

from pathlib import Path

import torch

from danceopd.adapters import CONFIG, load_lora, save_lora
from danceopd.backbones.base import Backbone, Condition
from danceopd.errors import UserError, unknown_name
from danceopd.fields import VelocityField
from danceopd.files import FIELD, forget_origin, read_json, write_json

KINDS = ("base", "full", "lora")


def save_field(field: VelocityField, folder: Path) -> None:
    """Write a field's own weights (the adapter, or the whole transformer) below `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if field.adapter is not None:
        save_lora(field.network, field.adapter, folder / "lora")
        kind = "lora"
    elif field.network is field.backbone.transformer:
        kind = "base"
    else:
        field.network.save_pretrained(folder / "transformer", safe_serialization=True)
        forget_origin(folder)
        kind = "full"
    write_json(folder / FIELD, {"kind": kind, "name": field.name})


def field_kind(folder: Path) -> str:
    """What a folder holds: by its `field.json`, else by its files (a PEFT LoRA, a pipeline or transformer folder).

    Raises:
        UserError: if it is none of these.
    """
    folder = Path(folder)
    if (folder / FIELD).is_file():
        kind = read_json(folder / FIELD).get("kind")
        if kind not in KINDS:
            raise unknown_name(f"{folder / FIELD}: kind", kind, KINDS)
        return kind
    if (folder / CONFIG).is_file():
        return "lora"
    if (folder / "transformer").is_dir() or (folder / "config.json").is_file():
        return "full"
    raise UserError(f"{folder}: neither a PEFT LoRA folder, nor a transformer or pipeline folder")


def load_field(backbone: Backbone, name: str, folder: Path) -> VelocityField:
    """Read a field, frozen. A LoRA becomes one more adapter on the backbone's own transformer.

    Raises:
        UserError: if weights are missing or do not match.
    """
    folder = Path(folder)
    kind = field_kind(folder)
    if kind == "base":
        return VelocityField(name, backbone, backbone.transformer)
    if kind == "lora":
        load_lora(backbone.transformer, name, folder / "lora" if (folder / "lora").is_dir() else folder)
        return VelocityField(name, backbone, backbone.transformer, adapter=name)
    network = backbone.new_transformer(folder).requires_grad_(False).eval()
    return VelocityField(name, backbone, network)


@torch.no_grad()
def probe(field: VelocityField, condition: Condition, seed: int = 0) -> torch.Tensor:
    """The velocity at one fixed random state: equal probes, equal fields. For proving that an export came back."""
    shape = field.backbone.latent_shape(condition.height, condition.width)
    state = torch.randn(len(condition), *shape, generator=torch.Generator().manual_seed(seed)).to(condition.prompt)
    return field(state, torch.linspace(0.2, 0.9, len(condition)).to(state), condition).float().cpu()
