"""The fused LoRA layer: PEFT's own function and gradients, in fewer passes, counted and compiled as one."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from danceopd.backbones.lora import active_adapter
from danceopd.backbones.lora_layer import FusedLinear, fuse

NAMES = ("first", "second")


def layer(dtype=torch.float32, bias=True, **config) -> Linear:
    """A layer of 24 to 40 with two adapters that change it, as PEFT makes it."""
    torch.manual_seed(0)
    made = Linear(nn.Linear(24, 40, bias=bias, dtype=dtype), NAMES[0], LoraConfig(r=4, **config), r=4, lora_alpha=8)
    made.update_layer(NAMES[1], 4, 8, LoraConfig(r=4))
    for name in NAMES:
        nn.init.normal_(made.lora_B[name].weight)
        made.lora_A[name].float()
        made.lora_B[name].float()
    made.requires_grad_(True).base_layer.requires_grad_(False)
    return made


def run(made, name, x, low=False):
    """Output, and gradients of input and adapter."""
    x = x.clone().requires_grad_(True)
    with active_adapter(made, name), torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = made(x)
    grads = torch.autograd.grad(
        out.float().square().sum(), [x, *made.lora_A.parameters(), *made.lora_B.parameters()], allow_unused=True
    )
    return out, grads


def peft_only(monkeypatch):
    monkeypatch.setattr("danceopd.backbones.lora.fuse", lambda layer: None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (2, 1, 5, 24)])
def test_it_is_pefts_function_with_pefts_gradients(monkeypatch, name, bias, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    fused = layer(bias=bias)
    out, grads = run(fused, name, x)
    assert type(fused) is FusedLinear
    peft_only(monkeypatch)
    plain = layer(bias=bias)
    wanted, theirs = run(plain, name, x)
    assert type(plain) is Linear
    torch.testing.assert_close(out, wanted)
    assert [g is None for g in grads] == [g is None for g in theirs]
    for got, of in zip(grads, theirs, strict=True):
        if got is not None:
            torch.testing.assert_close(got, of)


@pytest.mark.parametrize("low", [True, False])
def test_a_16_bit_base_keeps_its_dtype_and_rounds_no_worse_than_peft(monkeypatch, low):
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    exact, _ = run(layer(), NAMES[0], x)
    given = x.bfloat16()
    out, grads = run(layer(torch.bfloat16), NAMES[0], given, low)
    peft_only(monkeypatch)
    wanted, theirs = run(layer(torch.bfloat16), NAMES[0], given, low)
    assert out.dtype == wanted.dtype == torch.bfloat16
    error, of_peft = (float((o.float() - exact).detach().norm()) for o in (out, wanted))
    assert error < 1.05 * of_peft
    assert all(a.dtype == b.dtype for a, b in zip(grads, theirs, strict=True) if a is not None)


class Passes(TorchFunctionMode):
    """Counts calls of the plain elementwise operations."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in {"add", "mul", "__add__", "__mul__", "__rmul__"}
        return function(*args, **(kwargs or {}))


def test_no_pass_over_the_result_beside_the_products(monkeypatch):
    x, made = torch.randn(4, 24), layer()
    with active_adapter(made, NAMES[0]), Passes() as passes, torch.no_grad():
        made(x)
    assert passes.count == 0
    peft_only(monkeypatch)
    plain = layer()
    with active_adapter(plain, NAMES[0]), Passes() as passes, torch.no_grad():
        plain(x)
    assert passes.count == 2


def test_other_uses_go_pefts_way():
    x, made = torch.randn(4, 24), layer()
    fuse(made)
    with torch.no_grad():
        bare = made.base_layer(x)
        with active_adapter(made, None):
            assert torch.equal(made(x), bare)
        with active_adapter(made, NAMES[1]):
            second = made(x)
            with active_adapter(made, NAMES[0]):
                first = made(x)
            assert torch.equal(made(x), second)  # what was on is on again
        assert not torch.equal(first, second)
        made._active_adapter = list(NAMES)  # both at once, as a diffusers pipeline can ask
        torch.testing.assert_close(made(x), first + second - bare)
        made.merge(adapter_names=[NAMES[0]])
        with active_adapter(made, NAMES[0]):
            torch.testing.assert_close(made(x), first)  # once, not twice


def test_dropout_and_what_is_no_plain_lora_stay_pefts():
    torch.manual_seed(0)
    for config in ({"lora_dropout": 0.5}, {"use_dora": True}):
        made = Linear(nn.Linear(24, 40), NAMES[0], LoraConfig(r=4, **config), r=4)
        with active_adapter(made, NAMES[0]):
            assert made.chosen is None
            made(torch.randn(2, 24))


def test_its_operations_are_counted_as_pefts(monkeypatch):
    def operations():
        made = layer()
        with active_adapter(made, NAMES[0]), FlopCounterMode(display=False) as counter:
            made(torch.randn(4, 24)).sum().backward()
        return counter.get_total_flops()

    fused = operations()
    peft_only(monkeypatch)
    assert fused == operations() > 0


def test_one_compiled_variant_serves_every_adapter_of_a_shape_and_strength():
    made, counter = layer(), CompileCounter()
    compiled = torch.compile(made, backend=counter)
    outs = []
    with torch.no_grad():
        for name in NAMES:
            with active_adapter(made, name):
                outs.append(compiled(torch.ones(4, 24)))
    assert counter.frame_count == 1
    assert not torch.equal(*outs)
    torch._dynamo.reset()


def test_a_network_of_diffusers_is_fused_where_its_adapter_is(backbone):
    network: Flux2Transformer2DModel = backbone.new_transformer()
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="a")
    with active_adapter(network, "a"):
        kinds = {type(m) for m in network.modules() if isinstance(m, Linear)}
    assert kinds == {FusedLinear}
