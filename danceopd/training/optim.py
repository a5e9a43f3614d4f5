"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from danceopd.backbones.sharded import rows_here, sharded_like, whole
from danceopd.errors import UserError, unknown_name

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
LONG = 2  # columns to a row from which on it is faster to iterate on a matrix's Gram matrix


class Muon(torch.optim.Muon):
    """torch's Muon, which on a CPU orthogonalises in float32 instead of bfloat16, and takes matrices that are shared.

    Of those every process gathers one update at a time, orthogonalises all of it and keeps its rows.

    Only the newest CPUs multiply bfloat16 matrices fast: with AVX-512 alone it takes three times as long as float32,
    with AVX2 sixteen times, which is more than the rest of a small network's step. And float32 rounds alike on all.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(p.device.type != "cpu" and not isinstance(p, DTensor) for p in parameters):
            return super().step(closure)
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)
        return loss

    def _step_one(self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        matrix = whole(update) if parameter.device.type == "cpu" else whole(update).bfloat16()
        update = orthogonalised(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            update = sharded_like(update[slice(*rows_here(parameter))].contiguous(), parameter)
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalised(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """A matrix with its singular values brought near 1 by Newton-Schulz iterations, in its own precision.

    The quintic iteration of Muon (Keller Jordan, 2024), as torch has it in bfloat16.
    """
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    long = x.size(1) >= LONG * x.size(0) and x.dtype == torch.float32
    x = (_iterated_on_gram if long else _iterated)(x, coefficients, steps)
    return x.T if tall else x


def _iterated(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """x <- (a + b G + c G^2) x with G = x x^T, `steps` times."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterated_on_gram(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """The same on the small matrix G alone: every factor is a polynomial in the first G, so all of them commute.

    Two products with the long matrix are left of two per iteration. It squares the singular values, which 16 bits do
    not bear.
    """
    a, b, c = coefficients
    gram, product = x @ x.T, torch.eye(x.size(0), dtype=x.dtype, device=x.device)
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return product @ x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the matrices, AdamW on everything else, behind one optimizer's interface.

    `Muon` takes two-dimensional parameters only and refuses the rest; a training loop wants one object to
    step, schedule and save. Both share the learning-rate schedule's factor through `param_groups`.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, adamw_lr: float, weight_decay: float):
        params = [p for p in params if p.requires_grad]
        matrices = [p for p in params if p.ndim == 2]
        rest = [p for p in params if p.ndim != 2]
        self._inner: list[torch.optim.Optimizer] = []
        if matrices:
            self._inner.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
        if rest:
            self._inner.append(torch.optim.AdamW(rest, lr=adamw_lr, weight_decay=weight_decay, fused=True))
        super().__init__(params, {"lr": lr})
        self.param_groups = [group for inner in self._inner for group in inner.param_groups]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
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
