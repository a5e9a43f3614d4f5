"""Operators on fields: a velocity made of other fields' velocities is a field too, and a teacher like any other.

An operator says at one condition which fields it asks under which conditions, and with which weights it adds their
answers up. The first one is classifier-free guidance (Ho & Salimans, arXiv 2207.12598): a student that matches the
guided field absorbs the guidance and needs one forward pass where sampling with guidance needs two; one that matches
each of its sides keeps the scale as a knob.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
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

    def answers(self, z: Tensor, sigma: Tensor, condition: Condition) -> list[Tensor]:
        """What each of the terms says at `z` (B, N, C), `sigma` (B,): (B, N, C) each, float32, in the terms' order."""
        terms = self.terms(condition)
        calls: dict[Hashable, list[int]] = {}
        for number, term in enumerate(terms):
            key = (term.field.identity, _shape(term.condition)) if self.batched else number
            calls.setdefault(key, []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in calls.values():
            count, first = len(numbers), terms[numbers[0]]
            joined = first.condition if count == 1 else _joined([terms[number].condition for number in numbers])
            velocity = first.field(z.repeat(count, 1, 1), sigma.repeat(count), joined)
            found |= dict(zip(numbers, velocity.float().chunk(count), strict=True))
        return [found[number] for number in range(len(terms))]

    def __call__(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity at `z` (B, N, C), `sigma` (B,): (B, N, C), float32."""
        weights = [term.weight for term in self.terms(condition)]
        velocity = torch.zeros(z.shape, dtype=torch.float32, device=z.device)
        for weight, answer in zip(weights, self.answers(z, sigma, condition), strict=True):
            velocity = velocity + weight * answer
        return velocity


@dataclass(frozen=True)
class GuidedField(OperatorField):
    """Classifier-free guidance as a field: v_empty + scale (v_cond - v_empty). A source image stays on both sides.

    Where a family's own pipeline does more than that (Qwen-Image rescales), so does this: `Backbone.guide`.

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
        return self.backbone.guide(*self.sides(z, sigma, condition), self.scale)

    def sides(self, z: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The velocities under the empty prompt and under the prompt, (B, N, C) each, float32."""
        with self.resident():  # two passes, one visit to the device
            without, prompted = self.answers(z, sigma, condition)
        return without, prompted

    def terms(self, condition: Condition) -> list[Term]:
        """The unconditional side with weight 1 - scale, the conditional one with weight scale."""
        without = self.backbone.without_prompt(condition, self.empty)
        return [Term(1 - self.scale, self.field, without), Term(self.scale, self.field, condition)]


@dataclass(frozen=True)
class Branch:
    """One side of a guided field. Where a path is followed, it is the guided field's; what is said is this side's.

    A student that keeps both sides learns each of them at the states that guidance leads to. Over an interval the means
    of the two sides, taken along one guided path, make the guided field's own mean velocity at that scale, as far as
    guidance is linear in them.

    Attributes:
        guided: the field that is followed.
        empty: whether the side is the empty prompt's.
    """

    guided: GuidedField
    empty: bool

    @property
    def forwards(self) -> int:
        """Network passes of this side alone."""
        return self.guided.field.forwards

    def alone(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """This side's velocity, (B, N, C)."""
        if self.empty:
            condition = self.guided.backbone.without_prompt(condition, self.guided.empty)
        return self.guided.field(z, sigma, condition)

    def both(self, z: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """This side's velocity and the guided one, (B, N, C) each, float32."""
        sides = self.guided.sides(z, sigma, condition)
        return sides[0 if self.empty else 1], self.guided.backbone.guide(*sides, self.guided.scale)

    def resident(self) -> AbstractContextManager[None]:
        """Keep offloaded weights on the device for a block of several calls."""
        return self.guided.resident()


def plain_field(field: Field) -> Field:
    """A field without its guidance."""
    return field.field if isinstance(field, GuidedField) else field


def guided_at(field: Field, scale: float, empty: Callable[[], Tensor]) -> Field:
    """A field at a scale, which goes before its own; 1: without guidance.

    Args:
        field: guided or not.
        scale: of the guidance.
        empty: gives the empty prompt's embedding (L, D), asked if the field is not at that scale already.
    """
    if isinstance(field, GuidedField) and field.scale == scale:
        return field
    plain = plain_field(field)
    return plain if scale == 1 else GuidedField(plain, scale, empty())


def guide_all(fields: Mapping[str, Field], scale: float, empty: Tensor, batched: bool = True) -> dict[str, Field]:
    """Fields guided at a scale; those that are guided already keep their own."""
    return {
        name: field if isinstance(field, GuidedField) else GuidedField(field, scale, empty, batched)
        for name, field in fields.items()
    }


def drop_prompts(backbone: Backbone, condition: Condition, empty: Tensor, dropped: Tensor) -> Condition:
    """The conditions with the empty prompt, whose embedding is `empty` (L, D), where `dropped` (B,) says so."""
    if not bool(dropped.any()):
        return condition
    without = backbone.without_prompt(condition, empty.to(condition.prompt))
    prompt = torch.where(dropped.to(condition.prompt.device)[:, None, None], without.prompt, condition.prompt)
    return replace(condition, prompt=prompt)
