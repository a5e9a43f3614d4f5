"""Every method by its name in a recipe: those that train, over one loop and the same draws, and the weight merges."""

from __future__ import annotations

from collections.abc import Callable

from danceopd.config.recipe import DistillRecipe
from danceopd.errors import unknown_name
from danceopd.flow.displacement import VELOCITY, SmallSteps
from danceopd.methods.base import Method
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.dense import Dense
from danceopd.methods.diffusion_opd import DiffusionOPD
from danceopd.methods.flow_opd import FlowOPD
from danceopd.methods.joint import Joint
from danceopd.methods.merges import Rule, TaskArithmetic, Ties, average
from danceopd.methods.off_policy import OffPolicy
from danceopd.methods.soft import SoftRouting

TRAINED: dict[str, Callable[[DistillRecipe], Method]] = {
    "danceopd": lambda spec: DanceOPD(),
    "off_policy": lambda spec: OffPolicy(),
    "soft": lambda spec: SoftRouting(),
    "dense": lambda spec: Dense(spec.queries or 8),
    "diffusion_opd": lambda spec: DiffusionOPD(),
    "flow_opd": lambda spec: FlowOPD(),
    "joint": lambda spec: Joint(),
}
MERGED: dict[str, Callable[[DistillRecipe], Rule]] = {
    "merge_average": lambda spec: average,
    "merge_task_arithmetic": lambda spec: TaskArithmetic(**_given(scale=spec.merge_scale)),
    "merge_ties": lambda spec: Ties(**_given(scale=spec.merge_scale, density=spec.merge_density)),
}


def _given(**knobs: float | None) -> dict[str, float]:
    """Those knobs that the recipe sets; the others keep their published defaults."""
    return {name: value for name, value in knobs.items() if value is not None}


def method_of(spec: DistillRecipe) -> Method:
    """The method that a recipe's `distill.method` names.

    Raises:
        UserError: if it is none that trains.
    """
    if spec.method not in TRAINED:
        raise unknown_name("method that trains", spec.method, TRAINED)
    return TRAINED[spec.method](spec)


def target_of(spec: DistillRecipe) -> SmallSteps:
    """How a recipe's teachers are asked: for a velocity, or by small steps for a displacement."""
    if spec.target == "velocity":
        return VELOCITY
    return SmallSteps(spec.target_steps or 4, spec.target_solver or "euler")


def merge_rule_of(spec: DistillRecipe) -> Rule:
    """The rule of the weight merge that a recipe's `distill.method` names.

    Raises:
        UserError: if it is no merge.
    """
    if spec.method not in MERGED:
        raise unknown_name("weight merge", spec.method, MERGED)
    return MERGED[spec.method](spec)


def needs_targets(spec: DistillRecipe) -> bool:
    """Whether a recipe's method trains on target images; a merge trains on nothing."""
    return spec.method in TRAINED and method_of(spec).needs_targets
