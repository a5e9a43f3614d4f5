"""Where tensors live, and how many cores there are for them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it is slow to import, and who counts cores does not need it
    import torch


def best_device() -> torch.device:
    """The accelerator if this process sees one, else the CPU."""
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def usable_cores() -> int:
    """The cores that `OMP_NUM_THREADS` allows, else those this process may run on."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit() and int(allowed) > 0:
        return int(allowed)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
