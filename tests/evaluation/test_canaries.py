"""Canaries: which pictures they are, that they are asked anew, and how far a judge has moved."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from judge_server import GOOD
from test_evaluate import make_recipe

from danceopd.data import world
from danceopd.data.assemble import open_dataset
from danceopd.evaluation import evaluate as ev
from danceopd.evaluation.canaries import judge_canaries, make_canaries, say_moved
from danceopd.evaluation.metrics import read_picture
from danceopd.flow.fields import VelocityField

JUDGED = ["judge_overall"]
HARSH = GOOD | {"instruction": 7}


def recipe_of(server, tasks=world.TASKS, **judge):
    recipe = make_recipe(**{task: {"metrics": JUDGED} for task in tasks})
    spec = {"url": server.url, "model": "m", "parallel": 1, "attempts": 2} | judge
    return recipe.model_validate(
        recipe.model_dump() | {"evaluate": recipe.evaluate.model_dump() | {"judge": spec}},
    )


@pytest.fixture
def held_out(small_data):
    dataset = open_dataset(small_data)
    return {task: dataset.records("test", task, 4) for task in world.TASKS}


def ask(recipe, held_out, cache):
    return judge_canaries(ev.open_tools(recipe, "cpu", cache, "student"), recipe, held_out)


def test_targets_and_spoiled_ones_of_every_judged_task(judge_server, held_out):
    found = make_canaries(recipe_of(judge_server), held_out)
    assert len(found) == 8 and {c.name.split("/")[0] for c in found} == set(world.TASKS)
    for whole, spoiled in zip(found[::2], found[1::2], strict=True):
        target = read_picture(whole.record.target, world.SIZE, world.SIZE, "target")
        assert whole.name.endswith("/target") and np.array_equal(whole.picture, target)
        expected = 255 - target if spoiled.source is None else spoiled.source
        assert spoiled.record is whole.record and np.array_equal(spoiled.picture, expected)
    assert [c.name for c in make_canaries(recipe_of(judge_server), held_out)] == [c.name for c in found]


def test_only_what_a_judge_scores_has_canaries(judge_server, held_out):
    recipe = recipe_of(judge_server, tasks=["local_edit"])
    assert {c.name.split("/")[0] for c in make_canaries(recipe, held_out)} == {"local_edit"}
    assert make_canaries(recipe, held_out, {"judge_overall"}) == [] == make_canaries(make_recipe(), held_out)


def test_without_targets_only_spoiled_ones_are_left(judge_server, held_out):
    bare = {task: [dataclasses.replace(r, target=None) for r in records] for task, records in held_out.items()}
    found = make_canaries(recipe_of(judge_server), bare)
    assert len(found) == 4 and all(c.name.endswith("/spoiled") for c in found)
    assert all((c.picture == 128).all() for c in found if c.source is None)


def test_they_are_asked_anew_every_time_and_counted(judge_server, held_out, tmp_path):
    recipe = recipe_of(judge_server)
    first, second = ask(recipe, held_out, tmp_path), ask(recipe, held_out, tmp_path)
    assert first["verdicts"] == second["verdicts"] and len(judge_server.seen) == 32
    assert say_moved(first, second) == ""


def test_answers_from_before_the_judge_moved_are_forgotten(judge_server, held_out, tmp_path, caplog):
    recipe = recipe_of(judge_server)

    def score():
        tools = ev.open_tools(recipe, "cpu", tmp_path, "student")
        judge_canaries(tools, recipe, held_out)
        records = held_out["local_edit"]
        pictures = np.zeros((len(records), world.SIZE, world.SIZE, 3), dtype=np.uint8)
        return ev.score_pictures(pictures, records, ("judge_instruction",), tools).values["judge_instruction"]

    assert score() == [8] * 4 == score()
    judge_server.usual = HARSH
    with caplog.at_level(logging.WARNING, "danceopd"):
        assert score() == [7] * 4
    assert "the judge has moved by 1 of 10 on its canaries (tolerance 0.1)" in caplog.text
    caplog.clear()
    assert score() == [7] * 4 and not caplog.text


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"a": [8, 6, 6, 6], "b": [8, 6, 6, 6.1]}, ""),
        ({"a": [8, 6, 6, 6], "b": [8, 6, 7, 6]}, "moved by 0.5 of 10"),
        ({"a": [7, 6, 6, 6], "b": [9, 6, 6, 6]}, "moved by 1 of 10"),  # up and down do not cancel out
        ({"a": [8, 6, 6, 6], "b": None}, "did not answer"),
    ],
)
def test_how_far_a_judge_has_moved(theirs, told):
    ours = {"pictures": "p", "tolerance": 0.1, "verdicts": {"a": [8, 6, 6, 6], "b": [8, 6, 6, 6]}}
    found = say_moved(ours, ours | {"verdicts": theirs})
    assert told in found and bool(told) == bool(found)
    assert "other canaries" in say_moved(ours, ours | {"pictures": "q"})
    assert "not asked" in say_moved(ours, None) and "not asked" in say_moved(None, ours)
    assert say_moved(ours | {"tolerance": 1.0}, ours | {"verdicts": {"a": [7, 6, 6, 6], "b": [9, 6, 6, 6]}}) == ""


@pytest.mark.slow
def test_every_evaluation_keeps_them_with_its_figures(judge_server, backbone, small_data, tmp_path):
    recipe = recipe_of(judge_server, tasks=["local_edit"], price_prompt=1.0, price_completion=1.0)
    field = VelocityField("base", backbone, backbone.transformer)
    dataset = open_dataset(small_data)
    fields = dict.fromkeys(("base", "local", "style", "student"), field)
    metrics = ev.evaluate(recipe, backbone, fields, dataset, tmp_path, "key", "s").metrics
    assert len(metrics["canaries"]["verdicts"]) == 8 and metrics["canaries"]["at"]
    assert metrics["judge"]["requests"] == len(judge_server.seen) == 16 + 8  # two a canary, two a picture
    assert metrics["judge"]["cost"] == pytest.approx(24 * 120e-6)
    again, _ = ev.measure_field(recipe, field, dataset, tmp_path, "key", "s")
    assert say_moved(metrics["canaries"], again["canaries"]) == "" and again["judge"]["requests"] == 16
