"""Frozen weights that wait in CPU memory and visit the accelerator only while they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class OffloadedWeights:
    """Moves a frozen network's weights in and out.

    The CPU copy stays (page-locked where an accelerator can use that), so that leaving the device copies nothing.
    Fields that share a network must share this object.

    Args:
        network: frozen; its weights are moved to CPU memory.
        device: where it computes.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self._tensors = [*network.parameters(), *network.buffers()]
        self._device, self._visits = torch.device(device), 0
        pinned = self._device.type == "cuda"
        self._home = [t.data.cpu().pin_memory() if pinned else t.data.cpu() for t in self._tensors]
        self._leave()

    def _leave(self) -> None:
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = home

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have the weights on the device during the block; blocks within one another move them once."""
        if self._visits == 0:
            for tensor, home in zip(self._tensors, self._home, strict=True):
                tensor.data = home.to(self._device, non_blocking=True)
        self._visits += 1
        try:
            yield
        finally:
            self._visits -= 1
            if self._visits == 0:
                self._leave()
