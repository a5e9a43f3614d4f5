"""How a frozen transformer computes: which attention kernel, and in how many bits its weights lie."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from danceopd.backbones.base import repeated_blocks
from danceopd.errors import UserError

if TYPE_CHECKING:  # slow to import
    from diffusers import ModelMixin


VARIANTS = 64  # of one block's code that may be compiled; torch stops at 8, and runs the others uncompiled


def compile_blocks(network: nn.Module, mode: str) -> None:
    """Let torch.compile take a transformer's blocks, one kind of block at a time.

    Every adapter, with and without gradient and autocast, is another variant of the same code.

    Args:
        network: the transformer.
        mode: of torch.compile.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in repeated_blocks(network):
        block.compile(mode=mode, dynamic=True)


def set_attention(network: ModelMixin, backend: str) -> None:
    """Let a diffusers transformer use this attention backend; diffusers sets it for the whole process.

    Raises:
        UserError: for a name diffusers does not know, or a backend whose packages are not here.
    """
    if backend == "native":
        return
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that the call may change
    try:
        network.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.attention: {' '.join(str(error).split())}") from error
    finally:
        logger.setLevel(level)


def quantize_frozen(network: nn.Module, kind: str) -> None:
    """Keep a frozen network's matrices in 8 bits, one scale per row (torchao); sums are taken in the input's dtype.

    Args:
        network: without adapters.
        kind: `int8` or `float8`.

    Raises:
        UserError: if torchao is not installed.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(
            "model.quantize needs torchao; install it by pip install 'danceopd[quantize]', or leave quantize out"
        ) from error
    quantize_(network, {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[kind]())
