"""Where tensors live, and how many cores there are for them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it is slow to import, and counting cores does not need it
    import torch


def best_device() -> torch.device:
    """The accelerator if this process sees one, else the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def usable_cores() -> int:
    """The cores that `OMP_NUM_THREADS` allows, else those this process may run on."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit() and int(allowed) > 0:
        return int(allowed)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SMALL_THREADS = 2  # of a network as small as the worlds': more have not been seen to gain anything
_SPIN = "GOMP_SPINCOUNT"  # how often an idle thread of GNU's OpenMP, torch's on Linux, looks for work before it sleeps


def wait_briefly() -> None:
    """Let threads without work sleep soon, unless the environment says otherwise; call it before torch is imported.

    By default they look for work for milliseconds, on a core that another process may need: beside a busy process per
    core two threads then take longer than one. Put to sleep at once they take longer on a quiet machine.
    """
    os.environ.setdefault(_SPIN, "5000")


def small_threads() -> int:
    """Threads for a network as small as the worlds': two where there are cores and idle ones sleep soon, else one."""
    return min(SMALL_THREADS if _SPIN in os.environ else 1, usable_cores())


def spare_threads() -> None:
    """Let torch compute on `small_threads()` in this process, unless `OMP_NUM_THREADS` says on how many."""
    import torch

    if not os.environ.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(small_threads())


def hardware(device: torch.device, processes: int = 1) -> dict[str, str | int]:
    """What each of some processes computes on: the accelerator's `device` name, or `cpu`, and `count`, of devices or of
    the CPU's cores."""
    import torch

    if device.type == "cpu":
        return {"device": "cpu", "count": processes * usable_cores()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "count": processes}
