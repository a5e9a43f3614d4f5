"""Optimizers by name: what they touch, that they resume, what they refuse."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from danceopd.errors import UserError
from danceopd.training.optim import OPTIMIZERS, Muon, build_optimizer, lr_factor, orthogonalised

EIGHT_BIT = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
NAMES = [pytest.param(name, marks=EIGHT_BIT) if name == "adamw8bit" else name for name in OPTIMIZERS]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 4, generator=generator)
        loss = (model(x) - x[:, :2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_moves_and_the_loss_falls(name):
    model = network()
    before = [p.clone() for p in model.parameters()]
    optimizer = build_optimizer(model.parameters(), name, lr=0.02, weight_decay=0.0)
    first = train(model, optimizer, 1, seed=1)
    assert train(model, optimizer, 150, seed=2) < 0.5 * first
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_resumes_bit_for_bit(name):
    model = network()
    optimizer = build_optimizer(model.parameters(), name, lr=0.02, weight_decay=0.01)
    train(model, optimizer, 5, seed=1)
    twin = copy.deepcopy(model)
    other = build_optimizer(twin.parameters(), name, lr=0.5, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 5, seed=2)
    train(twin, other, 5, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(8, 8), (16, 24), (16, 32), (16, 150), (150, 16), (1, 5), (5, 1)])
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 0.0])  # singular values fall to it
def test_a_matrix_of_any_shape_is_orthogonalised_as_in_double_precision(shape, smallest):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0, 1, len(v), dtype=torch.float64).pow(4) * (1 - smallest) + smallest
    matrix = u @ values.diag() @ v

    exact = orthogonalised(matrix, COEFFICIENTS, 5, 1e-7)
    found = orthogonalised(matrix.float(), COEFFICIENTS, 5, 1e-7)

    assert (found.double() - exact).norm() < 1e-3 * max(1.0, float(exact.norm()))
    if smallest == 1.0:
        assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.4  # the iteration's own spread


def test_the_schedule_reaches_every_group():
    model = network()
    optimizer = build_optimizer(model.parameters(), "muon", lr=1.0, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, 10, 2))
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx([0.5, 0.05])
    assert rates[1] == pytest.approx([1.0, 0.1])
    assert rates[9][0] < 0.1


def test_frozen_weights_stay():
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model, build_optimizer(model.parameters(), "muon", lr=0.1, weight_decay=0.1), 3, seed=1)
    assert torch.equal(model[0].weight, before)


def test_nothing_to_train_and_unknown_names_are_refused():
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(network().requires_grad_(False).parameters(), "adamw", lr=1.0, weight_decay=0.0)
    with pytest.raises(UserError, match="'adam' is not known; choose one of: adamw, adamw8bit, muon"):
        build_optimizer(network().parameters(), "adam", lr=1.0, weight_decay=0.0)


@EIGHT_BIT
def test_eight_bit_state_is_eight_bits():
    weight = nn.Linear(256, 256).weight
    optimizer = build_optimizer([weight], "adamw8bit", lr=0.01, weight_decay=0.0)
    weight.square().sum().backward()
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == optimizer.state[weight]["state2"].dtype == torch.uint8


def test_eight_bits_without_their_library_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="adamw8bit needs bitsandbytes; install it"):
        build_optimizer(network().parameters(), "adamw8bit", lr=1.0, weight_decay=0.0)


def after_muon(kind: type, dtype: torch.dtype, shape: tuple[int, int], steps: int = 3) -> torch.Tensor:
    """A matrix after a few steps on gradients that are the same whatever the type."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = kind([parameter], lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        parameter.grad = torch.randn(shape, generator=generator).to(dtype)
        optimizer.step()
    return parameter.detach().double()


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_muon_takes_torchs_steps_and_rounds_as_float32_does(shape):
    ours, theirs = (after_muon(kind, torch.float32, shape) for kind in (Muon, torch.optim.Muon))
    exact = after_muon(Muon, torch.float64, shape)

    def apart(other: torch.Tensor) -> float:
        return ((other - exact).norm() / exact.norm()).item()

    assert apart(theirs) < 0.02  # bfloat16
    assert apart(ours) < 1e-4 < apart(theirs)


def test_muons_state_is_torchs_own():
    parameter = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([parameter], lr=0.1)
    parameter.grad = torch.randn(4, 6)
    optimizer.step()
    assert set(optimizer.state[parameter]) == {"momentum_buffer"}
    torch.optim.Muon([nn.Parameter(torch.ones(4, 6))], lr=0.1).load_state_dict(optimizer.state_dict())
