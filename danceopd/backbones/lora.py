"""LoRA adapters on one shared network, through PEFT: adding, switching, saving, loading with proof."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danceopd.backbones.lora_factors import read_factors
from danceopd.backbones.lora_layer import FusedLinear, fuse
from danceopd.backbones.sharded import whole, writes
from danceopd.config.recipe import LoraRecipe
from danceopd.errors import UserError
from danceopd.files import read_json, write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _tuner_layers(network: nn.Module) -> list[Any]:
    """PEFT's layers around the network's own; their base class declares neither weights nor `merge`."""
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def active_adapter(network: nn.Module, name: str | None) -> Iterator[None]:
    """Run the block with adapter `name` switched on, or with none; then restore what was.

    Unlike PEFT's `set_adapter` it touches no parameter's `requires_grad`: what is trained was settled when the
    optimizer was built.
    """
    layers = _tuner_layers(network)
    if name is not None and not any(name in layer.lora_A for layer in layers):
        raise ValueError(f"the network has no adapter {name!r}")
    before = [(layer._active_adapter, layer._disable_adapters, getattr(layer, "chosen", None)) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [] if name is None else [name]
            layer._disable_adapters = name is None
            fuse(layer)
            if isinstance(layer, FusedLinear):
                layer.choose(name)
        yield
    finally:
        for layer, (active, disabled, chosen) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
            if isinstance(layer, FusedLinear):
                layer.chosen = chosen


def add_lora(network: ModelMixin, name: str, spec: LoraRecipe, default_targets: str, seed: int) -> None:
    """Add a fresh LoRA adapter in float32 (it starts as no change: its second matrix is zero).

    Only this adapter's weights require a gradient afterwards.
    """
    targets = list(spec.targets) if spec.targets else default_targets
    # PEFT declares a whole number, and does no more than divide it by the rank.
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.manual_seed(seed)
        network.add_adapter(config, adapter_name=name)
    for key, parameter in network.named_parameters():
        mine = _is_of(key, name)
        parameter.requires_grad_(mine)
        if mine:
            parameter.data = parameter.data.float()


def _is_of(key: str, adapter: str) -> bool:
    """Whether a parameter is an adapter's, by PEFT's own names: a part of the network may be called as it is."""
    return re.search(rf"\.lora_\w+\.{re.escape(adapter)}(\.|$)", key) is not None


def adapter_parameters(network: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of one adapter."""
    return [p for key, p in network.named_parameters() if _is_of(key, name)]


def adapter_state(network: ModelMixin, name: str) -> dict[str, Tensor]:
    """One adapter's weights by PEFT's names, whole and on the CPU; of a sharded network every process must ask, and
    only the one that writes gets them."""
    state, keeps = get_peft_model_state_dict(network, adapter_name=name), writes(network)
    found = {}
    for key, value in state.items():
        tensor = whole(value.detach())
        if keeps:
            found[key] = tensor.cpu().contiguous()
    return found


def save_lora(network: ModelMixin, name: str, folder: Path) -> None:
    """Write one adapter as a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`).

    Of processes that share the network every one must call it, and the first one writes.
    """
    folder, state = Path(folder), adapter_state(network, name)
    if not writes(network):
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{key}": value for key, value in state.items()}, folder / WEIGHTS)
    config = network.peft_config[name].to_dict()
    write_json(folder / CONFIG, {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()})


def save_diffusers_lora(network: ModelMixin, name: str, folder: Path) -> Path:
    """Write one adapter as the file that a diffusers pipeline's `load_lora_weights` takes, and return its path.

    Rank, alpha and targets travel in the file's header, so that the adapter comes back at its own strength. Of
    processes that share the network every one must call it, and the first one writes.
    """
    state = adapter_state(network, name)
    if not writes(network):
        return Path(folder) / LORA_WEIGHT_NAME_SAFE
    config = network.peft_config[name].to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    LoraBaseMixin.write_lora_layers(
        state_dict=LoraBaseMixin.pack_weights(state, "transformer"),
        save_directory=str(folder),
        is_main_process=True,
        weight_name=LORA_WEIGHT_NAME_SAFE,
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata={f"transformer.{key}": value for key, value in plain.items()},
    )
    return Path(folder) / LORA_WEIGHT_NAME_SAFE


def load_lora(network: ModelMixin, name: str, folder: Path) -> None:
    """Load a PEFT folder as adapter `name`, frozen.

    Raises:
        UserError: if a file is missing, or any weight of the file or of the adapter finds no partner. A LoRA whose
            names do not match would otherwise load as the bare base.
    """
    folder = Path(folder)
    config = _lora_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: no {WEIGHTS}; export the LoRA in PEFT's layout")
    state = {k.removeprefix("base_model.model."): v for k, v in load_file(folder / WEIGHTS).items()}
    read_factors(folder / WEIGHTS, state)  # both halves of every pair, and finite
    try:
        network.add_adapter(config, adapter_name=name)
    except ValueError as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from error
    wanted = {key: value.shape for key, value in get_peft_model_state_dict(network, adapter_name=name).items()}
    if set(wanted) != set(state):
        wrong = sorted(set(wanted) ^ set(state))
        raise UserError(f"{folder}: {len(wrong)} LoRA weights do not match the transformer, first: {wrong[0]}")
    for key, value in state.items():
        if value.shape != wanted[key]:
            raise UserError(f"{folder}: {key} is {tuple(value.shape)}, the transformer takes {tuple(wanted[key])}")
    freeze_adapter(network, name)  # float32, before the weights come in
    set_peft_model_state_dict(network, state, adapter_name=name)


# What decides the function a plain LoRA computes, beside its weights.
_SHAPING = (
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
_MORE = ("use_dora", "lora_bias", "modules_to_save")  # what makes more of it than that


def _lora_config(folder: Path) -> LoraConfig:
    found = read_json(folder / CONFIG)
    if not isinstance(found, dict) or found.get("peft_type", "LORA") != "LORA" or not {"r", "lora_alpha"} <= set(found):
        raise UserError(f"{folder / CONFIG}: not a LoRA's configuration; other adapters: merge them into a checkpoint")
    more = [key for key in _MORE if found.get(key)] + (["bias"] if found.get("bias", "none") != "none" else [])
    if more:
        raise UserError(
            f"{folder / CONFIG}: {', '.join(more)} is set, which is no plain LoRA; merge it into a checkpoint"
        )
    return LoraConfig(**{key: found[key] for key in _SHAPING if found.get(key) is not None})


def freeze_adapter(network: nn.Module, name: str) -> None:
    """Let an adapter require no gradient, and hold its weights in float32 whatever the base's dtype."""
    for parameter in adapter_parameters(network, name):
        parameter.requires_grad_(False)
        parameter.data = parameter.data.float()


def plain_copy(network: nn.Module, merge: str | None = None) -> nn.Module:
    """A copy of the network that holds no adapter, with the change of adapter `merge`, if one is named, in its weights.

    The merged weights are float32: a 16-bit base would swallow the adapter's small changes.
    """
    plain: ModelMixin = copy.deepcopy(network)
    if merge is not None:
        plain = plain.float()
        for layer in _tuner_layers(plain):
            layer.merge(adapter_names=[merge])
    for path, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = path.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(plain, "peft_config"):
        del plain.peft_config
        plain._hf_peft_config_loaded = False
    return plain
