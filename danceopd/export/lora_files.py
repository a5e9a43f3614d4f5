"""A LoRA student as other programs take it: diffusers' file and ComfyUI's, each read back before it counts.

ComfyUI knows a model by its original checkpoint's names (`diffusion_model.double_blocks.0.img_attn.qkv`), in which
query, key and value are one matrix (`original_names.py`). Three adapters of rank r become one of rank 3r without any
loss: their first factors lie below each other, their second ones on a block diagonal. The strength (alpha / rank) is
multiplied into the second factor, since a file without alphas is applied at strength 1.
"""

from __future__ import annotations

import logging
import math
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
TOLERANCE = 1e-4  # of the size of what is compared, in float32
_PROBES = 4  # random inputs by which two adapters of a layer are compared
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
        UserError: if a file, read by diffusers' own loader, is not the student's adapter.
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
    """Load a LoRA file into the student's own base by diffusers' loader and compare it with the student's adapter.

    What the two add to each layer's output is compared, so that an adapter lost in one layer shows. In float32 their
    velocities are compared as well; in 16 or 8 bits rounding moves a deep network's velocity by as much as an adapter
    that has trained for a while.

    Returns:
        The greatest difference in a layer, as a share of what the student's adapter adds there.

    Raises:
        UserError: if a layer or the velocity differs by more than rounding explains.
    """
    file = Path(file)
    network: ModelMixin = student.network
    assert student.adapter is not None
    state, facts = read_lora_file(file, type(student.backbone.pipeline), network)
    network.load_lora_adapter(state, adapter_name=_CHECK, metadata=facts)
    exact, found = all(p.dtype == torch.float32 for p in network.parameters()), None
    try:
        difference, where, most = _compare(network, student.adapter, _CHECK)
        if exact:
            found = probe(VelocityField(file.name, student.backbone, network, _CHECK), condition)
    finally:
        with warnings.catch_warnings():  # PEFT tells that the adapter was active
            warnings.simplefilter("ignore", UserWarning)
            network.delete_adapters(_CHECK)
    if not difference <= most:
        raise UserError(
            f"{file}: read back, what it adds to {where} differs from the student's by {difference:.3g} of its size; "
            "the LoRA file is broken: distill the student again"
        )
    if found is None:
        return difference
    wanted = probe(student, condition)
    moved = float((found - wanted).abs().max() / wanted.square().mean().sqrt())
    if not moved <= TOLERANCE:  # NaN is refused, too
        raise UserError(
            f"{file}: read back, its velocity differs from the student's by {moved:.3g} of its size; "
            "the LoRA file is broken: distill the student again"
        )
    return difference


def _compare(network: ModelMixin, wanted: str, found: str) -> tuple[float, str, float]:
    """The layer in which two adapters add most different things: difference, its name, and what rounding explains.

    A difference is a share of what the wanted one adds to random inputs. Of processes that share the network every one
    must ask; all get the answer of the one that writes.
    """
    own, other = _factors(network, wanted), _factors(network, found)
    worst = (0.0, "", TOLERANCE)
    if writes(network):
        nothing = {name: (a.new_zeros(1, a.shape[1]), b.new_zeros(len(b), 1)) for name, (a, b) in (own | other).items()}
        rounding = max((torch.finfo(b.dtype).eps for _, b in other.values()), default=0.0)
        most, generator = max(TOLERANCE, 2 * rounding), torch.Generator().manual_seed(0)
        shares = [
            (_share(own.get(name, nothing[name]), other.get(name, nothing[name]), generator), name) for name in nothing
        ]
        worst = (*max(shares), most)
    return this_process().gather(worst)[0] if is_sharded(network) else worst


def _share(wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], generator: torch.Generator) -> float:
    """How much two adapters of a layer, (r, in) and (out, r), differ in what they add to its output."""
    inputs = torch.randn(wanted[0].shape[1], _PROBES, generator=generator)
    right, other = (second.float() @ (first.float() @ inputs) for first, second in (wanted, found))
    size = float(right.norm())
    difference = float((other - right).norm())
    return difference / size if size else (math.inf if difference else difference)
