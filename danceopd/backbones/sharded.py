"""A transformer whose weights are shared out among processes: what of each lies here, and its files, written once.

Every weight is a DTensor cut along its first dimension (torch's FSDP2); a process holds some of its rows. No more than
one weight at a time is whole, while it is written or asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from danceopd.backbones.base import kind_of, repeated_blocks

if TYPE_CHECKING:  # slow to import
    from diffusers import ModelMixin

FILE, INDEX = "diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json"  # as diffusers names them


def is_sharded(network: nn.Module) -> bool:
    """Whether a network's weights are shared out."""
    return isinstance(network, FSDPModule)


def outline_of(network: ModelMixin) -> ModelMixin:
    """A network of the same class and configuration without memory for its weights, and without adapters."""
    with init_empty_weights():
        return cast(Any, kind_of(network)).from_config(network.config)


def writes(network: nn.Module) -> bool:
    """Whether this process writes a network's files: alone with it, or the first of those that share it."""
    return not is_sharded(network) or torch.distributed.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's whole value (every process must ask); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that lie here; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(length: int, rank: int, count: int) -> tuple[int, int]:
    """The rows [start, stop) of `length` that process `rank` of `count` holds: as `torch.chunk` cuts."""
    size = math.ceil(length / count)
    return min(rank * size, length), min((rank + 1) * size, length)


def rows_here(tensor: DTensor) -> tuple[int, int]:
    """The rows [start, stop) of a sharded tensor that lie here."""
    if tensor.device_mesh.ndim != 1 or tensor.placements != (Shard(0),):
        raise ValueError(f"a tensor is placed as {tensor.placements}, and only its rows can be shared out")
    return rows_of(tensor.shape[0], tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())


def sharded_like(rows: Tensor, like: DTensor) -> DTensor:
    """A tensor of another's shape and cut, of which these rows lie here; on its device, if it has memory."""
    mine = rows if like.is_meta else rows.to(like.device)
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def weights_of(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A network's own weights under their plain names, without adapters'."""
    for name, weight in network.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), weight


def write_transformer(network: ModelMixin, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a network's folder in diffusers' layout, one file a layer; every process that shares it must call this.

    Each weight is gathered by itself, and only the first process keeps it until its layer's file is written.

    Args:
        network: sharded, or with `state`.
        folder: where the files go.
        state: what to write for its weights, asked one by one; default: those it has.
    """
    writer, folder = writes(network), Path(folder)
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads(network.to_json_string())
        (folder / "config.json").write_text(
            json.dumps(config | {"_class_name": kind_of(network).__name__}, indent=2, sort_keys=True) + "\n"
        )
    state = network.state_dict() if state is None else state
    layers = _layers(network, list(state))
    total, where = 0, {}
    for number, names in enumerate(layers, start=1):
        file, layer = f"{FILE}-{number:05d}-of-{len(layers):05d}.safetensors", {}
        for name in names:
            weight = whole(state[name].detach())
            total += weight.nbytes
            where[name] = file
            if writer:
                layer[name] = weight.cpu().contiguous()
            del weight
        if writer:
            save_file(layer, folder / file, {"format": "pt"})
    if writer:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _layers(network: nn.Module, names: list[str]) -> list[list[str]]:
    """Names of weights by the block they lie in, those of none first."""
    blocks = {id(block) for block in repeated_blocks(network)}
    paths = [path for path, module in network.named_modules() if id(module) in blocks]
    layers: dict[str, list[str]] = {"": []}
    for name in names:
        mine = next((path for path in paths if name.startswith(f"{path}.")), "")
        layers.setdefault(mine, []).append(name)
    return [found for found in layers.values() if found]
