"""Guidance kept or absorbed: whose side each sample learns, on whose path, at what price, and what comes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from danceopd.distill import distill
from danceopd.flow.displacement import VELOCITY, SmallSteps
from danceopd.flow.guidance import GuidedField, drop_prompts, guide_all
from danceopd.flow.rollout import roll_out
from danceopd.flow.sampling import seeded_noise
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.dense import Dense
from danceopd.methods.joint import Joint
from danceopd.methods.off_policy import OffPolicy
from danceopd.methods.soft import SoftRouting

SCALE = 4.0
ASKING = [DanceOPD(), OffPolicy(), SoftRouting(), Dense(2)]


@pytest.fixture
def empty(bench):
    return bench.base.encode_prompts([""])[0]


def kept(bench, empty, **changes):
    return bench.setup(**({"guidance": SCALE, "prompt_dropout": 0.5, "empty": empty} | changes))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("how", [VELOCITY, SmallSteps(3), SmallSteps(2, "heun")])
@pytest.mark.parametrize("method", ASKING)
def test_forwards_of_kept_guidance_are_counted(bench, empty, method, how, batched):
    if isinstance(method, SoftRouting):
        how = VELOCITY
    setup, learner = kept(bench, empty, target=how, batched=batched), bench.learner()
    groups = bench.groups(setup, method, learner)
    assert {bool(d) for g in groups for d in g.dropped} == {True, False}
    with bench.counted() as passed:
        figures = bench.update(method, groups, setup, learner)
    learned = len(figures.losses["t2i"]) // 2
    assert figures.forwards == sum(passed) + 2 * 6 * learned  # a backward pass is two


def test_a_rollout_follows_the_students_own_guided_field_at_two_forwards(bench, empty):
    setup, learner = kept(bench, empty), bench.learner()
    [group] = bench.groups(setup, DanceOPD(), learner, tasks=("local_edit",))
    group.stop[:] = 2
    guided = GuidedField(learner.field, SCALE, empty)
    expected = roll_out(guided, group.noise, group.grid, group.stop[:, 0], group.condition)
    plain = roll_out(learner.field, group.noise, group.grid, group.stop[:, 0], group.condition)
    found = roll_out(setup.path(learner.field), group.noise, group.grid, group.stop[:, 0], group.condition)
    assert torch.equal(found.state, expected.state)
    assert not torch.allclose(found.state, plain.state, atol=1e-4)
    assert (plain.forwards, found.forwards) == (4, 8)


@pytest.mark.parametrize("keeps", [True, False])
@torch.no_grad()
def test_a_dropped_prompt_asks_the_teachers_empty_side_and_the_rest_the_prompted_one(bench, empty, keeps):
    editor = bench.teachers["editor"]
    teachers = bench.teachers if keeps else guide_all(bench.teachers, SCALE, empty)
    setup = kept(bench, empty, guidance=SCALE if keeps else None, teachers=teachers)
    learner = bench.learner()
    [group] = bench.groups(setup, DanceOPD(), learner, tasks=("local_edit",))
    dropped = torch.tensor([True, False])
    trained = drop_prompts(bench.base, group.condition, empty, dropped)
    group = replace(group, dropped=dropped, trained=trained)
    stop, state = group.stop[:, 0], group.noise
    answer = setup.ask(group, state, stop)
    sigma = group.grid[stop]
    bare = bench.base.without_prompt(group.condition, empty)
    for row, dropped in enumerate(group.dropped.tolist()):
        field = editor if keeps or dropped else GuidedField(editor, SCALE, empty)
        one = torch.tensor([row])
        expected = field(state[one], sigma[one], (bare if dropped else group.condition).rows(one))
        torch.testing.assert_close(answer.velocity[one], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(group.trained.rows(one).prompt, (bare if dropped else group.condition).rows(one).prompt)
    assert answer.forwards == (2 if keeps else 3)  # the empty side of a guided teacher is one pass


@pytest.mark.parametrize("how", [SmallSteps(4), SmallSteps(2, "heun")])
@torch.no_grad()
def test_the_two_sides_means_make_the_guided_fields_displacement(bench, empty, how):
    """At the kept scale the student's guided step is the guided teacher's many."""
    setup, learner = kept(bench, empty, target=how), bench.learner()
    [group] = bench.groups(setup, DanceOPD(), learner, tasks=("local_edit",))
    group, stop = replace(group, trained=group.condition), group.stop[:, 0]
    sides = [setup.ask(replace(group, dropped=torch.full((2,), d)), group.noise, stop).velocity for d in (True, False)]
    guided = guide_all(bench.teachers, SCALE, empty)
    other = bench.setup(target=how, teachers=guided)
    whole = other.ask(replace(group, dropped=torch.zeros(2, dtype=torch.bool)), group.noise, stop).velocity
    torch.testing.assert_close(sides[0] + SCALE * (sides[1] - sides[0]), whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", [*ASKING, Joint()])
def test_no_prompt_is_dropped_and_nothing_more_is_drawn_unless_it_is_asked_for(bench, empty, method):
    one = bench.gradient(method)
    assert torch.equal(one, bench.gradient(method, bench.setup(empty=empty)))
    other = bench.gradient(method, bench.setup(empty=empty, prompt_dropout=0.9))
    assert not torch.allclose(one, other, rtol=0.05)


def test_prompts_are_dropped_by_their_share_whatever_the_processes(bench, empty):
    setup, learner = kept(bench, empty, prompt_dropout=0.25), bench.learner()
    whole = bench.groups(setup, DanceOPD(), learner, seed=3)
    parts = bench.groups(setup, DanceOPD(), learner, seed=3, parts=2)
    by_row = {row: bool(d) for g in whole for row, d in zip(g.rows, g.dropped, strict=True)}
    assert by_row == {row: bool(d) for g in parts for row, d in zip(g.rows, g.dropped, strict=True)}
    condition = bench.encoded.condition(bench.encoded.rows_by_task()["t2i"])
    assert drop_prompts(bench.base, condition, empty, torch.zeros(12, dtype=torch.bool)) is condition


def test_the_share_is_a_tenth_where_guidance_is_kept_and_none_elsewhere(bench):
    assert bench.spec().dropout == 0
    assert bench.spec(guidance={"keep": 3}).dropout == 0.1
    assert bench.spec(guidance={"absorb": 3}).dropout == 0
    assert bench.spec(guidance={"keep": 3}, prompt_dropout=0.3).dropout == 0.3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guidance": {"keep": 3, "absorb": 3}}, "give exactly one of 'keep' and 'absorb', with the scale"),
        ({"guidance": {}}, "give exactly one of 'keep' and 'absorb', with the scale"),
        ({"guidance": {"keep": 1}}, "greater than 1"),
        ({"guidance": {"keep": 3}, "method": "flow_opd"}, "guidance.keep is for method danceopd or off_policy or soft"),
        ({"guidance": {"absorb": 3}, "method": "joint"}, "guidance.absorb: method joint asks no teacher's field"),
        ({"prompt_dropout": 0.1, "method": "diffusion_opd"}, "prompt_dropout is for method danceopd or"),
    ],
)
def test_what_does_not_fit_is_refused(bench, changes, told):
    with pytest.raises(ValueError, match=told):
        bench.spec(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["keep", "absorb"])
@pytest.mark.parametrize(("target", "steps", "fine"), [("velocity", 3, 3), ("displacement", 2, 8)])
def test_a_student_draws_what_its_guided_teacher_draws(bench, empty, way, target, steps, fine):
    """At its stated forwards: kept, with guidance; absorbed, without, at half of them.

    As a displacement both draw in two steps what the guided teacher draws in eight, which it does not itself in two.
    """
    with torch.no_grad():  # a random network hardly listens to its prompt
        for name, weight in bench.base.transformer.named_parameters():
            if "to_out" in name or "linear_out" in name or "context_embedder" in name:
                weight.mul_(3 if "context" in name else 10)
    encoded = bench.encoded.subset(bench.encoded.rows_by_task()["t2i"])
    condition = encoded.condition(list(range(12)))
    noise = seeded_noise(list(range(12)), bench.base.latent_shape(64, 64))

    def drawn(field, steps):
        return roll_out(field, noise, bench.base.sigmas(steps, 64, 64), torch.full((12,), steps), condition)

    teacher = bench.teachers["base"]
    changes = {"guidance": {way: SCALE}, "prompt_dropout": 0.4 if way == "keep" else 0.0, "window": "every_step"}
    changes |= {"steps": 30, "batch": 12, "optimizer": "muon", "lr": 0.01}
    spec = bench.spec(rollout_steps=steps, target=target, **changes)
    student, _ = distill(bench.base, encoded, {"t": teacher}, {"t2i": "t"}, {"t2i": 1.0}, spec, empty=empty)
    ours = GuidedField(student, SCALE, empty) if way == "keep" else student
    guided = GuidedField(teacher, SCALE, empty)
    wanted, found = drawn(guided, fine), drawn(ours, steps)
    others = [drawn(field, steps) for field in ((teacher,) if target == "velocity" else (teacher, guided))]
    off, *rest = (float((one.state - wanted.state).norm()) for one in (found, *others))
    assert off < 0.6 * min(rest)
    assert found.forwards == 12 * steps * (2 if way == "keep" else 1)
