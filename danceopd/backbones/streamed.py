"""A transformer's weights one at a time: as they are handed over, as they lie in files, and computed with in float32.

What is written, read back and compared is never a second network: no more of it is there than one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from danceopd.backbones.base import repeated_blocks
from danceopd.backbones.weights import check_fit, file_shapes, shapes_of


class OwnWeights(Mapping[str, Tensor]):
    """A network's own weights under their plain names, with an adapter's change in them, each made when it is asked.

    A change is added in float32, and the sum then rounded. Weights stay on their device.
    """

    def __init__(self, network: nn.Module, adapter: str | None, dtype: torch.dtype):
        """Take the weights of `network`, with the change of `adapter` if it is not None, as `dtype`."""
        self._dtype, self._adapter = dtype, adapter
        self._of = {_plain(name): of for name, of in network.state_dict().items() if ".lora_" not in name}
        self._layers: dict[str, Any] = {}  # PEFT's own, whose base class declares nothing of them
        for path, layer in network.named_modules():
            if isinstance(layer, BaseTunerLayer) and adapter in getattr(layer, "lora_A", {}):
                self._layers[_plain(f"{path}.weight")] = layer

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        weight, layer = self._of[name].detach(), self._layers.get(name)
        if layer is not None:
            weight = layer.get_delta_weight(self._adapter).add_(weight)  # float32, as the adapter is
        return weight.to(self._dtype) if weight.is_floating_point() else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


class StoredWeights(Mapping[str, Tensor]):
    """The weights of a transformer's folder, each read when it is asked."""

    def __init__(self, network: ModelMixin, folder: Path):
        """Find the weights of `network`, which may have no memory, in the safetensors files of `folder`.

        Raises:
            UserError: if one is no such file, or they are not the network's, naming keys.
        """
        found: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            shapes = file_shapes(file)
            found |= shapes
            self._file |= dict.fromkeys(shapes, file)
        check_fit(Path(folder), type(network), shapes_of(network), found, "its config")

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


SMALL = 2**25  # numbers of a layer outside the blocks that is raised all the while: back ends read such layers' dtype


@contextmanager
def in_float32(network: nn.Module, weights: Mapping[str, Tensor], device: torch.device | str) -> Iterator[None]:
    """Let a network compute with other weights, in float32, a layer's no longer than it is at work.

    The network's own come back at the end; they may have no memory. Its adapters must be off.

    Args:
        network: whose layers take turns.
        weights: by plain name, of the network's shapes, of any dtype and device.
        device: where it computes.
    """
    inside = {id(module) for block in repeated_blocks(network) for module in block.modules()}
    always, hooks = [], []
    for path, module in network.named_modules():
        if ".lora_" in f".{path}.":
            continue
        layer = _Layer(path, module, weights, device)
        if id(module) not in inside and layer.size < SMALL:
            always.append(layer)
        elif layer.size:
            hooks.append(module.register_forward_pre_hook(lambda *told, layer=layer: layer.put()))
            hooks.append(module.register_forward_hook(lambda *told, layer=layer: layer.take_back(), always_call=True))
    try:
        for layer in always:
            layer.put()
        with torch.compiler.set_stance("force_eager"):  # a compiled block would be compiled again for other weights
            yield
    finally:
        for layer in always:
            layer.take_back()
        for hook in hooks:
            hook.remove()


class _Layer:
    """A module's own weights and buffers, which others in float32 stand in for while it is at work."""

    def __init__(self, path: str, module: nn.Module, weights: Mapping[str, Tensor], device: torch.device | str):
        self._path, self._weights, self._device = path, weights, device
        self._kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        self._own: list[tuple[dict, str, Tensor]] = []

    @property
    def size(self) -> int:
        """How many numbers they are."""
        return sum(own.numel() for kind in self._kinds for own in kind.values() if own is not None)

    def put(self) -> None:
        """Raise them."""
        parameters, _ = self._kinds
        for kind in self._kinds:
            for key, own in list(kind.items()):
                if own is None:
                    continue
                found = self._weights.get(_plain(f"{self._path}.{key}" if self._path else key), own).detach()
                value = found.to(self._device, torch.float32 if found.is_floating_point() else None)
                self._own.append((kind, key, own))
                kind[key] = nn.Parameter(value, False) if kind is parameters else value

    def take_back(self) -> None:
        """Give the module its own again."""
        for kind, key, own in self._own:
            kind[key] = own
        self._own.clear()
