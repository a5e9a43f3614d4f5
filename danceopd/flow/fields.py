"""Velocity fields: a network, perhaps with one adapter switched on, as a function of state, noise level, condition."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from danceopd.backbones.base import Backbone, Condition
from danceopd.backbones.lora import active_adapter
from danceopd.backbones.offload import OffloadedWeights


class Field(Protocol):
    """What can be distilled, drawn with and saved: one network's velocity, or an operator on it (`guidance.py`).

    Attributes:
        name: for logs and errors.
        backbone: the model family.
        network: the transformer whose weights are the field's own.
        adapter: name of the LoRA adapter that belongs to it, or None.
        forwards: network passes one velocity of one sample takes.
        identity: equal for two fields that are the same function.
    """

    # Read-only, so that frozen dataclasses are fields.
    @property
    def name(self) -> str: ...

    @property
    def backbone(self) -> Backbone: ...

    @property
    def network(self) -> nn.Module: ...

    @property
    def adapter(self) -> str | None: ...

    @property
    def forwards(self) -> int: ...

    @property
    def identity(self) -> Hashable: ...

    def __call__(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity at `z` (B, N, C), `sigma` (B,): (B, N, C)."""
        ...

    def resident(self) -> AbstractContextManager[None]:
        """Keep offloaded weights on the device for a block of several calls."""
        ...


@dataclass(frozen=True)
class VelocityField:
    """v(z, sigma, c) of one network.

    Attributes:
        name: for logs and errors.
        backbone: the model family that knows how to call the network.
        network: the transformer; several fields may share one and differ by adapter.
        adapter: name of the LoRA adapter to switch on, or None for the network without any.
        offloaded: brings the network's weights to the device for each call, if they wait in CPU memory.
    """

    name: str
    backbone: Backbone
    network: nn.Module
    adapter: str | None = None
    offloaded: OffloadedWeights | None = None

    @property
    def forwards(self) -> int:
        """Network passes one velocity of one sample takes."""
        return 1

    @property
    def identity(self) -> Hashable:
        """Equal for two fields that are the same function."""
        return id(self.network), self.adapter

    def __call__(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity at `z` (B, N, C), `sigma` (B,): (B, N, C), in the network's dtype."""
        with self.resident(), self.active():
            return self.backbone.velocity(self.network, z, sigma, condition)

    def resident(self) -> AbstractContextManager[None]:
        """Keep offloaded weights on the device for a block of several calls."""
        return nullcontext() if self.offloaded is None else self.offloaded.resident()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hold this field's adapter on, so that a backward pass runs through the same one as its forward pass."""
        with active_adapter(self.network, self.adapter):
            yield
