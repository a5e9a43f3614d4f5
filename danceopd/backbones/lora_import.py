"""LoRA files of other programs as adapters: diffusers', kohya's and ComfyUI's, by diffusers' own converters.

For Stable Diffusion 3 diffusers has no converter; here is one.

A LoRA whose names fit nothing would load as the bare base without a word, so every weight is held against the
transformer's modules first.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from danceopd.backbones.lora import freeze_adapter
from danceopd.backbones.original_names import ORIGINAL, SD3_MODULATIONS, module_pattern
from danceopd.errors import UserError

log = logging.getLogger(__name__)
SD3 = "StableDiffusion3Pipeline"  # by name: importing it takes a second and other families need none of it
_ORIGINAL_PREFIXES = ("diffusion_model.", "lora_unet_")  # ComfyUI's and kohya's
_PARTS = {"lora_A": "first", "lora_down": "first", "lora_B": "second", "lora_up": "second"}
_UNKNOWN = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA"}


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


def read_lora_file(file: Path, pipeline: type[DiffusionPipeline]) -> tuple[dict[str, Tensor], dict | None]:
    """A LoRA file under diffusers' names, and what its header says of rank and alpha.

    Args:
        file: a safetensors file.
        pipeline: of the family that the LoRA is for; its class knows the conventions.

    Raises:
        UserError: if it is another kind of adapter, or diffusers' converter does not know its names.
    """
    file = Path(file)
    names = tensor_names(file)
    for mark, kind in _UNKNOWN.items():
        if any(mark in name for name in names):
            raise UserError(
                f"{file}: a {kind} adapter, which is no plain LoRA; merge it into a checkpoint and give that"
            )
    if pipeline.__name__ == SD3 and any(name.startswith(_ORIGINAL_PREFIXES) for name in names):
        return _from_original_sd3(file), None
    try:
        return pipeline.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            return_lora_metadata=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: no LoRA that {pipeline.__name__} knows ({reason}); first name: {names[0]}") from error


def _from_original_sd3(file: Path) -> dict[str, Tensor]:
    """A LoRA under Stable Diffusion 3's original names, under diffusers'; its strength in the second factor."""
    state = load_file(file)
    found = {
        f"text_encoder.{key}": value for key, value in state.items() if key.startswith(("lora_te", "text_encoder"))
    }
    pairs = _pairs(file, {key: value for key, value in state.items() if f"text_encoder.{key}" not in found})
    for word, (first, second) in pairs.items():
        name = word.removeprefix("diffusion_model.").removeprefix("lora_unet_")
        modules, turned = _sd3_modules(name)
        if not modules:
            raise UserError(
                f"{file}: no LoRA that {SD3} knows (nothing there is called {name}); first name: {next(iter(state))}"
            )
        if turned and len(second) == 2 * first.shape[1]:  # shift and scale alone
            second = torch.cat(second.chunk(2)[::-1])
        for module, part in zip(modules, second.chunk(len(modules)), strict=True):
            found |= {f"transformer.{module}.lora_A.weight": first, f"transformer.{module}.lora_B.weight": part}
    return found


def _pairs(file: Path, state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (first factor (r, in), second factor (out, r) times strength)."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        factors.setdefault(module, {})[_PARTS.get(part, part)] = value
    pairs = {}
    for module, of in factors.items():
        if not {"first", "second"} <= set(of) <= {"first", "second", "alpha"} or of["first"].ndim != 2:
            raise UserError(f"{file}: {module} holds {', '.join(sorted(of))}, which is no plain LoRA of a matrix")
        strength = float(of["alpha"]) / len(of["first"]) if "alpha" in of else 1.0
        pairs[module] = (of["first"], of["second"] * strength)
    return pairs


def _sd3_modules(name: str) -> tuple[list[str], bool]:
    """Diffusers' modules that an original matrix is made of, and whether it may have its halves turned round."""
    for table, turned in ((ORIGINAL["SD3Transformer2DModel"], False), (SD3_MODULATIONS, True)):
        for original, modules in table.items():
            if matched := module_pattern(original, "[._]").fullmatch(name):
                return [module.format(*matched.groups()) for module in modules], turned
    return [], False


def load_lora_file(network: ModelMixin, name: str, file: Path, pipeline: type[DiffusionPipeline]) -> None:
    """Load a LoRA file as adapter `name` of the transformer, frozen. What it holds for text encoders is left out.

    Raises:
        UserError: if it cannot be read, or one of its weights fits no module.
    """
    state, header = read_lora_file(file, pipeline)
    mine = {key: value for key, value in state.items() if key.startswith("transformer.")}
    others = {key.partition(".")[0] for key in state} - {"transformer"}
    if others and mine:
        log.warning("%s: what it holds for %s is left out", file, ", ".join(sorted(others)))
    if not mine:
        raise UserError(f"{file}: no LoRA weights of a transformer; found: {', '.join(sorted(state)[:3])}")
    _check_fit(file, {key.removeprefix("transformer."): value for key, value in mine.items()}, network)
    network.load_lora_adapter(mine, adapter_name=name, metadata=header)
    freeze_adapter(network, name)


def _check_fit(file: Path, state: dict[str, Tensor], network: nn.Module) -> None:
    modules = dict(network.named_modules())
    wrong = []
    for key, value in state.items():
        module, _, part = key.partition(".lora")
        linear = modules.get(module)
        linear = getattr(linear, "base_layer", linear)
        if not isinstance(linear, nn.Linear):
            wrong.append(key)
        elif part.startswith(("_A", "_down", ".down")) and value.shape[1] != linear.in_features:
            wrong.append(f"{key} takes {value.shape[1]} features, the base has {linear.in_features}")
        elif part.startswith(("_B", "_up", ".up")) and value.shape[0] != linear.out_features:
            wrong.append(f"{key} gives {value.shape[0]} features, the base has {linear.out_features}")
    if wrong:
        raise UserError(
            f"{file}: {len(wrong)} of {len(state)} LoRA weights do not fit the base's "
            f"{type(network).__name__}: {'; '.join(wrong[:3])}"
        )
