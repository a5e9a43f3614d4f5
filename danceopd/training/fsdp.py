"""Networks shared out among processes by torch's FSDP2: a frozen base, full teachers, and the student that trains.

A process holds its rows of every weight, and of gradients and optimizer state what belongs to them. A block's weights
are gathered for its forward pass, let go, and gathered again for its backward pass, after which its gradients are added
up over the processes and each keeps its rows. So no process ever holds more than some blocks whole; `Lockstep` sees to
it that all of them gather the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from danceopd.backbones.base import Backbone, repeated_blocks
from danceopd.backbones.kernels import set_attention
from danceopd.backbones.lora import add_lora
from danceopd.backbones.sharded import is_sharded, local, outline_of, sharded_like, weights_of, whole
from danceopd.config.recipe import MERGES, DistillRecipe, TrainRecipe
from danceopd.flow.fields import Field
from danceopd.training.lockstep import Lockstep
from danceopd.training.processes import Processes

_MARK = "_danceopd_shares"


def shares(spec: TrainRecipe, processes: Processes) -> bool:
    """Whether these processes share out what a recipe's section trains and asks."""
    merges = isinstance(spec, DistillRecipe) and spec.method in MERGES
    return processes.count > 1 and spec.parallel == "shard" and not merges


@dataclass(frozen=True)
class Shares:
    """The networks that some processes share.

    Attributes:
        processes: those.
        mesh: all of them in a row.
        lockstep: keeps their passes together.
    """

    processes: Processes
    mesh: DeviceMesh
    lockstep: Lockstep

    @classmethod
    def among(cls, processes: Processes) -> Shares:
        """Nothing shared yet."""
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        return cls(processes, mesh, Lockstep(processes))

    def add(
        self, network: nn.Module, policy: MixedPrecisionPolicy | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Share a network out in place, block by block; one that is already stays as it is.

        Args:
            network: on the CPU, on the processes' device, or without memory (`meta`). Adapters it gets later are whole
                in every process.
            policy: what its weights are gathered as and its gradients added up as; None: as they lie.
            dtype: of its own weights from now on, an adapter's stay as they are; None: as they lie.
        """
        if is_sharded(network):
            return
        policy = policy or MixedPrecisionPolicy(cast_forward_inputs=False)
        blocks = {id(block) for block in repeated_blocks(network)}
        units = [(path, module) for path, module in network.named_modules() if id(module) in blocks]
        stored = set(network.state_dict())
        for path, unit in [*units, ("", network)]:
            if dtype is not None:
                _cast(unit, dtype, {name.removeprefix(f"{path}.") for name in stored if name.startswith(path)})
            shared = fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
            shared.set_gradient_divide_factor(1.0)  # a sum over the processes: each loss is a part of one
            shared.set_force_sum_reduction_for_comms(True)
        self.lockstep.join(network)
        setattr(network, _MARK, self)

    def copy(
        self,
        network: ModelMixin,
        attention: str,
        dtype: torch.dtype,
        merge: str | None = None,
        policy: MixedPrecisionPolicy | None = None,
        rounded: torch.dtype | None = None,
    ) -> ModelMixin:
        """A shared network's copy without adapters, shared as it is; every process copies its own rows.

        Args:
            network: shared out here.
            attention: the backend it computes attention with.
            dtype: of the copy's weights.
            merge: adapter whose change is added to the weights, in float32.
            policy: as for `add`.
            rounded: dtype that the weights are rounded to on the way to theirs; None: to none.
        """
        plain = outline_of(network)
        set_attention(plain, attention)
        self.add(plain.eval(), policy)
        there = cast(dict[str, DTensor], plain.state_dict())
        changes = _changes(network, merge)
        rows = ((name, _rows(weight, changes.get(name))) for name, weight in weights_of(network))
        found: dict[str, Tensor] = {
            name: sharded_like(of.to(rounded or dtype).to(dtype), there[name]) for name, of in rows
        }
        buffers = {name: b for name, b in network.state_dict().items() if name in there and name not in found}
        plain.load_state_dict(found | buffers, assign=True)
        return plain


def _cast(unit: nn.Module, dtype: torch.dtype, stored: set[str]) -> None:
    """Cast a unit's own weights, and the buffers of `stored` names, just before it is shared out."""
    for name, tensor in [*unit.named_parameters(), *unit.named_buffers()]:
        own = name in stored and not isinstance(tensor, DTensor) and ".lora_" not in name
        if own and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _changes(network: nn.Module, adapter: str | None) -> dict[str, tuple[float, Tensor, Tensor]]:
    """The weights that an adapter changes, by plain name: strength, first and second factor."""
    layers: dict[str, Any] = {path: m for path, m in network.named_modules() if isinstance(m, BaseTunerLayer)}
    return {
        f"{path}.weight": (m.scaling[adapter], m.lora_A[adapter].weight.detach(), m.lora_B[adapter].weight.detach())
        for path, m in layers.items()
        if adapter is not None and adapter in m.lora_A
    }


def _rows(weight: Tensor, change: tuple[float, Tensor, Tensor] | None) -> Tensor:
    """A copy of the rows of a weight that lie here, changed. The second factor's rows are those of the weight."""
    if change is None:
        return local(weight.detach()).clone()
    strength, first, second = change
    return local(weight.detach()).float() + strength * (local(second) @ whole(first))


def mixed_precision(spec: TrainRecipe) -> MixedPrecisionPolicy:
    """How a student's weights travel: gathered in the recipe's precision, gradients added up in float32.

    Inputs keep their dtype: noise levels and places in a picture need more than 8 bits. Matrix products take them
    by autocast.
    """
    low = torch.bfloat16 if spec.precision == "bfloat16" else None
    return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)


def shares_of(network: nn.Module) -> Shares | None:
    """What a network was shared out in; None if it is not."""
    return getattr(network, _MARK, None)


def share_out(
    backbone: Backbone, fields: Iterable[Field], spec: TrainRecipe, name: str, processes: Processes
) -> Shares | None:
    """Share out a base and the fields on it before anything is asked of them, if the recipe's section says so.

    A LoRA that is to train on the base is added first, as a network that is shared takes no further one in. What is
    shared already stays as it is.

    Args:
        backbone: the base; its transformer, on the CPU or on the processes' device, is shared out in place.
        fields: whose own networks are shared out as well.
        spec: what will train.
        name: of the field that will.
        processes: those that train together.

    Returns:
        What they share; None if they do not.
    """
    if not shares(spec, processes):
        return None
    if spec.trainable == "lora" and shares_of(backbone.transformer) is None:
        network = cast(ModelMixin, backbone.transformer)
        add_lora(network, name, spec.lora, backbone.lora_targets, spec.seed)
    return share_frozen(backbone, fields, processes)


def share_frozen(backbone: Backbone, fields: Iterable[Field], processes: Processes) -> Shares:
    """Share out a base, with the adapters on it, and the fields' own networks; what is shared already stays."""
    shared, dtype = shares_of(backbone.transformer), getattr(torch, backbone.settings.dtype)
    shared = shared or Shares.among(processes)
    for network in (backbone.transformer, *(field.network for field in fields)):
        shared.add(network, dtype=dtype)
    return shared
