"""What DanceOPD is compared with, over the same loop, batches and draws (`danceopd.distill`)."""

from __future__ import annotations

from collections.abc import Callable

from danceopd.baselines.dense import Dense
from danceopd.baselines.diffusion_opd import DiffusionOPD
from danceopd.baselines.flow_opd import FlowOPD
from danceopd.baselines.joint import Joint
from danceopd.baselines.merges import Merge, TaskArithmetic, Ties, average
from danceopd.baselines.off_policy import OffPolicy
from danceopd.baselines.soft import SoftRouting
from danceopd.distill import Method
from danceopd.recipe import DistillRecipe


def _given(**knobs: float | None) -> dict[str, float]:
    """Those knobs that the recipe sets; the others keep their published defaults."""
    return {name: value for name, value in knobs.items() if value is not None}


BASELINES: dict[str, Callable[[DistillRecipe], Method | Merge]] = {
    "off_policy": lambda spec: OffPolicy(),
    "soft": lambda spec: SoftRouting(),
    "dense": lambda spec: Dense(spec.queries or 8),
    "diffusion_opd": lambda spec: DiffusionOPD(),
    "flow_opd": lambda spec: FlowOPD(),
    "joint": lambda spec: Joint(),
    "merge_average": lambda spec: Merge(average),
    "merge_task_arithmetic": lambda spec: Merge(TaskArithmetic(**_given(scale=spec.merge_scale))),
    "merge_ties": lambda spec: Merge(Ties(**_given(scale=spec.merge_scale, density=spec.merge_density))),
}
