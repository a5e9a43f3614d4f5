"""Weight merges: one network from the teachers' weights, with no training at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from danceopd.backbones.base import Backbone
from danceopd.backbones.lora import plain_copy
from danceopd.errors import UserError
from danceopd.flow.fields import Field, VelocityField

Weights = dict[str, Tensor]


class Rule(Protocol):
    """How several networks' weights become one's."""

    def __call__(self, base: Weights, teachers: list[Weights]) -> Weights:
        """Merge weights of the same names and shapes, all float32."""
        ...


def average(base: Weights, teachers: list[Weights]) -> Weights:
    """The mean of the teachers' weights (model soups, arXiv 2203.05482). The base is not read."""
    return {name: torch.stack([t[name] for t in teachers]).mean(0) for name in base}


@dataclass(frozen=True)
class TaskArithmetic:
    """base + scale * sum of (teacher - base) (arXiv 2212.04089).

    Attributes:
        scale: lambda; the authors advise 0.4 where nothing is held out to choose it by.
    """

    scale: float = 0.4

    def __call__(self, base: Weights, teachers: list[Weights]) -> Weights:
        """See `Rule`."""
        return {name: base[name] + self.scale * sum(t[name] - base[name] for t in teachers) for name in base}


@dataclass(frozen=True)
class Ties:
    """TIES-Merging (arXiv 2306.01708): trim each task vector, elect each weight's sign, mean of those that agree.

    A task vector is teacher - base. Trim: only its `density` largest entries by size, over the whole network, stay.
    Elect: the sign of the sum of the trimmed vectors. Disjoint mean: over the entries that are not 0 and have the
    elected sign. The student is base + scale * that mean.

    Attributes:
        scale: lambda; 1 in the paper where nothing is held out.
        density: share of entries kept, in (0, 1]; 0.2 there.
    """

    scale: float = 1.0
    density: float = 0.2

    def __call__(self, base: Weights, teachers: list[Weights]) -> Weights:
        """See `Rule`."""
        vectors = [self._trim({name: teacher[name] - base[name] for name in base}) for teacher in teachers]
        return {name: base[name] + self.scale * self._agree([v[name] for v in vectors]) for name in base}

    def _trim(self, vector: Weights) -> Weights:
        sizes = torch.cat([part.abs().flatten() for part in vector.values()])
        kept = max(round(self.density * len(sizes)), 1)
        threshold = sizes.kthvalue(len(sizes) - kept + 1).values
        return {name: torch.where(part.abs() >= threshold, part, 0) for name, part in vector.items()}

    def _agree(self, parts: list[Tensor]) -> Tensor:
        stacked = torch.stack(parts)
        agreeing = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
        return (stacked * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


@torch.no_grad()
def merge(backbone: Backbone, teachers: Sequence[Field], rule: Rule) -> VelocityField:
    """The teachers' weights, merged into one frozen field with weights in float32; nothing is trained.

    Every teacher takes part once; a LoRA's change is merged into the base's weights first. The task weights, the start
    and all knobs of training have no say.

    Args:
        backbone: the base.
        teachers: the fields to merge, each once.
        rule: how their weights become one's.

    Raises:
        UserError: if a teacher's weights are not those of the base's architecture.
    """
    network: ModelMixin = plain_copy(backbone.transformer).float()
    base = _weights(network)
    plain = []
    for field in teachers:
        weights = _weights(plain_copy(field.network, merge=field.adapter).to(network.device).float())
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in base.items()}:
            raise UserError(
                f"teacher {field.name!r}: its weights differ in name or shape from the base's; a merge "
                "needs teachers of the base's architecture"
            )
        plain.append(weights)
    for name, weight in rule(base, plain).items():
        network.get_parameter(name).copy_(weight)
    return VelocityField("student", backbone, network.requires_grad_(False).eval())


def _weights(network: nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}
