"""Whether a recipe's student can be drawn well as the recipe says: guidance, and the steps of a few-step student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from danceopd.backbones.base import Backbone
from danceopd.backbones.bases import SHIPPED
from danceopd.config.recipe import Recipe
from danceopd.config.sampling import Sampling
from danceopd.methods.queries import query_window
from danceopd.preflight.findings import Finding

DRAWS = 4000
RARE = 0.2  # of an even share of the queries


def check_sampling(recipe: Recipe, backbone: Backbone) -> list[Finding]:
    """All that a recipe and its base's configuration tell."""
    return check_guidance(recipe, backbone.distilled) + check_steps(recipe, backbone)


def check_guidance(recipe: Recipe, distilled: bool | None) -> list[Finding]:
    """An undistilled base that nothing guides, and tasks that lack the guidance which others have.

    Args:
        recipe: the run.
        distilled: whether the base draws without guidance by its own configuration; None: that does not tell.
    """
    if recipe.model.base in SHIPPED or distilled:
        return []
    guided = [name for name, teacher in recipe.teachers.items() if teacher.guidance is not None]
    if recipe.distill.guidance is None and recipe.evaluate.guidance is None and not guided:
        which = "is undistilled, and" if distilled is False else "may be undistilled, and then"
        text = (
            f"base {recipe.model.base!r} {which} needs guidance, which this recipe does not have: rollouts, teachers "
            "and pictures will be poor. Set distill.guidance to {keep: 4} or {absorb: 4} (docs/guidance.md)"
        )
        return [Finding("warning", "guidance", text)]
    plain = [task for task, spec in recipe.tasks.items() if spec.teacher not in guided]
    if guided and plain and recipe.distill.guidance is None:
        text = (
            f"task(s) {', '.join(plain)}: taught without guidance, while other tasks' teachers are guided and the "
            "student is drawn without; set distill.guidance.absorb for the rest, if this base needs guidance"
        )
        return [Finding("warning", "guidance", text)]
    return []


def check_steps(recipe: Recipe, backbone: Backbone) -> list[Finding]:
    """Steps of a few-step student that its query windows hardly ever ask about."""
    spec = recipe.distill
    if spec.target != "displacement":
        return []
    grid = backbone.sigmas(spec.rollout_steps, recipe.model.height, recipe.model.width)
    shares, before = torch.zeros(spec.rollout_steps), 0.0
    for phase in spec.phases:
        drawn = query_window(phase.window).draw(DRAWS, grid, torch.Generator().manual_seed(0))
        counts = torch.bincount(drawn, minlength=spec.rollout_steps)
        shares += (phase.until - before) * counts / DRAWS
        before = phase.until
    rare = [step for step, share in enumerate(shares.tolist()) if share < RARE / spec.rollout_steps]
    if not rare:
        return []
    steps = ", ".join(f"{step + 1} (sigma {grid[step]:.2g}: {100 * shares[step]:.1f} %)" for step in rare)
    text = (
        f"distill.window hardly asks about step(s) {steps} of the student's {spec.rollout_steps}, which it will draw "
        "with all the same; take window: every_step"
    )
    return [Finding("warning", "steps", text)]


def check_few_step_teachers(recipe: Recipe, facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Teachers that were made for their own number of steps: on another grid their velocities mean something else.

    Args:
        recipe: the run.
        facts: of the teachers' products, by name.
    """
    spec, found = recipe.distill, []
    for name, of in facts.items():
        stated = Sampling.model_validate(of["sampling"]) if "sampling" in of else Sampling()
        small = (spec.target_steps or 4) if spec.target == "displacement" else 1
        if stated.fixed and (spec.rollout_steps != stated.steps or small > 1):
            text = (
                f"teacher {name!r} is made for {stated.steps} steps alone, and is asked on a grid of "
                f"{spec.rollout_steps}{f' x {small}' if small > 1 else ''}; "
                f"set distill.rollout_steps: {stated.steps} and target: velocity"
            )
            found.append(Finding("warning", "steps", text))
    return found
