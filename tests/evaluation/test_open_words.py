"""Where words leave something open: every whole scene they allow is right, and nothing between two of them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from test_metrics import noisy, pictures

from danceopd.data import world
from danceopd.data.records import Record, decode_image
from danceopd.errors import UserError
from danceopd.evaluation.metrics import MAX_PSNR, metric


def world_task(task: str, count: int = 12) -> list[Record]:
    return list(world.world_records({task: {"test": count}}, open_share=0.25))


@pytest.mark.parametrize("task", world.OPEN_TASKS)
@pytest.mark.parametrize("amount", [0, 5])
def test_targets_are_valid_even_with_some_noise(task, amount):
    records = world_task(task, 24)
    assert metric("valid").score(noisy(pictures(records), amount), records) == [1.0] * 24


def open_records(task: str = "t2i", count: int = 48) -> list[Record]:
    return [r for r in world_task(task, count) if r.facts()["open"]]


def every_scene(record: Record) -> list[world.Scene]:
    return world.Wanted.from_json(record.facts()["wanted"]).scenes()


@pytest.mark.parametrize("task", world.OPEN_TASKS)
def test_every_scene_that_words_allow_is_valid_and_as_sharp_as_it_gets(task):
    for record in open_records(task)[:: world.DRAWS]:
        drawn = np.stack([world.render(scene) for scene in every_scene(record)])
        same = [record] * len(drawn)
        assert len(drawn) > 1 and metric("valid").score(drawn, same) == [1.0] * len(drawn)
        assert metric("sharpness").score(drawn, same) == [MAX_PSNR] * len(drawn)


def test_a_mean_of_two_allowed_scenes_is_neither():
    for record in open_records()[:: world.DRAWS]:
        first, second = every_scene(record)[0], every_scene(record)[-1]
        blurred = np.stack([(world.render(first) / 2 + world.render(second) / 2).astype(np.uint8)])
        assert metric("valid").score(blurred, [record]) == [0.0]
        assert metric("sharpness").score(blurred, [record])[0] < 30


def test_blur_is_not_valid_though_every_place_can_be_read():
    record = world_task("t2i", 1)[0]
    blurred = (pictures([record]) * 0.8 + 0.2 * 128).astype(np.uint8)
    assert metric("valid").score(blurred, [record]) == [0.0]
    assert 15 < metric("sharpness").score(blurred, [record])[0] < 30


def test_a_source_left_as_it_is_is_no_valid_edit():
    records = world_task("local_edit", 24)
    assert {r.facts()["edit"] for r in records} == set(world.EDITS)
    assert metric("valid").score(pictures(records, "source"), records) == [0.0] * 24


def test_another_color_must_be_another():
    record = next(r for r in open_records("local_edit") if r.facts()["edit"] == "recolor")
    wanted = world.Wanted.from_json(record.facts()["wanted"])
    assert max(len(wish.colors) for wish in wanted.wishes) == len(world.COLORS) - 1


@pytest.mark.parametrize("leaves_open", [False, True])
def test_untouched_falls_with_the_outside_and_not_with_the_inside(leaves_open):
    records = [r for r in world_task("local_edit", 48) if r.facts()["open"] == leaves_open][:12]
    inside, outside = pictures(records), pictures(records)
    for i, record in enumerate(records):
        source = decode_image(record.source, "")
        for place in map(world.cell_slice, world.POSITIONS):
            edited = (source[place] != pictures([record])[0][place]).any()
            (inside if edited else outside)[i][place] ^= 4
    score = metric("untouched").score
    assert score(pictures(records), records) == [MAX_PSNR] * 12
    assert score(inside, records) == [MAX_PSNR] * 12
    assert score(outside, records) == pytest.approx([20 * np.log10(255 / 4)] * 12, abs=1e-3)


def test_untouched_follows_the_place_that_was_chosen():
    record = next(r for r in open_records("local_edit", 576) if r.facts()["edit"] == "add" and len(every_scene(r)) > 5)
    drawn = np.stack([world.render(scene) for scene in every_scene(record)])
    assert metric("untouched").score(drawn, [record] * len(drawn)) == [MAX_PSNR] * len(drawn)


def test_diversity_is_one_for_even_draws_and_zero_for_one_picture():
    records = open_records(count=4 * 192)
    assert metric("diversity").score(pictures(records), records)[0] == pytest.approx(1, abs=0.15)
    stuck = np.stack([world.render(every_scene(r)[0]) for r in records])
    assert metric("diversity").score(stuck, records) == [0.0]


@pytest.mark.parametrize("task", world.OPEN_TASKS)
def test_words_that_leave_something_open_are_judged_alone(task):
    """Their pictures are right and all others wrong, or the other way round."""
    records = world_task(task, 48)
    drawn, wrong = pictures(records), noisy(pictures(records), 255)
    left_open = np.array([r.facts()["open"] for r in records])
    right = np.where(left_open[:, None, None, None], drawn, wrong)
    assert 0 < left_open.sum() < 48
    assert metric("open_valid").score(right, records) == [1.0]
    assert metric("open_sharpness").score(right, records) == [MAX_PSNR]
    assert metric("valid").score(right, records) == left_open.astype(float).tolist()
    assert metric("open_valid").score(np.where(left_open[:, None, None, None], wrong, drawn), records) == [0.0]


@pytest.mark.parametrize("name", ["open_valid", "open_sharpness"])
def test_where_no_words_leave_anything_open_there_is_no_value(name):
    closed = [r for r in world_task("t2i", 8) if not r.facts()["open"]]
    assert np.isnan(metric(name).score(pictures(closed), closed)[0])


def test_diversity_of_words_that_leave_nothing_open_is_unknown():
    closed = [r for r in world_task("t2i", 8) if not r.facts()["open"]]
    assert np.isnan(metric("diversity").score(pictures(closed), closed)[0])


def broken(change: dict) -> str:
    wanted = {"background": "white", "wishes": [[["top left"], ["red"], "ring"]]}
    return json.dumps({"wanted": wanted | change})


@pytest.mark.parametrize("name", ["valid", "open_valid", "sharpness", "open_sharpness", "untouched", "diversity"])
@pytest.mark.parametrize(
    "provenance",
    [
        "{}",
        '{"wanted": 3}',
        broken({"background": "pink"}),
        broken({"wishes": [[["middle"], ["red"], "ring"]]}),
        broken({"wishes": [[["top left"], ["red"], "heart"]]}),
        broken({"wishes": [[["top left"], [], "ring"]]}),
        broken({"wishes": [["top left"]]}),
    ],
)
def test_a_record_that_does_not_say_what_is_wanted_is_named(name, provenance):
    record = dataclasses.replace(world_task("local_edit", 1)[0], id="mine-7", provenance=provenance)
    with pytest.raises(UserError, match=f"record 'mine-7': metric '{name}' needs a wanted.*psnr or ssim"):
        metric(name).score(pictures([record]), [record])
