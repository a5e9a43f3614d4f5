"""LoRA files of other programs as adapters: diffusers', kohya's and ComfyUI's, by diffusers' own converters.

A LoRA whose names fit nothing would load as the bare base without a word, so every weight is held against the
transformer's modules first.
"""

from __future__ import annotations

import logging
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from danceopd.adapters import freeze_adapter
from danceopd.errors import UserError

log = logging.getLogger(__name__)
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
    try:
        return pipeline.lora_state_dict(
            str(file.parent), weight_name=file.name, return_lora_metadata=True, use_safetensors=True,
            local_files_only=True,
        )  # fmt: skip
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: no LoRA that {pipeline.__name__} knows ({reason}); first name: {names[0]}") from error


def load_lora_file(network: nn.Module, name: str, file: Path, pipeline: type[DiffusionPipeline]) -> None:
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
        raise UserError(f"{file}: {len(wrong)} of {len(state)} LoRA weights do not fit the base's "
                        f"{type(network).__name__}: {'; '.join(wrong[:3])}")  # fmt: skip
