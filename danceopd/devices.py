"""Where tensors live."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """The accelerator if this process sees one, else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")
