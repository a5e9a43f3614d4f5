"""How each field of a recipe is drawn when it is measured or shown: its own number of steps, its own guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from danceopd.config.recipe import EvaluateRecipe, Recipe
from danceopd.config.sampling import Sampling
from danceopd.flow.fields import Field
from danceopd.flow.guidance import guided_at


@dataclass(frozen=True)
class Samplings:
    """The recipe's word on each field, and the fields' own.

    Attributes:
        recipe: its `evaluate` and `distill` sections decide (`Recipe.sampling`).
        empty: gives the empty prompt's embedding, (L, D); asked if a field is guided.
        stated: what fields that were students once state of themselves, by name.
    """

    recipe: Recipe
    empty: Callable[[], Tensor]
    stated: Mapping[str, Sampling] = field(default_factory=dict)

    def of(self, name: str) -> Sampling:
        """The sampling of a field: `base`, `student`, or a teacher by its name."""
        return self.recipe.sampling(name, self.stated.get(name))

    def drawn(self, name: str, field: Field) -> tuple[Field, EvaluateRecipe]:
        """A field as it is drawn, guided or not, and the `evaluate` section with its number of steps."""
        sampling = self.of(name)
        spec = self.recipe.evaluate.model_copy(update={"steps": sampling.steps})
        return guided_at(field, sampling.guidance, self.empty), spec
