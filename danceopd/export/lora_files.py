"""A LoRA student as other programs take it: diffusers' file and ComfyUI's, each read back before it counts.

ComfyUI knows a model by its original checkpoint's names (`diffusion_model.double_blocks.0.img_attn.qkv`), in which
query, key and value are one matrix (`original_names.py`). Three adapters of rank r become one of rank 3r without any
loss: their first factors lie below each other, their second ones on a block diagonal. The strength (alpha / rank) is
multiplied into the second factor, since a file without alphas is applied at strength 1.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor

from danceopd.backbones.base import Condition, kind_of
from danceopd.backbones.lora import adapter_state, save_diffusers_lora
from danceopd.backbones.lora_import import read_lora_file
from danceopd.backbones.original_names import ORIGINAL, module_pattern
from danceopd.backbones.sharded import is_sharded, writes
from danceopd.errors import UserError
from danceopd.flow.field_io import probe
from danceopd.flow.fields import VelocityField
from danceopd.training.processes import this_process

log = logging.getLogger(__name__)

COMFYUI = "comfyui_lora.safetensors"
TOLERANCE, ROUGH_TOLERANCE = 1e-4, 0.05  # of velocities, whose size is about 1; the second in 16 or 8 bits
_CHECK = "read_back"


def export_lora(student: VelocityField, folder: Path, condition: Condition) -> list[Path]:
    """Write a LoRA student's files for diffusers and, where its names are known, ComfyUI; read each back.

    Of processes that share the student every one must call it, with a folder that all of them see.

    Args:
        student: a field with an adapter.
        folder: where they go.
        condition: what the velocities are compared under.

    Returns:
        The files written.

    Raises:
        UserError: if a file, read by diffusers' own loader, does not give the student's velocity.
    """
    if student.adapter is None:
        raise ValueError(f"{student.name}: a field without an adapter has no LoRA to export")
    files = [save_diffusers_lora(student.network, student.adapter, folder)]
    named = save_comfyui_lora(student.network, student.adapter, folder)
    if named is not None:
        files.append(named)
    if is_sharded(student.network):
        files = this_process().gather(files)[0]
    for file in files:
        prove_lora_file(student, file, condition)
    return files


def save_comfyui_lora(network: ModelMixin, name: str, folder: Path) -> Path | None:
    """Write one adapter under ComfyUI's names; None, with a warning, if the model or one of its modules has none."""
    kind = kind_of(network).__name__
    if kind not in ORIGINAL:
        log.warning("no ComfyUI LoRA file: the names of %s are not known", kind)
        return None
    factors = _factors(network, name)
    if not writes(network):
        return None
    state: dict[str, Tensor] = {}
    for original, parts in _matrices(ORIGINAL[kind], factors):
        first, second = _fused(network, [(part, factors.pop(part, None)) for part in parts])
        state |= {
            f"diffusion_model.{original}.lora_A.weight": first,
            f"diffusion_model.{original}.lora_B.weight": second,
        }
    if factors:
        log.warning("no ComfyUI LoRA file: it has no name for %s", ", ".join(sorted(factors)[:3]))
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(folder) / COMFYUI, {"format": "pt"})
    return Path(folder) / COMFYUI


def _factors(network: ModelMixin, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (first factor (r, in), second factor (out, r) times strength)."""
    state = adapter_state(network, name)
    modules = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {
        module: (
            state[f"{module}.lora_A.weight"],
            state[f"{module}.lora_B.weight"] * network.get_submodule(module).scaling[name],
        )
        for module in modules
    }


def _matrices(names: dict[str, list[str]], factors: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The original matrices that the adapter touches, each with diffusers' modules that make it up."""
    found = {}
    for original, parts in names.items():
        for part in parts:
            pattern = module_pattern(part)
            for module in factors:
                if matched := pattern.fullmatch(module):
                    found[original.format(*matched.groups())] = [p.format(*matched.groups()) for p in parts]
    return list(found.items())


def _fused(network: ModelMixin, parts: list[tuple[str, tuple[Tensor, Tensor] | None]]) -> tuple[Tensor, Tensor]:
    """The two factors of one original matrix; a part without an adapter adds rows of zeros and no rank."""
    firsts = [factors[0] for _, factors in parts if factors is not None]
    seconds = [
        firsts[0].new_zeros(network.get_submodule(module).out_features, 0) if factors is None else factors[1]
        for module, factors in parts
    ]
    return torch.cat(firsts).contiguous(), torch.block_diag(*seconds).contiguous()


def prove_lora_file(student: VelocityField, file: Path, condition: Condition) -> float:
    """Load a LoRA file into the student's own base by diffusers' loader and compare velocities.

    Returns:
        The greatest absolute difference.

    Raises:
        UserError: if it is above `TOLERANCE` (`ROUGH_TOLERANCE` if the base is not float32), or not finite.
    """
    file = Path(file)
    network: ModelMixin = student.network
    state, facts = read_lora_file(file, type(student.backbone.pipeline), network)
    network.load_lora_adapter(state, adapter_name=_CHECK, metadata=facts)
    try:
        found = probe(VelocityField(file.name, student.backbone, network, _CHECK), condition)
    finally:
        with warnings.catch_warnings():  # PEFT tells that the adapter was active
            warnings.simplefilter("ignore", UserWarning)
            network.delete_adapters(_CHECK)
    wanted = probe(student, condition)
    difference = float((found - wanted).abs().max())
    exact = all(p.dtype == torch.float32 for p in network.parameters())
    if not difference <= (TOLERANCE if exact else ROUGH_TOLERANCE):  # NaN is refused, too
        raise UserError(
            f"{file}: read back, its velocity differs from the student's by {difference:.3g}; "
            "the LoRA file is broken: distill the student again"
        )
    return difference
