"""A LoRA file by its own keys: every matrix's two factors and strength, each tensor accounted for.

A converter keeps what it knows and passes over the rest; so what a file holds is read here first, and held against what
came out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from danceopd.errors import UserError

ENCODERS = ("text_encoder", "lora_te", "text_encoders.", "text_model.")  # what a file holds for prompts' encoders
_HALVES = {
    "lora_A": "first",
    "lora_down": "first",
    "lora.down": "first",
    "lora_linear_layer.down": "first",
    "lora_B": "second",
    "lora_up": "second",
    "lora.up": "second",
    "lora_linear_layer.up": "second",
    "alpha": "alpha",
}
_UNKNOWN = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "boft": "BOFT",
    "glora": "GLoRA",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "Tucker",
}
_SHOWN = 3


@dataclass(frozen=True)
class Factors:
    """One matrix's change, second @ first.

    Attributes:
        first: (r, in), as the file has it.
        second: (out, r), float32 and times the strength if the file tells one (alpha / r).
        strong: whether the file tells it.
    """

    first: Tensor
    second: Tensor
    strong: bool


def read_factors(where: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Factors], list[str]]:
    """The factors of every matrix by its name in the file, and the keys that are a text encoder's.

    Args:
        where: the file, for messages.
        state: its tensors.

    Raises:
        UserError: if a tensor is no part of a plain LoRA, a matrix lacks one of its halves, the two do not fit each
            other, or a number is not finite.
    """
    for mark, kind in _UNKNOWN.items():
        if any(mark in name for name in state):
            raise UserError(f"{where}: a {kind} adapter, which is no plain LoRA; merge it into a checkpoint instead")
    if inner := [name for name in state if ".default." in name or name.endswith(".default")]:
        raise UserError(
            f"{where}: {len(inner)} names of a PEFT model in memory, first: {inner[0]}; save it by save_pretrained(), "
            "which leaves 'default' out"
        )
    check_finite(where, state)
    encoders = [name for name in state if name.startswith(ENCODERS)]
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name in sorted(set(state) - set(encoders)):
        module, half = _split(name)
        if half is None:
            strange.append(name)
        else:
            parts.setdefault(module, {})[half] = state[name]
    if strange:
        raise UserError(
            f"{where}: {len(strange)} tensors are no part of a plain LoRA: {', '.join(strange[:_SHOWN])}; merge it "
            "into a checkpoint instead"
        )
    return {module: _factors(where, module, of) for module, of in parts.items()}, encoders


def _split(name: str) -> tuple[str, str | None]:
    plain = name.removesuffix(".weight")
    for ending, half in _HALVES.items():
        if plain.endswith(f".{ending}"):
            return plain.removesuffix(f".{ending}"), half
    return name, None


def _factors(where: Path, module: str, of: Mapping[str, Tensor]) -> Factors:
    if not {"first", "second"} <= set(of):
        lacks = " and ".join(name for name, half in (("A (down)", "first"), ("B (up)", "second")) if half not in of)
        raise UserError(f"{where}: {module} has no {lacks}; half a LoRA changes nothing, export it again")
    first, second = of["first"], of["second"]
    if first.ndim != 2 or second.ndim != 2 or len(first) != second.shape[1]:
        shapes = f"{tuple(second.shape)} and {tuple(first.shape)}"
        raise UserError(f"{where}: {module} holds {shapes}, which is no plain LoRA of a matrix")
    strength = float(of["alpha"]) / len(first) if "alpha" in of else 1.0
    return Factors(first, second.float() * strength, "alpha" in of)


def check_finite(where: Path, state: Mapping[str, Tensor]) -> None:
    """Look at every number of some weights.

    Raises:
        UserError: naming the first tensor with one that is not finite.
    """
    for name, value in state.items():
        if value.is_floating_point() and not _is_finite(value):
            raise UserError(f"{where}: {name} holds numbers that are not finite: its training broke; take another save")


def _is_finite(value: Tensor) -> bool:
    """Whether all of a tensor's numbers are finite; a sum tells it of most without a copy."""
    if value.dtype.itemsize > 1 and math.isfinite(value.sum()):
        return True
    return bool(torch.isfinite(value.float()).all())
