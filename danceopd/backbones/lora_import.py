"""LoRA files of other programs as adapters: diffusers', ComfyUI's, kohya's and OneTrainer's.

Every matrix of a file is found in the transformer by its own name, by its name in one word, or by what the original
release calls it; for names that only diffusers' converters know, those are asked, and held to leave nothing out.

A LoRA whose names fit nothing would load as the bare base without a word, and one that lost a part as another teacher.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from danceopd.backbones.base import kind_of
from danceopd.backbones.lora import freeze_adapter
from danceopd.backbones.lora_factors import Factors, read_factors
from danceopd.backbones.original_names import ORIGINAL, SD3_MODULATIONS, module_pattern
from danceopd.errors import UserError

log = logging.getLogger(__name__)
HEADER = "lora_adapter_metadata"  # where diffusers keeps rank and alpha
LAYOUTS = (
    "a PEFT folder; a file of diffusers (transformer.), ComfyUI (diffusion_model.), kohya (lora_unet_) or OneTrainer "
    "(lora_transformer_)"
)
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_transformer_", "lora_unet_")
_SHOWN = 3


def lora_file(path: Path) -> Path | None:
    """The LoRA file at a path: the file itself, or the only safetensors file of a folder; None if there is none.

    Raises:
        UserError: if the file is no safetensors file.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        return None
    return files[0] if any("lora" in key or "lokr" in key or "hada_" in key for key in tensor_names(files[0])) else None


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a file.

    Raises:
        UserError: if it is no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file ({error}); pickled checkpoints are not read") from error


def read_lora_file(
    file: Path, pipeline: type[DiffusionPipeline], network: nn.Module
) -> tuple[dict[str, Tensor], dict | None]:
    """A LoRA file under diffusers' names (`transformer.MODULE.lora_A.weight`), and what its header says of it.

    Args:
        file: a safetensors file.
        pipeline: of the family that the LoRA is for; its class knows the conventions.
        network: the transformer it is for.

    Raises:
        UserError: if it is no plain LoRA, a part of it is missing, or one of its matrices is nothing of the
            transformer's.
    """
    file = Path(file)
    tensor_names(file)  # is it one?
    state = load_file(file)
    factors, encoders = read_factors(file, state)
    if not factors:
        raise UserError(f"{file}: no LoRA weights of a transformer; found: {', '.join(sorted(state)[:_SHOWN])}")
    if encoders:
        log.warning("%s: what it holds for text encoders is left out (%d tensors)", file, len(encoders))
    found, rest = _by_own_names(factors, network)
    found |= _by_converter(file, pipeline, rest, network)
    _check_fit(file, found, network)
    header = None if any(of.strong for of in factors.values()) else _header(file)
    named = {f"transformer.{module}": of for module, of in found.items()}
    weights = {f"{module}.lora_A.weight": of.first for module, of in named.items()}
    return weights | {f"{module}.lora_B.weight": of.second for module, of in named.items()}, header


def _header(file: Path) -> dict[str, Any] | None:
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(HEADER)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: its header's {HEADER} is not JSON ({error}); export it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: its header's {HEADER} is no JSON object; export it again")
    return {key: value for key, value in found.items() if key.startswith("transformer.")} or None


def _by_own_names(factors: Mapping[str, Factors], network: nn.Module) -> tuple[dict[str, Factors], dict[str, Factors]]:
    """Factors by the transformer's modules, and those whose names are neither its own nor the original release's."""
    linear = ((name, getattr(module, "base_layer", module)) for name, module in network.named_modules())
    modules = [name for name, module in linear if isinstance(module, nn.Linear)]
    known = {name: name for name in modules} | {name.replace(".", "_"): name for name in modules}
    found: dict[str, Factors] = {}
    rest: dict[str, Factors] = {}
    for name, of in factors.items():
        bare = _bare(name)
        if bare in known:
            found[known[bare]] = of
        elif parts := _original(kind_of(network).__name__, bare, of):
            found |= parts
        else:
            rest[name] = of
    return found, rest


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _original(kind: str, name: str, of: Factors) -> dict[str, Factors]:
    """A matrix of the original release's name as the modules it is made of; {} if the release has no such name.

    Query, key and value, one matrix there, share its first factor. Matrices that give shift and scale alone have their
    halves the other way round in diffusers.
    """
    tables = [(ORIGINAL.get(kind, {}), False)] + ([(SD3_MODULATIONS, True)] if kind.startswith("SD3") else [])
    for table, turned in tables:
        for original, modules in table.items():
            if matched := module_pattern(original, "[._]").fullmatch(name):
                second = of.second
                if turned and len(second) == 2 * of.first.shape[1]:  # shift and scale alone
                    second = torch.cat(second.chunk(2)[::-1])
                parts = second.chunk(len(modules))
                names = [module.format(*matched.groups()) for module in modules]
                return {n: Factors(of.first, part, of.strong) for n, part in zip(names, parts, strict=True)}
    return {}


