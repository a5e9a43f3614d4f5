"""The displacement as target: what it is with one step, what it costs, where it is asked, and what a student gains."""

from __future__ import annotations

import pytest
import torch

from danceopd.flow.displacement import SmallSteps
from danceopd.flow.guidance import GuidedField
from danceopd.flow.rollout import roll_out
from danceopd.flow.sampling import seeded_noise
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.dense import Dense
from danceopd.methods.off_policy import OffPolicy
from danceopd.methods.queries import BY_STEP, NAMED, QueryWindow, query_window
from danceopd.methods.routing import Answer, routed_velocity
from danceopd.methods.table import target_of


@pytest.mark.parametrize("method", [DanceOPD(), OffPolicy(), Dense(2)])
def test_with_one_euler_step_it_is_the_velocity_to_the_bit(bench, method, monkeypatch):
    one = bench.gradient(method, bench.setup(target=SmallSteps(1)))

    def asked(setup, group, state, stop):
        sigma = group.grid[stop].to(state)
        routes = setup.routes(group.tags)
        return Answer(routed_velocity(setup.teachers, routes, state, sigma, group.condition), len(routes))

    monkeypatch.setattr("danceopd.methods.base.Distillation.ask", asked)
    other = bench.gradient(method)
    assert one.norm() > 0
    assert torch.equal(one, other)


@pytest.mark.parametrize("how", [SmallSteps(4), SmallSteps(2, "heun")])
@pytest.mark.parametrize("method", [DanceOPD(), OffPolicy(), Dense(2)])
def test_its_forwards_are_counted_also_with_a_guided_teacher(bench, how, method):
    guided = GuidedField(bench.teachers["base"], 3.0, bench.base.encode_prompts([""])[0])
    setup, learner = bench.setup(2, target=how, teachers=bench.teachers | {"base": guided}), bench.learner()
    groups = bench.groups(setup, method, learner)
    with bench.counted() as passed:
        figures = bench.update(method, groups, setup, learner)
    passes = len(figures.losses["t2i"]) // 2
    assert figures.forwards == sum(passed) + 2 * 6 * passes  # a backward pass is two
    asked = sum(
        int(how.asked(g.levels[stop])) * (2 if tag == "t2i" else 1)
        for g in groups
        for row, tag in zip(g.stop, g.tags, strict=True)
        for stop in row[:, None]
    )
    rollout = 0 if isinstance(method, OffPolicy) else sum(int(g.stop[:, -1].sum()) for g in groups)
    assert figures.forwards == rollout + asked + 3 * 6 * passes
    for field in bench.teachers.values():
        assert all(p.grad is None for p in field.network.parameters())


def test_each_sample_asks_its_own_teacher_from_its_own_state(bench):
    how = SmallSteps(3)
    setup, learner = bench.setup(4, target=how), bench.learner()
    for group in bench.groups(setup, DanceOPD(), learner):
        stop = group.stop[:, 0]
        query = roll_out(learner.field, group.noise, group.grid, stop, group.condition)
        answer = setup.ask(group, query.state, stop)
        for row, route in enumerate(setup.routes(group.tags)):
            one = torch.tensor([row])
            state, condition = query.state[one], group.condition.rows(one)
            for here, there in zip(group.levels[stop[row]], group.levels[stop[row], 1:], strict=False):
                with torch.no_grad():
                    state = state + (there - here) * bench.teachers[route](state, here[None], condition)
            width = group.grid[stop[row] + 1] - group.grid[stop[row]]
            found = answer.velocity[one]
            torch.testing.assert_close(found, (state - query.state[one]) / width, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_paths_last_interval_is_asked_about(bench, steps):
    grid = bench.base.sigmas(steps, 64, 64)
    for window in ("uniform", "low_noise", "late_steps", "every_step"):
        assert window in NAMED or window in BY_STEP
        drawn = query_window(window).draw(2000, grid, torch.Generator().manual_seed(0))
        assert int(drawn.max()) == steps - 1
    last = QueryWindow(1.0, 1.0, 0.0, 0.01)
    for how in (SmallSteps(2), SmallSteps(2, "heun")):
        setup, learner = bench.setup(steps, target=how), bench.learner()
        groups = bench.groups(setup, DanceOPD(), learner, window=last)
        assert all(int(stop) == steps - 1 for group in groups for stop in group.stop)
        figures = bench.update(DanceOPD(), groups, setup, learner)
        assert all(torch.tensor(values).isfinite().all() for values in figures.losses.values())


def test_a_recipe_says_how_it_is_taken(bench):
    assert target_of(bench.spec()) == SmallSteps(1)
    assert target_of(bench.spec(target="displacement")) == SmallSteps(4)
    changed = bench.spec(target="displacement", target_steps=2, target_solver="heun")
    assert target_of(changed) == SmallSteps(2, "heun")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_steps": 4}, "target_steps is for target: displacement, and target is velocity; remove it"),
        ({"target": "displacement", "method": "soft"}, "target: displacement is for method danceopd or dense or off_p"),
        ({"target": "displacement", "target_steps": 0}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(bench, changes, told):
    with pytest.raises(ValueError, match=told):
        bench.spec(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_student_in_two_steps_comes_nearer_to_its_teachers_picture_than_the_teacher_in_two(bench, trainable):
    """The teacher's picture is that of 16 steps; windows are scheduled. A student of velocities gains little."""
    schedule = [{"until": 0.3, "window": "early_steps"}, {"until": 1.0, "window": "every_step"}]
    common = {"rollout_steps": 2, "steps": 30, "batch": 12, "optimizer": "muon", "lr": 0.02, "window": schedule}
    if trainable == "lora":
        common |= {"trainable": "lora", "lora": {"rank": 8, "alpha": 16}, "lr": 0.05}
    rows = bench.encoded.rows_by_task()["local_edit"]
    condition = bench.encoded.condition(rows)
    noise = seeded_noise(list(range(len(rows))), bench.base.latent_shape(64, 64))

    def drawn(field, steps):
        stop = torch.full((len(rows),), steps)
        return roll_out(field, noise, bench.base.sigmas(steps, 64, 64), stop, condition).state

    def off(field):
        return float((drawn(field, 2) - wanted).norm())

    teacher = bench.teachers["editor"]
    wanted = drawn(teacher, 16)
    student, _ = bench.distill(**common, target="displacement")
    assert off(student) < 0.6 * min(off(teacher), off(bench.teachers["base"]))
    if trainable == "full":
        plain, _ = bench.distill(**common)
        assert off(student) < 0.6 * off(plain)
