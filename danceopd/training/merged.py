"""A LoRA student as its rollouts see it: a frozen copy of the network with the adapter merged into the weights.

A rollout needs no gradient, and it is most of a distillation's forwards. Merged, it is the plain network in the base's
own precision: without two small products and several passes over memory beside every large one, and without autocast.
The copy rounds the merged weights to the base's dtype, so the states it leads to are a little off the student's own
path; velocity is still matched there by both fields as they are. How far off is watched: `danceopd.methods.drift_gate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from danceopd.backbones.base import Condition
from danceopd.backbones.kernels import compile_blocks, set_attention
from danceopd.backbones.sharded import outline_of, weights_of
from danceopd.flow.fields import Field, VelocityField

if TYPE_CHECKING:  # slow to import
    from diffusers import ModelMixin


@dataclass(frozen=True)
class MergedField(VelocityField):
    """The velocity of a merged copy: in its weights' own precision if that is 16 bits, whatever autocast is on."""

    def __call__(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity at `z` (B, N, C), `sigma` (B,): (B, N, C), in the network's dtype."""
        low = cast("ModelMixin", self.network).dtype != torch.float32
        with torch.autocast(z.device.type, enabled=False) if low else nullcontext():
            return super().__call__(z, sigma, condition)


class MergedCopy:
    """A field's merged copy, brought up to date when it is asked for after an update.

    Args:
        field: the student, with an adapter on a network whose weights are whole and not quantized.
        compile: mode of torch.compile for the copy's blocks, or `off`.
    """

    def __init__(self, field: VelocityField, compile: str = "off"):
        assert field.adapter is not None, "a copy is merged from an adapter"
        self._adapter = field.adapter
        network, self._layers = _shell(field.network, field.adapter)
        set_attention(network, field.backbone.settings.attention)
        if compile != "off":
            compile_blocks(network, compile)
        self._field = MergedField(f"{field.name}, merged", field.backbone, network)
        self.stale = True

    def renewed(self) -> Field:
        """The copy as the last update left the adapter."""
        if self.stale:
            for layer, weight in self._layers:
                _merge(layer, self._adapter, weight)
            self.stale = False
        return self._field


def _shell(network: ModelMixin, adapter: str) -> tuple[ModelMixin, list[tuple[Any, nn.Parameter]]]:
    """A network that shares every weight and buffer with another but those an adapter changes, and these by its layers.

    Of those it has its own, yet to be written.
    """
    shell = outline_of(network).eval()
    tuned: Iterator[tuple[str, Any]] = ((p, m) for p, m in network.named_modules() if isinstance(m, BaseTunerLayer))
    layers = {f"{path}.weight": layer for path, layer in tuned if adapter in layer.lora_A}
    own = []
    for name, weight in weights_of(network):
        plain = nn.Parameter(torch.empty_like(weight) if name in layers else weight.detach(), requires_grad=False)
        path, _, leaf = name.rpartition(".")
        setattr(shell.get_submodule(path), leaf, plain)
        if name in layers:
            own.append((layers[name], plain))
    for name, buffer in network.named_buffers():
        path, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        setattr(shell.get_submodule(path), leaf, buffer)
    return shell, own


@torch.no_grad()
def _merge(layer: Any, adapter: str, weight: Tensor) -> None:
    """Write a layer's weight plus its adapter's change, added in float32 and rounded once."""
    base = layer.get_base_layer().weight
    with torch.autocast(weight.device.type, enabled=False):
        weight.copy_(base + layer.get_delta_weight(adapter))  # of a 16-bit and a 32-bit tensor: 32 bits
