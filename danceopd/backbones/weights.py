"""A transformer's weights from a folder or a single file, held against its configuration before they are read.

Diffusers fills what a checkpoint lacks with random numbers and a warning; here that is an error which names the keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from danceopd.backbones.lora_factors import check_finite
from danceopd.backbones.sharded import whole
from danceopd.errors import UserError
from danceopd.text import check_json_files

Shape = tuple[int, ...]
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
_PREFIX = re.compile(r"^(model\.)?diffusion_model\.")  # before every name in files of some programs


def read_transformer(kind: type[ModelMixin], path: Path, dtype: torch.dtype, config: Mapping[str, Any]) -> ModelMixin:
    """Read a transformer.

    Args:
        kind: its class.
        path: its folder in diffusers' layout, with its own configuration; or a safetensors file under diffusers' names
            or those of the original release.
        dtype: of the weights in memory.
        config: of the transformer in a file, which says nothing of it.

    Raises:
        UserError: if there are no such weights, or they do not fit, naming keys.
    """
    if path.is_file():
        return _read_file(kind, path, dtype, config)
    try:
        check_json_files(path)
        config = kind.load_config(str(path), local_files_only=True)
        wanted = shapes_of(_empty(kind, config))
        found: dict[str, Shape] = {}
        for file in sorted(path.glob("*.safetensors")):
            found |= file_shapes(file)
        if not found:
            raise UserError(f"{path}: no transformer checkpoint (no safetensors file there)")
        check_fit(path, kind, wanted, found, "its config")
        network = kind.from_pretrained(str(path), local_files_only=True, use_safetensors=True, dtype=dtype)
        check_finite(path, network.state_dict())
        return network
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: no transformer checkpoint ({' '.join(str(error).split())})") from error


def empty_transformer(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    """A transformer's folder's network without memory for its weights, of which none is read.

    Raises:
        UserError: if there is no such configuration.
    """
    check_json_files(folder)
    try:
        return _empty(kind, kind.load_config(str(folder), local_files_only=True))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: no transformer's config ({' '.join(str(error).split())})") from error


def same_weights(network: nn.Module, folder: Path) -> bool:
    """Whether a network holds the weights of a transformer folder, as far as bfloat16 tells them apart.

    Args:
        network: of plain weights under diffusers' names; if it is sharded every process must ask.
        folder: holds safetensors files of the same class of transformer.
    """
    state = network.state_dict()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                mine = state.get(key)
                if mine is None or mine.shape != tuple(opened.get_slice(key).get_shape()):
                    return False
                if not torch.equal(whole(mine).cpu().bfloat16(), opened.get_tensor(key).bfloat16()):
                    return False
    return True


def _read_file(kind: type[ModelMixin], file: Path, dtype: torch.dtype, config: Mapping[str, Any]) -> ModelMixin:
    network = _empty(kind, config)
    wanted = shapes_of(network)
    file_shapes(file)  # is it one?
    state = {_PREFIX.sub("", key): value for key, value in load_file(file).items()}
    if not wanted.keys() <= state.keys():
        state = _under_diffusers_names(kind, file, state, wanted, config)
    check_fit(file, kind, wanted, {key: tuple(value.shape) for key, value in state.items()}, "the base's config")
    check_finite(file, state)
    network.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    return network


def _under_diffusers_names(
    kind: type[ModelMixin],
    file: Path,
    state: dict[str, torch.Tensor],
    wanted: Mapping[str, Shape],
    config: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """The checkpoint converted, if that gives more of the wanted names."""
    known = len(wanted.keys() & state.keys())
    try:
        converted = _converted(kind, file, dict(state), dict(config))
    except UserError:
        if 2 * known < len(wanted):  # few of its names are diffusers'
            raise
        return state
    return converted if len(wanted.keys() & converted.keys()) > known else state


def _converted(
    kind: type[ModelMixin], file: Path, state: dict[str, torch.Tensor], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """A checkpoint of the original release under diffusers' names, by diffusers' own converter."""
    known = SINGLE_FILE_LOADABLE_CLASSES.get(kind.__name__)
    if known is None:
        raise UserError(f"{file}: diffusers reads no single file of {kind.__name__}; give its folder")
    first = next(iter(state), "nothing")
    try:
        return known["checkpoint_mapping_fn"](checkpoint=state, config=config)
    except (KeyError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        why = f"first name: {first}; {type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{file}: no {kind.__name__} checkpoint that diffusers knows the names of ({why})") from error


def _empty(kind: type[ModelMixin], config: Mapping[str, Any]) -> ModelMixin:
    """The network without memory for its weights."""
    with init_empty_weights():
        return kind.from_config(config)


def shapes_of(network: ModelMixin) -> dict[str, Shape]:
    """Names and shapes of a network's weights."""
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def weight_files(path: Path) -> list[Path]:
    """A safetensors file, or those anywhere in a folder; none if there is nothing."""
    return [path] if path.is_file() else sorted(path.glob("**/*.safetensors"))


def file_shapes(file: Path) -> dict[str, Shape]:
    """Names and shapes from a safetensors file's header.

    Raises:
        UserError: if it is no such file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file ({error}); pickled checkpoints are not read") from error


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype that most of a checkpoint's numbers have in its files, a folder's or one; float32 if it has none.

    In this dtype they are mapped into memory as they lie, and take none before they are used.
    """
    counts: dict[str, int] = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        shapes = file_shapes(file)  # is it one?
        with safe_open(file, framework="pt") as opened:
            for key, shape in shapes.items():
                kind = opened.get_slice(key).get_dtype()
                counts[kind] = counts.get(kind, 0) + math.prod(shape)
    return _DTYPES.get(max(counts, key=lambda kind: counts[kind]), torch.float32) if counts else torch.float32


def check_fit(
    where: Path, kind: type[ModelMixin], wanted: Mapping[str, Shape], found: Mapping[str, Shape], to: str
) -> None:
    """Hold a checkpoint's names and shapes against a network's.

    Args:
        where: the checkpoint, for messages.
        kind: the network's class.
        wanted: what the network has.
        found: what the checkpoint has.
        to: what the network is made by, for messages.

    Raises:
        UserError: naming keys, if they differ.
    """
    ignored = kind._keys_to_ignore_on_load_unexpected or []
    unexpected = [key for key in found if key not in wanted and not any(re.search(each, key) for each in ignored)]
    other = [
        f"{key} is {found[key]}, not {wanted[key]}" for key in wanted if found.get(key, wanted[key]) != wanted[key]
    ]
    lists = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": unexpected,
        "of another shape": other,
    }
    texts = [
        f"{len(keys)} {name}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for name, keys in lists.items()
        if keys
    ]
    if texts:
        raise UserError(f"{where}: the checkpoint of a {kind.__name__} does not fit {to}; keys {'; '.join(texts)}")
