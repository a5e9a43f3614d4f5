"""Every method by its name in a recipe: those that train, over one loop and the same draws, and the weight merges."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from danceopd.backbones.base import Backbone
from danceopd.config.recipe import DistillRecipe
from danceopd.data.encoded import EncodedRecords
from danceopd.errors import unknown_name
from danceopd.flow.displacement import VELOCITY, SmallSteps
from danceopd.flow.fields import Field
from danceopd.flow.guidance import guide_all
from danceopd.methods.base import Distillation, Method
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


def setup_of(
    spec: DistillRecipe,
    backbone: Backbone,
    encoded: EncodedRecords,
    teachers: Mapping[str, Field],
    teacher_of: dict[str, str],
    empty: Tensor | None = None,
) -> Distillation:
    """All that stays the same from update to update, as a recipe says it.

    Args:
        spec: the recipe's `distill` section.
        backbone: the model family and base.
        encoded: the training records.
        teachers: frozen fields by name.
        teacher_of: task -> teacher's name.
        empty: embedding of the empty prompt, (L, D); default: encoded now, if it is needed.
    """
    way, keep = spec.guidance, None if spec.guidance is None else spec.guidance.keep
    if empty is None and (way is not None or spec.dropout):
        empty = backbone.encode_prompts([""])[0]
    if way is not None and way.absorb is not None:
        assert empty is not None
        teachers = guide_all(teachers, way.absorb, empty, way.batched)
    batched = way is None or way.batched
    known = (target_of(spec), keep, batched, spec.dropout, empty, spec.rollout_stride)
    return Distillation(backbone, encoded, teachers, teacher_of, spec.rollout_steps, *known)


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
