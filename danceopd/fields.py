"""Velocity fields: a network, perhaps with one adapter switched on, as a function of state, noise level, condition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from danceopd.adapters import active_adapter
from danceopd.backbones.base import Backbone, Condition


@dataclass(frozen=True)
class VelocityField:
    """v(z, sigma, c) of one network.

    Attributes:
        name: for logs and errors.
        backbone: the model family that knows how to call the network.
        network: the transformer; several fields may share one and differ by adapter.
        adapter: name of the LoRA adapter to switch on, or None for the network without any.
    """

    name: str
    backbone: Backbone
    network: nn.Module
    adapter: str | None = None

    def __call__(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity at `z` (B, N, C), `sigma` (B,): (B, N, C), in the network's dtype."""
        with self.active():
            return self.backbone.velocity(self.network, z, sigma, condition)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hold this field's adapter on, so that a backward pass runs through the same one as its forward pass."""
        with active_adapter(self.network, self.adapter):
            yield


@torch.no_grad()
def routed_velocity(
    fields: dict[str, VelocityField], routes: list[str], z: Tensor, sigma: Tensor, condition: Condition
) -> Tensor:
    """Each sample's velocity from its own teacher, one forward pass a teacher. Never a mean of teachers.

    Args:
        fields: teachers by name.
        routes: the teacher's name of each sample, length B.
        z: states (B, N, C).
        sigma: noise levels (B,).
        condition: of the same B samples.
    """
    velocity = torch.empty_like(z)
    for name in sorted(set(routes)):
        index = torch.tensor([i for i, route in enumerate(routes) if route == name], device=z.device)
        velocity[index] = fields[name](z[index], sigma[index], condition.rows(index)).to(z.dtype)
    return velocity
