"""Weights, gradients and optimizer state of a full-weight student shared out among processes (torch's FSDP2)."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from danceopd.backbones.base import repeated_blocks
from danceopd.training.processes import Processes


def shard_network(network: nn.Module, processes: Processes) -> None:
    """Shard in place: one unit per transformer block, one for the rest.

    Gathered weights are kept from a process's first forward pass of an update to its last backward pass (ZeRO-2):
    rollouts of different length on different processes then need no further communication.
    """
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for block in repeated_blocks(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def synchronise_gradients(network: nn.Module, last: bool) -> None:
    """Whether the next backward pass shares out its gradients and lets go of the gathered weights."""
    for module in _units(network):
        module.set_requires_gradient_sync(last, recurse=False)
        module.set_reshard_after_backward(last, recurse=False)


def forget_gathered(network: nn.Module) -> None:
    """Let go of gathered weights, after the shards they came from were written to."""
    for module in _units(network):
        module.reshard()


def _units(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]
