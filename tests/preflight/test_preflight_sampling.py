"""What the preflight says of guidance and of the steps of a few-step student."""

from __future__ import annotations

import pytest

from danceopd.config.load import load_recipe
from danceopd.preflight.outlook import look_ahead
from danceopd.preflight.sampling import check_few_step_teachers, check_guidance, check_sampling

STRONG = "teachers.strong={kind: base, guidance: 3}"


def recipe(base, *settings):
    return load_recipe("world", [f"model.base={base}", *settings])


def test_an_undistilled_base_without_guidance_is_told(tiny_base, tmp_path):
    [found] = look_ahead(recipe(tiny_base), tmp_path).findings
    assert found.level == "warning"
    assert "is undistilled, and needs guidance, which this recipe does not have" in found.message


@pytest.mark.parametrize(
    "setting", ["distill.guidance={keep: 3}", "distill.guidance={absorb: 3}", "evaluate.guidance=3"]
)
def test_with_guidance_it_is_not_and_neither_is_the_small_world(tiny_base, backbone, setting):
    assert check_sampling(recipe(tiny_base, setting), backbone) == []
    assert check_sampling(load_recipe("world"), backbone) == []  # made without guidance


def test_what_a_base_does_not_say_of_itself_is_put_so(tiny_base):
    [found] = check_guidance(recipe(tiny_base), None)
    assert "may be undistilled, and then needs guidance" in found.message
    assert check_guidance(recipe(tiny_base), True) == []


def test_tasks_without_the_guidance_that_others_have_are_named(tiny_base):
    partly = [STRONG, "tasks.t2i.teacher=strong"]
    [found] = check_guidance(recipe(tiny_base, *partly), False)
    assert found.message.startswith("task(s) local_edit, global_style: taught without guidance")
    assert check_guidance(recipe(tiny_base, *partly, "distill.guidance={absorb: 3}"), False) == []


def test_steps_that_a_window_hardly_asks_about_are_named(backbone):
    few = ["distill.target=displacement", "distill.rollout_steps=4"]
    [found] = check_sampling(load_recipe("world", [*few, "distill.window=semantic"]), backbone)
    assert "hardly asks about step(s) 4 (sigma" in found.message
    assert check_sampling(load_recipe("world", [*few, "distill.window=every_step"]), backbone) == []
    half = "distill.window=[{until: 0.5, window: semantic}, {until: 1, window: every_step}]"
    assert check_sampling(load_recipe("world", [*few, half]), backbone) == []
    assert check_sampling(load_recipe("world", ["distill.window=semantic"]), backbone) == []


def test_a_few_step_teacher_asked_on_another_grid_is_named():
    facts = {"held": {"sampling": {"steps": 4, "guidance": 1.0, "fixed": True}}, "base": {}}
    [found] = check_few_step_teachers(load_recipe("world"), facts)
    assert found.message.startswith(
        "teacher 'held' is made for 4 steps alone, and is asked on a grid of 8; set distill.r"
    )
    assert check_few_step_teachers(load_recipe("world", ["distill.rollout_steps=4"]), facts) == []
