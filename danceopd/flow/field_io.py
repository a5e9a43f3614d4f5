"""Fields on disk: a teacher's or student's folder, written whole and read back as a velocity field.

A field folder holds `field.json` and, by its `kind`: nothing else (`base`), `transformer/` (`full`, diffusers' own
layout), or `lora/` (`lora`, PEFT's own layout). A guided field's `field.json` holds its `guidance` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from danceopd.backbones.base import Backbone, Condition
from danceopd.backbones.lora import CONFIG, load_lora, save_lora
from danceopd.backbones.lora_import import load_lora_file, lora_file
from danceopd.backbones.offload import OffloadedWeights
from danceopd.backbones.sharded import is_sharded, write_transformer, writes
from danceopd.errors import UserError, unknown_name
from danceopd.files import FIELD, forget_origin, hash_folder, write_json
from danceopd.flow.fields import Field, VelocityField
from danceopd.flow.guidance import GuidedField
from danceopd.text import read_object

KINDS = ("base", "full", "lora")


def save_field(field: Field, folder: Path) -> None:
    """Write a field's own weights (the adapter, or the whole transformer) and its guidance below `folder`.

    Of processes that share its network every one must call it, and the first one writes.
    """
    folder = Path(folder)
    if writes(field.network):
        folder.mkdir(parents=True, exist_ok=True)
    if field.adapter is not None:
        save_lora(field.network, field.adapter, folder / "lora")
    elif field.network is not field.backbone.transformer:
        network: ModelMixin = field.network
        if is_sharded(network):
            write_transformer(network, folder / "transformer")
        else:
            network.save_pretrained(folder / "transformer", safe_serialization=True)
    if not writes(field.network):
        return
    forget_origin(folder)
    save_about(field, folder)


def save_about(field: Field, folder: Path) -> None:
    """Write the `field.json` of a field whose weights lie in `folder`."""
    about: dict = {"kind": _kind(field), "name": field.name}
    if isinstance(field, GuidedField):
        about["guidance"] = {"scale": field.scale, "batched": field.batched}
    write_json(Path(folder) / FIELD, about)


def _kind(field: Field) -> str:
    if field.adapter is not None:
        return "lora"
    return "base" if field.network is field.backbone.transformer else "full"


def field_kind(folder: Path) -> str:
    """What weights are, `base`, `full` or `lora`: by their `field.json`, else by their files.

    Args:
        folder: a field folder; a PEFT LoRA's; a pipeline's or transformer's; a LoRA file, or a folder that holds one
            and nothing else of the kind; a single file with a transformer.

    Raises:
        UserError: if it is none of these.
    """
    folder = Path(folder)
    if (folder / FIELD).is_file():
        kind = read_object(folder / FIELD).get("kind")
        if kind not in KINDS:
            raise unknown_name(f"{folder / FIELD}: kind", kind, KINDS)
        return kind
    if (folder / CONFIG).is_file():
        return "lora"
    if (folder / "transformer").is_dir() or (folder / "config.json").is_file():
        return "full"
    if lora_file(folder) is not None:
        return "lora"
    if folder.is_file():
        return "full"
    raise UserError(
        f"{folder}: neither a LoRA (a PEFT folder, a safetensors file), nor a transformer (its folder, its "
        "pipeline's, a safetensors file)"
    )


def field_guidance(folder: Path) -> dict | None:
    """A field folder's guidance, {"scale", "batched"}, or None if its field is not guided.

    Raises:
        UserError: if it does not fit.
    """
    path = Path(folder) / FIELD
    found = read_object(path).get("guidance") if path.is_file() else None
    if found is None:
        return None
    fits = isinstance(found, dict) and set(found) == {"scale", "batched"} and isinstance(found["batched"], bool)
    if not fits or not isinstance(found["scale"], int | float):
        raise UserError(f'{path}: guidance is {found!r}; write {{"scale": 3.5, "batched": true}}')
    return found


def load_field(backbone: Backbone, name: str, folder: Path, empty: Callable[[], Tensor] | None = None) -> Field:
    """Read a field, frozen. A LoRA becomes one more adapter on the backbone's own transformer.

    Args:
        backbone: the model family and base.
        name: the field's name from now on.
        folder: a field folder, or other weights that `field_kind` knows.
        empty: gives the empty prompt's embedding (L, D), asked if the field is guided; default: encode it now.

    Raises:
        UserError: if weights are missing or do not match.
    """
    return load_fields(backbone, {name: folder}, empty)[name]


def load_fields(
    backbone: Backbone,
    folders: Mapping[str, Path],
    empty: Callable[[], Tensor] | None = None,
    offload: torch.device | None = None,
) -> dict[str, Field]:
    """Read several fields, each frozen; those that hold the same full weights share one network.

    Args:
        backbone: the model family and base.
        folders: field folders by name.
        empty: as for `load_field`.
        offload: full weights wait in CPU memory and visit this device to be asked; None: they stay on the device.

    Raises:
        UserError: if weights are missing or do not match.
    """
    kinds = {name: field_kind(folder) for name, folder in folders.items()}
    several = sum(kind == "full" for kind in kinds.values()) > 1
    plain: dict[str, VelocityField] = {}
    first: dict[str, str] = {}  # by the weights' hash, if there can be two of the same
    for name, folder in folders.items():
        key = hash_folder(_weights(folder), "*.safetensors") if several and kinds[name] == "full" else name
        same = plain.get(first.setdefault(key, name))
        plain[name] = replace(same, name=name) if same else _load_plain(backbone, name, folder, kinds[name], offload)
    guidance = {name: field_guidance(folder) for name, folder in folders.items()}
    if not any(guidance.values()):
        return dict(plain)
    embedding = empty() if empty is not None else backbone.encode_prompts([""])[0]
    return {name: GuidedField(plain[name], empty=embedding, **g) if g else plain[name] for name, g in guidance.items()}


def _weights(folder: Path) -> Path:
    inner = Path(folder) / "transformer"
    return inner if inner.is_dir() else Path(folder)


def _load_plain(backbone: Backbone, name: str, folder: Path, kind: str, offload: torch.device | None) -> VelocityField:
    folder = Path(folder)
    if kind == "base":
        return VelocityField(name, backbone, backbone.transformer)
    if kind == "lora":
        folder = folder / "lora" if (folder / "lora").is_dir() else folder
        if (folder / CONFIG).is_file():
            load_lora(backbone.transformer, name, folder)
        elif (file := lora_file(folder)) is not None:
            load_lora_file(backbone.transformer, name, file, type(backbone.pipeline))
        else:
            raise UserError(f"{folder}: neither {CONFIG} nor a LoRA's safetensors file in it; copy the folder again")
        return VelocityField(name, backbone, backbone.transformer, adapter=name)
    network = backbone.new_transformer(folder).requires_grad_(False).eval()
    visits = None if offload is None else OffloadedWeights(network, offload)
    return VelocityField(name, backbone, network, offloaded=visits)


@torch.no_grad()
def probe(field: Field, condition: Condition, seed: int = 0) -> torch.Tensor:
    """The velocity at one fixed random state: equal probes, equal fields. For proving that an export came back."""
    shape = field.backbone.latent_shape(condition.height, condition.width)
    state = torch.randn(len(condition), *shape, generator=torch.Generator().manual_seed(seed)).to(condition.prompt)
    return field(state, torch.linspace(0.2, 0.9, len(condition)).to(state), condition).float().cpu()
