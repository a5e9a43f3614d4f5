"""PEFT's LoRA layer in fewer passes over memory.

PEFT multiplies by the second matrix, scales the product and adds it: three results of the layer's whole width beside
the large product. A LoRA's own arithmetic is some hundredths of that product's, so at real size those passes,
by count, are most of what it costs. Here the matrix routine adds the scaled product to what lies there (`addmm`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

if torch.ops.aten.addmm_ not in flop_registry:  # torch counts the product that makes a new tensor only
    flop_registry[torch.ops.aten.addmm_] = flop_registry[torch.ops.aten.addmm]


class FusedLinear(Linear):
    """PEFT's layer around a linear one, for one plain adapter at a time; anything else goes PEFT's own way.

    Attributes:
        chosen: the two matrices' layers and the strength of the adapter that is on, or None. It holds no name, so
            that compiled code serves every adapter of one shape and strength.
    """

    chosen: tuple[nn.Linear, nn.Linear, float] | None = None

    def choose(self, adapter: str | None) -> None:
        """Let the forward pass be that of one adapter, if the layer has it as a plain LoRA, or PEFT's."""
        self.chosen = None
        if adapter is None or adapter not in self.lora_A or adapter in self.lora_variant or self.merged:
            return
        first, second = self.lora_A[adapter], self.lora_B[adapter]
        if isinstance(self.lora_dropout[adapter], nn.Identity):
            assert isinstance(first, nn.Linear)
            assert isinstance(second, nn.Linear)
            self.chosen = (first, second, self.scaling[adapter])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's product and the adapter's: (..., in) to (..., out)."""
        if self.chosen is None or args or kwargs or x.dim() < 2:
            return super().forward(x, *args, **kwargs)
        first, second, strength = self.chosen
        rows = x.flatten(0, -2)  # of a matrix product's own result no view is changed, which autograd would copy
        result = self.base_layer(rows)
        low = first(self._cast_input_dtype(rows, first.weight.dtype))
        if low.dtype == result.dtype:
            result.addmm_(low, second.weight.to(low.dtype).t(), alpha=strength)
        else:  # a 16-bit base without autocast: the adapter's product is float32
            result = torch.addmm(result.to(low.dtype), low, second.weight.t(), alpha=strength).to(result.dtype)
        return result.unflatten(0, x.shape[:-1])


def fuse(layer: nn.Module) -> None:
    """Make PEFT's plain layer compute this way, in place; layers of other kinds (quantized, convolutions) are left."""
    if type(layer) is Linear:
        layer.__class__ = FusedLinear
