"""The processes that train together: who this one is, and the few things they say to each other.

Started by `accelerate launch` or `torchrun`; Accelerate reads their environment and picks the transport (NCCL, or gloo
on CPUs). Alone, everything here does nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

BUCKET = 64 * 2**20  # bytes of gradients summed at once
LONGEST_WAIT = timedelta(days=2)  # a collective's own limit is ten minutes on GPUs


@dataclass(frozen=True)
class Processes:
    """This process among `count`.

    Attributes:
        rank: of this one, 0 is the one that writes.
        count: how many there are.
        device: this one's.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any process says so; the same answer for all."""
        if self.count == 1:
            return flag
        said = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        return bool(said)

    def least(self, number: int) -> int:
        """The smallest of every process's number, told without a device, so that none waits for what it computes."""
        if self.count == 1:
            return number
        said = torch.tensor(number)
        group = _patient_group(torch.distributed.group.WORLD)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group=group)
        return int(said)

    def gather(self, value: object) -> list:
        """Every process's plain value, by rank."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def collect(self, value: object) -> list:
        """Every process's plain value, by rank, in the main process; nothing in the others."""
        if self.count == 1:
            return [value]
        values: list | None = [None] * self.count if self.main else None
        torch.distributed.gather_object(value, values, dst=0, group=_patient_group(torch.distributed.group.WORLD))
        return values or []

    def from_main(self, value: object) -> Any:
        """The main process's plain value, in all of them, however long that one takes to find it."""
        if self.count == 1:
            return value
        values = [value if self.main else None]
        torch.distributed.broadcast_object_list(values, 0, group=_patient_group(torch.distributed.group.WORLD))
        return values[0]

    def wait(self) -> None:
        """Until all are here, however long one of them encodes, saves or hashes alone (at most `LONGEST_WAIT`)."""
        if self.count > 1:
            torch.distributed.barrier(group=_patient_group(torch.distributed.group.WORLD))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first, so that the others find what it wrote."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    @torch.no_grad()
    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in few large messages; a missing gradient counts as zero."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
            flat = torch._utils._flatten_dense_tensors(bucket)
            torch.distributed.all_reduce(flat)
            for gradient, total in zip(bucket, torch._utils._unflatten_dense_tensors(flat, bucket), strict=True):
                gradient.copy_(total)


ALONE = Processes(0, 1, torch.device("cpu"))


def share(count: int, processes: Processes, parts: int, before: int = 0) -> list[list[int]]:
    """Which of `count` samples this process takes (every n-th), in at most `parts` parts, none of them empty.

    Args:
        count: samples of one shape.
        processes: this one, and how many there are.
        parts: pieces the process's samples are split into.
        before: samples of the batch that were shared out before these; counting goes on from there, so that a batch
            of many small shapes falls on all processes alike.
    """
    mine = list(range((processes.rank - before) % processes.count, count, processes.count))
    size = -(-len(mine) // parts)
    return [mine[i : i + size] for i in range(0, len(mine), size)] if mine else []


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


@functools.lru_cache(maxsize=1)
def _patient_group(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    """All of a group's processes, on a transport that needs no device, for waits that outlast a collective's limit."""
    return torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)


def this_process() -> Processes:
    """Join the processes that the environment names; alone if it names none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        from danceopd.devices import best_device

        return Processes(0, 1, best_device())
    state = PartialState(cpu=not torch.accelerator.is_available())
    return Processes(state.process_index, state.num_processes, state.device)