def _by_converter(
    file: Path, pipeline: type[DiffusionPipeline], factors: Mapping[str, Factors], network: nn.Module
) -> dict[str, Factors]:
    """Factors by the transformer's modules as diffusers' converter names them, with proof that it left none out."""
    if not factors:
        return {}
    direct = [name for name in factors if not name.startswith(("diffusion_model.", "lora_unet_"))]
    if direct:  # no converter has another name for these
        words = ", ".join(direct[:_SHOWN])
        raise UserError(
            f"{file}: {len(direct)} of its LoRA weights do not fit the base's {kind_of(network).__name__}: {words}; "
            f"what is read: {LAYOUTS}"
        )
    found = _converted(file, pipeline, {name: (of.first, of.second) for name, of in factors.items()})
    # Converters scale and cut the second factors and hand the first ones on: a mark in those shows whose came out.
    marks = {name: float(number) for number, name in enumerate(factors, start=1)}
    firsts = {name: torch.full_like(of.first, marks[name], dtype=torch.float32) for name, of in factors.items()}
    marked = {name: (firsts[name], of.second) for name, of in factors.items()}
    kept = {round(float(mark.flatten()[0])) for mark, _ in _converted(file, pipeline, marked).values()}
    lost = [name for name in factors if marks[name] not in kept]
    if lost:
        raise UserError(
            f"{file}: {len(lost)} of its matrices are nothing that {pipeline.__name__} knows: "
            f"{', '.join(lost[:_SHOWN])}; give the LoRA under diffusers' names, or merge it into a checkpoint"
        )
    return {module: Factors(first, second, True) for module, (first, second) in found.items()}


def _converted(
    file: Path, pipeline: type[DiffusionPipeline], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    raw: dict[str, Tensor] = {}
    for name, (first, second) in factors.items():
        down, up = ("lora_down", "lora_up") if name.startswith("lora_unet_") else ("lora_A", "lora_B")
        raw |= {f"{name}.{down}.weight": first, f"{name}.{up}.weight": second}
        if down == "lora_down":  # the strength is in the second factor
            raw[f"{name}.alpha"] = torch.tensor(float(len(first)))
    try:
        state = pipeline.lora_state_dict(raw)
    except (KeyError, ValueError, IndexError, AttributeError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file}: no LoRA that {pipeline.__name__} knows ({reason}); first name: {next(iter(factors))}; "
            f"what is read: {LAYOUTS}"
        ) from error
    found = {}
    for key, first in state.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            found[module.removeprefix("transformer.")] = (first, state[f"{module}.lora_B.weight"])
    return found


def load_lora_file(network: ModelMixin, name: str, file: Path, pipeline: type[DiffusionPipeline]) -> None:
    """Load a LoRA file as adapter `name` of the transformer, frozen. What it holds for text encoders is left out.

    Raises:
        UserError: if it cannot be read, or a part of it fits no module.
    """
    state, header = read_lora_file(file, pipeline, network)
    network.load_lora_adapter(state, adapter_name=name, metadata=header)
    freeze_adapter(network, name)


def _check_fit(file: Path, factors: Mapping[str, Factors], network: nn.Module) -> None:
    modules = dict(network.named_modules())
    wrong = []
    for module, of in factors.items():
        linear = modules.get(module)
        linear = getattr(linear, "base_layer", linear)
        if not isinstance(linear, nn.Linear):
            wrong.append(module)
        elif of.first.shape[1] != linear.in_features:
            wrong.append(f"{module} takes {of.first.shape[1]} features, the base has {linear.in_features}")
        elif of.second.shape[0] != linear.out_features:
            wrong.append(f"{module} gives {of.second.shape[0]} features, the base has {linear.out_features}")
    if wrong:
        raise UserError(
            f"{file}: {len(wrong)} of {len(factors)} LoRA weights do not fit the base's "
            f"{kind_of(network).__name__}: {'; '.join(wrong[:_SHOWN])}"
        )
