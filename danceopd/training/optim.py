"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from danceopd.errors import UserError, unknown_name

OPTIMIZERS = ("adamw", "adamw8bit", "muon")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the matrices, AdamW on everything else, behind one optimizer's interface.

    torch's own `Muon` takes two-dimensional parameters only and refuses the rest; a training loop wants one object to
    step, schedule and save. Both share the learning-rate schedule's factor through `param_groups`.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, adamw_lr: float, weight_decay: float):
        params = [p for p in params if p.requires_grad]
        matrices = [p for p in params if p.ndim == 2]
        rest = [p for p in params if p.ndim != 2]
        self._inner = []
        if matrices:
            self._inner.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay))
        if rest:
            self._inner.append(torch.optim.AdamW(rest, lr=adamw_lr, weight_decay=weight_decay, fused=True))
        super().__init__(params, {"lr": lr})
        self.param_groups = [group for inner in self._inner for group in inner.param_groups]

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for inner in self._inner:
            inner.step()
        return loss

    def state_dict(self) -> dict:
        return {"inner": [inner.state_dict() for inner in self._inner]}

    def load_state_dict(self, state: dict) -> None:
        for inner, saved in zip(self._inner, state["inner"], strict=True):
            inner.load_state_dict(saved)
        self.param_groups = [group for inner in self._inner for group in inner.param_groups]


def build_optimizer(params: Iterable[nn.Parameter], name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimizer over the parameters that require a gradient.

    Args:
        params: any parameters; frozen ones are left out.
        name: `adamw`; `adamw8bit` (bitsandbytes: state in a quarter of the memory); or `muon`
            (matrices; the rest by AdamW at a tenth of `lr`).
        lr: peak learning rate, > 0.
        weight_decay: decoupled weight decay, >= 0.

    Raises:
        UserError: for another name, or if nothing is trainable.
    """
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        raise UserError("optimizer: no trainable parameter; check the recipe's 'trainable' setting")
    if name == "adamw":
        return torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "adamw8bit":
        return _adamw8bit(trainable, lr, weight_decay)
    if name == "muon":
        return MuonWithAdamW(trainable, lr=lr, adamw_lr=lr / 10, weight_decay=weight_decay)
    raise unknown_name("optimizer", name, OPTIMIZERS)


def _adamw8bit(params: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer adamw8bit needs bitsandbytes; install it by pip install 'danceopd[adamw8bit]', or choose adamw"
        ) from error
    return AdamW8bit(params, lr=lr, weight_decay=weight_decay)


def lr_factor(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to `floor` times the peak at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
