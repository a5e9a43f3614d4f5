"""One pass of a student on tensors without memory: the operations it takes, and what autograd would keep of it.

Shapes alone decide both, so that a configuration is enough: no weight is read and no device is asked, whatever the
network's size and the pictures'. torch's own `FakeTensorMode` and `FlopCounterMode` do the work.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from danceopd.backbones.base import Backbone, Condition, repeated_blocks
from danceopd.backbones.lora import adapter_parameters, add_lora
from danceopd.config.recipe import TrainRecipe

STUDENT = "student"


@dataclass(frozen=True)
class Samples:
    """What goes through the network together.

    Attributes:
        count: how many samples, of one shape.
        height: of the pictures in pixels.
        width: of the pictures in pixels.
        edits: whether each has a source image of its picture's size.
    """

    count: int
    height: int
    width: int
    edits: bool


def forward_operations(outline: Backbone, samples: Samples) -> int:
    """Floating-point operations of one forward pass: matrix products, convolutions and attention.

    Args:
        outline: a back end without weights (`open_outline`).
        samples: what passes.
    """
    network = copy.deepcopy(outline.transformer)
    counter = FlopCounterMode(display=False)
    # The CPU's fused attention is not counted by torch, the plain one is; the products are the same.
    with _fake(network), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        _pass(outline, network, samples)
    return counter.get_total_flops()


def kept_bytes(outline: Backbone, spec: TrainRecipe, samples: Samples) -> int:
    """Bytes that the student's forward pass keeps for its backward pass, most of them activations.

    Args:
        outline: a back end without weights; its settings say the dtype of those that stay frozen.
        spec: what trains (`trainable`, `lora`), its `precision`, and `activation_checkpointing`: then what is kept is
            each block's input, and one block in full while it is computed again.
        samples: what passes.
    """
    network = _student(outline, spec)
    if not spec.activation_checkpointing:
        return _kept(outline, network, spec, samples)
    whole = _kept(outline, network, spec, samples)
    network.enable_gradient_checkpointing()
    inputs = _kept(outline, network, spec, samples)
    return inputs + (whole - inputs) // max(len(repeated_blocks(network)), 1)


def _student(outline: Backbone, spec: TrainRecipe) -> ModelMixin:
    network = copy.deepcopy(outline.transformer)
    if spec.trainable == "full":
        return network.requires_grad_(True)
    dtype = getattr(torch, outline.settings.dtype)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    add_lora(network, STUDENT, spec.lora, outline.lora_targets, seed=0)
    trained = {id(parameter) for parameter in adapter_parameters(network, STUDENT)}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return network


def _kept(outline: Backbone, network: nn.Module, spec: TrainRecipe, samples: Samples) -> int:
    own: set[int] = set()
    seen: dict[int, StorageWeakRef] = {}
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = storage._cdata
        # A place that was freed and taken again is another tensor, which training would keep beside the first.
        if place not in own and (place not in seen or seen[place].expired()):
            seen[place] = StorageWeakRef(storage)
            sizes.append(storage.nbytes())
        return tensor

    low = spec.precision == "bfloat16"
    with _fake(network):
        own |= {t.untyped_storage()._cdata for t in [*network.parameters(), *network.buffers()]}
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, cache_enabled=True) if low else nullcontext(),
            disable_input_dtype_casting(network, active=low),  # as the learner's own pass
        ):
            _pass(outline, network, samples)
    return sum(sizes)


def _fake(network: nn.Module) -> FakeTensorMode:
    """A mode in which the network's weights have shapes and no memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in network.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return mode


def _pass(outline: Backbone, network: nn.Module, samples: Samples) -> None:
    state = torch.empty(samples.count, *outline.latent_shape(samples.height, samples.width))
    prompt = torch.empty(samples.count, *outline.prompt_shape(samples.edits))
    source = torch.empty_like(state) if samples.edits else None
    condition = Condition(prompt, source, samples.height, samples.width)
    outline.velocity(network, state, torch.full((samples.count,), 0.5), condition)
