"""Tensors of other shapes as rows of tokens: latents as 2x2 patches, prompts of any length as rows of one length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def to_tokens(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens of 2x2 patches, (B, H/2 W/2, 4 C)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def to_latents(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens (B, rows columns, 4 C) as latents (B, C, 2 rows, 2 columns)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)


def pack_parts(prompts: list[list[Tensor]], length: int) -> Tensor:
    """Prompts of several embedded parts each, as one tensor that keeps the parts apart.

    Args:
        prompts: one list per prompt; each of its parts (L_i, D), any lengths.
        length: rows of the result.

    Returns:
        (B, length, D + 1): parts one behind the other, then zeros; the last column is 1 for rows of the first part, 2
        for the second and so on, 0 for the zeros behind them.
    """
    rows = []
    for parts in prompts:
        marked = [F.pad(part, (0, 1), value=number) for number, part in enumerate(parts, start=1)]
        whole = torch.cat(marked)
        rows.append(F.pad(whole, (0, 0, 0, length - len(whole))))
    return torch.stack(rows)


def unpack_parts(packed: Tensor, first: int, last: int) -> list[list[Tensor]]:
    """The parts from number `first` to `last` (counted from 1) of each prompt of `pack_parts`."""
    if isinstance(packed, FakeTensor):  # a shape without values: as if every row were of a part that is wanted
        return [list(rows[:, :-1].tensor_split(last - first + 1)) for rows in packed]
    marks = packed[..., -1].round()
    return [
        [rows[mark == number, :-1] for number in range(first, last + 1)]
        for rows, mark in zip(packed, marks, strict=True)
    ]
