"""What a study compares: one pydantic model, and the YAML files of it (`danceopd/studies/*.yaml`, or anyone's)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from danceopd.config.load import apply_overrides, load_recipe, say_invalid
from danceopd.config.parts import Name, Part
from danceopd.config.recipe import Recipe
from danceopd.config.shipped import read_settings
from danceopd.errors import UserError

STUDIES = "danceopd.studies"  # the package of those that ship
# What the study itself decides, cell by cell.
OWN = ("seed", "distill.steps", "distill.seed", "evaluate.split", "evaluate.per_task")


class Budget(Part):
    """What every cell may spend on training: as many updates, or as many transformer forwards.

    A backward pass counts as two forwards, a teacher's pass as one.
    """

    steps: int | None = Field(None, gt=0)
    forwards: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.steps is None) == (self.forwards is None):
            raise ValueError("give exactly one of 'steps' and 'forwards'")
        return self

    def __str__(self) -> str:
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.forwards:,} forwards"


class Variant(Part):
    """One row of the table: overrides of the recipe's `distill` section."""

    set: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _of_distillation(self) -> Self:
        for setting in self.set:
            if not setting.startswith("distill."):
                raise ValueError(
                    f"{setting!r}: a variant sets distill.* only; what all share belongs in the study's 'set'"
                )
        return self


class Study(Part):
    """A matrix of variants and seeds over one recipe, base and data, with one set of teachers or one per seed."""

    name: Name
    recipe: str = Field(description="name of a shipped recipe, or a YAML file")
    set: tuple[str, ...] = Field((), description="recipe overrides for every cell")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    teachers: Literal["once", "each_seed"] = Field(
        "once", description="made once for all seeds, or anew with every seed: intervals then hold their scatter, too"
    )
    budget: Budget
    variants: dict[Name, Variant] = Field(min_length=1)
    split: Literal["val", "test"] = Field("val", description="held-out records to score on")
    records: int = Field(gt=0, description="of them, at most this many per task")
    at_steps: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="numbers of sampling steps at which base, teachers and students are scored besides their own"
    )

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for name, values in (("seeds", self.seeds), ("at_steps", self.at_steps)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} {list(values)}: one is there twice")
        for setting in (*self.set, *(s for variant in self.variants.values() for s in variant.set)):
            if setting.partition("=")[0] in OWN:
                raise ValueError(f"{setting!r}: the study itself sets this, by 'budget', 'seeds', 'split', 'records'")
        return self

    def recipe_of(self, variant: str, seed: int, steps: int) -> Recipe:
        """The recipe of one cell.

        Raises:
            UserError: if it is not a valid recipe, or one that no budget holds for.
        """
        own = (
            *((f"seed={seed}",) if self.teachers == "each_seed" else ()),
            f"distill.steps={steps}",
            f"distill.seed={seed}",
            f"evaluate.split={self.split}",
            f"evaluate.per_task={self.records}",
        )
        try:
            recipe = load_recipe(self.recipe, (*self.set, *self.variants[variant].set, *own))
        except UserError as error:
            raise UserError(f"study {self.name}, variant {variant}: {error}") from error
        if recipe.distill.select is not None:
            raise UserError(
                f"study {self.name}, variant {variant}: distill.select ends or picks by validation, and a "
                "study compares whole budgets; add distill.select=null to 'set'"
            )
        return recipe


def load_study(name_or_path: str, overrides: Sequence[str] = ()) -> Study:
    """Load a study by the name of a shipped one or from a YAML file, then apply `key.sub=value` overrides.

    Raises:
        UserError: if it cannot be found or read, or it or one of its recipes does not fit the models.
    """
    data, where = read_settings("study", STUDIES, name_or_path), f"study {name_or_path}"
    try:
        study = Study.model_validate(apply_overrides(data, overrides))
    except ValidationError as error:
        raise say_invalid(error, Study, where) from error
    for variant in study.variants:
        study.recipe_of(variant, study.seeds[0], 1)
    return study


def steps_within(budget: Budget, forwards_per_sample: float, batch: int) -> int:
    """The updates that a budget pays for.

    Raises:
        UserError: if it does not pay for one.
    """
    if budget.steps is not None:
        return budget.steps
    if forwards_per_sample == 0:
        return 1  # nothing is trained, and a recipe wants a number
    update = forwards_per_sample * batch
    assert budget.forwards is not None  # a budget has one of the two
    if budget.forwards < update:
        raise UserError(f"budget.forwards {budget.forwards}: one update of batch {batch} takes {update:.0f} forwards")
    return round(budget.forwards / update)
