"""How each field of a recipe is drawn: what follows from guidance and target, and what is said of one field."""

from __future__ import annotations

import pytest

from danceopd.config.load import load_recipe
from danceopd.config.sampling import SAMPLING, Sampling, read_sampling, write_sampling
from danceopd.errors import UserError

STRONG = "teachers.strong={kind: base, guidance: 3}"
FEW = ["distill.target=displacement", "distill.rollout_steps=4"]


def drawn(*settings, stated=None):
    """Steps and guidance of student, base, a plain teacher and a guided one, in short."""
    recipe = load_recipe("world", ["evaluate.steps=16", *settings])
    found = [recipe.sampling(name, stated) for name in ("student", "base", "local_edit", "strong")]
    return [(s.steps, s.guidance) for s in found]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], [(16, 1), (16, 1), (16, 1), (16, 1)]),
        (FEW, [(4, 1), (16, 1), (16, 1), (16, 1)]),
        (["distill.guidance={keep: 4}"], [(16, 4), (16, 4), (16, 4), (16, 4)]),
        (["distill.guidance={absorb: 4}"], [(16, 1), (16, 4), (16, 4), (16, 4)]),
        ([*FEW, "distill.guidance={keep: 4}"], [(4, 4), (16, 4), (16, 4), (16, 4)]),
        ([STRONG, "tasks.t2i.teacher=strong"], [(16, 1), (16, 1), (16, 1), (16, 3)]),
        ([STRONG, "distill.guidance={absorb: 4}"], [(16, 1), (16, 4), (16, 4), (16, 3)]),
        (["evaluate.guidance=5"], [(16, 5), (16, 5), (16, 5), (16, 5)]),
        (["evaluate.guidance=5", "distill.guidance={keep: 4}"], [(16, 4), (16, 5), (16, 5), (16, 5)]),
        (["evaluate.guidance=5", "distill.guidance={absorb: 4}"], [(16, 1), (16, 4), (16, 4), (16, 4)]),
        (["evaluate.fields={student: {steps: 2, guidance: 1}}"], [(2, 1), (16, 1), (16, 1), (16, 1)]),
        (
            ["evaluate.fields={base: {guidance: 1}, local_edit: {steps: 9}}", "evaluate.guidance=5"],
            [(16, 5), (16, 1), (9, 5), (16, 5)],
        ),
    ],
)
def test_what_follows_from_a_recipe(settings, expected):
    found = drawn(*settings)
    assert found[:3] == expected[:3]
    if STRONG in settings:
        assert found[3] == expected[3]


def test_a_field_that_was_a_student_once_is_drawn_as_it_states():
    recipe = load_recipe("world", ["evaluate.steps=16", "evaluate.guidance=5"])
    stated = Sampling(steps=4, guidance=1.0, fixed=True)
    assert recipe.sampling("local_edit", stated) == stated
    other = load_recipe("world", ["evaluate.fields={local_edit: {guidance: 3}}"])
    assert other.sampling("local_edit", stated) == Sampling(steps=4, guidance=3.0, fixed=True)


def test_a_student_of_displacements_is_made_for_its_steps_alone():
    assert load_recipe("world", FEW).sampling("student").fixed
    assert not load_recipe("world").sampling("student").fixed


def test_a_field_that_there_is_not_is_named():
    with pytest.raises(UserError, match=r"evaluate\.fields\.stud: no such field; there are: base, student, local_edit"):
        load_recipe("world", ["evaluate.fields={stud: {steps: 4}}"])


def test_a_statement_comes_back(tmp_path):
    assert read_sampling(tmp_path) is None
    write_sampling(tmp_path, Sampling(steps=4, guidance=3.5, fixed=True))
    assert (tmp_path / SAMPLING).is_file()
    assert read_sampling(tmp_path) == Sampling(steps=4, guidance=3.5, fixed=True)
