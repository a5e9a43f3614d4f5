"""Operators on fields: a velocity made of other fields' velocities is a field too, and a teacher like any other.

An operator says at one condition which fields it asks under which conditions, and with which weights it adds their
answers up. The first one is classifier-free guidance (Ho & Salimans, arXiv 2207.12598): a student that matches the
guided field absorbs the guidance and needs one forward pass where sampling with guidance needs two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from danceopd.backbones.base import Backbone, Condition
from danceopd.flow.fields import Field


@dataclass(frozen=True)
class Term:
    """One summand of an operator: `weight` times the velocity of `field` under `condition`."""

    weight: float
    field: Field
    condition: Condition


def _joined(conditions: list[Condition]) -> Condition:
    first = conditions[0]
    sources = [c.source for c in conditions if c.source is not None]
    source = None if first.source is None else torch.cat(sources)
    return replace(first, prompt=torch.cat([c.prompt for c in conditions]), source=source)


def _shape(condition: Condition) -> tuple:
    source = None if condition.source is None else condition.source.shape
    return condition.prompt.shape, source, condition.height, condition.width


class OperatorField(ABC):
    """v(z, sigma, c) = sum of weight_i v_i(z, sigma, c_i). An operator is a subclass that gives the `terms`.

    With `batched`, terms of one field whose conditions have one shape go through it in a single forward pass; without,
    one after the other, which needs less memory and gives the same numbers. The sum is made in float32: guidance
    multiplies the rounding of a 16-bit difference.
    """

    batched: bool

    @abstractmethod
    def terms(self, condition: Condition) -> list[Term]:
        """The summands at a condition, in any order."""

    def __call__(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity at `z` (B, N, C), `sigma` (B,): (B, N, C), float32."""
        calls: dict[Hashable, list[Term]] = {}
        for number, term in enumerate(self.terms(condition)):
            key = (term.field.identity, _shape(term.condition)) if self.batched else number
            calls.setdefault(key, []).append(term)
        velocity = torch.zeros(z.shape, dtype=torch.float32, device=z.device)
        for terms in calls.values():
            count = len(terms)
            joined = terms[0].condition if count == 1 else _joined([term.condition for term in terms])
            answers = terms[0].field(z.repeat(count, 1, 1), sigma.repeat(count), joined)
            for term, answer in zip(terms, answers.float().chunk(count), strict=True):
                velocity = velocity + term.weight * answer
        return velocity


@dataclass(frozen=True)
class GuidedField(OperatorField):
    """Classifier-free guidance as a field: v_empty + scale (v_cond - v_empty). A source image stays on both sides.

    Attributes:
        field: the field that is guided; name and weights are its own.
        scale: 1 is the field itself; more goes further the prompt's way.
        empty: embedding of the empty prompt, (L, D).
        batched: both sides in one forward pass of twice the batch.
    """

    field: Field
    scale: float
    empty: Tensor
    batched: bool = True

    @property
    def name(self) -> str:
        """The guided field's own."""
        return self.field.name

    @property
    def backbone(self) -> Backbone:
        """The guided field's own."""
        return self.field.backbone

    @property
    def network(self) -> nn.Module:
        """The guided field's own."""
        return self.field.network

    @property
    def adapter(self) -> str | None:
        """The guided field's own."""
        return self.field.adapter

    @property
    def forwards(self) -> int:
        """Network passes one velocity of one sample takes, batched or not."""
        return 2 * self.field.forwards

    @property
    def identity(self) -> Hashable:
        """Equal for two fields that are the same function."""
        return self.field.identity, "guidance", self.scale

    def resident(self) -> AbstractContextManager[None]:
        """Keep offloaded weights on the device for a block of several calls."""
        return self.field.resident()

    def __call__(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity at `z` (B, N, C), `sigma` (B,): (B, N, C), float32."""
        with self.resident():  # two passes, one visit to the device
            return super().__call__(z, sigma, condition)

    def terms(self, condition: Condition) -> list[Term]:
        """The unconditional side with weight 1 - scale, the conditional one with weight scale."""
        without = self.backbone.without_prompt(condition, self.empty)
        return [Term(1 - self.scale, self.field, without), Term(self.scale, self.field, condition)]
