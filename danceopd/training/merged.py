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
from danceopd.backbones.streamed import OwnWeights
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
        network: ModelMixin = field.network
        self._merged = OwnWeights(network, field.adapter, network.dtype)
        network, self._own = _shell(network, field.adapter)
        set_attention(network, field.backbone.settings.attention)
        if compile != "off":
            compile_blocks(network, compile)
        self._field = MergedField(f"{field.name}, merged", field.backbone, network)
        self.stale = True

    @torch.no_grad()
    def renewed(self) -> Field:
        """The copy as the last update left the adapter."""
        if self.stale:
            with torch.autocast(next(iter(self._own.values())).device.type, enabled=False):
                for name, weight in self._own.items():
                    weight.copy_(self._merged[name])
            self.stale = False
        return self._field


def _shell(network: ModelMixin, adapter: str) -> tuple[ModelMixin, dict[str, nn.Parameter]]:
    """A network that shares all weights and buffers with another but what an adapter changes; and that by name.

    Of that it has its own, yet to be written.
    """
    shell = outline_of(network).eval()
    tuned: Iterator[tuple[str, Any]] = ((p, m) for p, m in network.named_modules() if isinstance(m, BaseTunerLayer))
    changed = {f"{path}.weight" for path, layer in tuned if adapter in layer.lora_A}
    own = {}
    for name, weight in weights_of(network):
        plain = nn.Parameter(torch.empty_like(weight) if name in changed else weight.detach(), requires_grad=False)
        path, _, leaf = name.rpartition(".")
        setattr(shell.get_submodule(path), leaf, plain)
        if name in changed:
            own[name] = plain
    for name, buffer in network.named_buffers():
        path, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        setattr(shell.get_submodule(path), leaf, buffer)
    return shell, own
