"""Tensors that processes share, in files: each process writes the rows it holds, and any number of processes read them.

torch's own `torch.distributed.checkpoint` does not serve: its index (`.metadata`), and every plain value beside the
tensors, is a pickle, which this project does not read. Its safetensors storage (`hf_storage`) has no pickle, but no
place for plain values either, builds each process's file in memory before it is written, and trusts what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from danceopd.backbones.sharded import local, rows_here, rows_of

NAME = "shard-{:05d}-of-{:05d}.safetensors"


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in several files, each with some of its rows.

    Attributes:
        folder: where they lie.
        name: the tensor's, in each of them.
        shape: of all of it.
        files: how many there are.
    """

    folder: Path
    name: str
    shape: torch.Size
    files: int

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop), read from the files that hold them; default: all."""
        stop = self.shape[0] if stop is None else stop
        parts = []
        for number in range(self.files):
            first, end = rows_of(self.shape[0], number, self.files)
            lo, hi = max(start, first), min(stop, end)
            # A process that has no rows asks one file, which tells the dtype.
            if lo < hi or (start == stop and number == 0):
                with safe_open(self.folder / NAME.format(number, self.files), framework="pt") as file:
                    parts.append(file.get_slice(self.name)[max(lo - first, 0) : max(hi - first, 0)].clone())
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def write_rows(tensors: dict[str, DTensor], folder: Path, rank: int, count: int) -> Path:
    """Write the rows that lie here of some shared tensors, as file `rank` of `count`."""
    for name, tensor in tensors.items():
        start, stop = rows_here(tensor)
        if tuple(local(tensor).shape) != (stop - start, *tensor.shape[1:]):
            raise ValueError(f"{name}: process {rank} holds {tuple(local(tensor).shape)}, not rows {start} to {stop}")
    path = Path(folder) / NAME.format(rank, count)
    save_file({name: local(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}, path)
    return path
