"""The small world: what it draws, what it holds out, and that it never changes."""

from __future__ import annotations

import collections
import json
import random
import re

import numpy as np
import pytest

from danceopd.data import world
from danceopd.data.records import content_hash, decode_image
from danceopd.errors import UserError

SIZES = {task: {"train": 150, "val": 10, "test": 60} for task in world.TASKS}


@pytest.fixture(scope="module")
def records():
    return list(world.world_records(SIZES, open_share=0.25))


def of(records, task, split):
    return [r for r in records if r.task == task and r.split == split]


def test_two_runs_give_the_same_records_and_another_seed_others(records):
    assert content_hash(records) == content_hash(world.world_records(SIZES, open_share=0.25))
    assert content_hash(records) != content_hash(world.world_records(SIZES, seed=1, open_share=0.25))


def test_a_record_does_not_depend_on_its_neighbors(records):
    few = list(world.world_records({"local_edit": {"train": 5}}, open_share=0.25))
    assert few == of(records, "local_edit", "train")[:5]


def test_an_eighth_of_the_combinations_is_held_out_and_no_word_with_it():
    assert len(world.HELD_OUT) == 8
    assert len(world.TRAINED) == 72
    for pick in (lambda t: t.color, lambda t: t.shape, lambda t: t.position):
        assert {pick(t) for t in world.TRAINED} == {pick(t) for t in world.ALL_THINGS}


def test_training_never_shows_a_held_out_combination(records):
    for record in records:
        if record.split == "test":
            continue
        scene = world.Scene.from_json(record.facts()["scene"])
        assert not any(world.is_held_out(t) for t in scene.things)


@pytest.mark.parametrize("task", world.TASKS)
def test_every_test_record_is_new_in_a_way_it_names(records, task):
    held_out = re.compile(
        r"^on \w+, draw|^make the color of|^take the .* away|^(at the|in the picture).* add|^paint the color"
        r"|^turn it|^paint it"
    )
    for record in of(records, task, "test"):
        novelty = record.facts()["novelty"]
        assert bool(held_out.search(record.prompt)) == (novelty in ("wording", "both"))
        shown = decode_image(record.source or record.target, record.id)
        new = any(
            np.array_equal(shown[world.cell_slice(t.position)][::8, ::8], world.draw_cell(b, t.position, t))
            for t in world.HELD_OUT
            for b in world.BACKGROUNDS
        )
        if task != "local_edit":
            assert new == (novelty in ("combination", "both"))
    for record in of(records, task, "train"):
        assert not held_out.search(record.prompt)


def meaning(record):
    """What is asked for, in whatever order and wording."""
    wanted = world.Wanted.from_json(record.facts()["wanted"])
    return record.source, wanted.background, frozenset(wanted.wishes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_val_shares_no_record_with_train(seed):
    found = list(world.world_records({t: {"train": 1500, "val": 60} for t in (*world.TASKS, "outline")}, seed, 0.25))
    for task in (*world.TASKS, "outline"):
        train, val = of(found, task, "train"), of(found, task, "val")
        assert len(val) == 60
        assert not {(r.source, r.prompt) for r in train} & {(r.source, r.prompt) for r in val}
        if task in world.OPEN_TASKS:
            assert not {meaning(r) for r in train} & {meaning(r) for r in val}
        if task != "t2i":
            assert not {r.source for r in train} & {r.source for r in val}


@pytest.mark.parametrize("task", world.OPEN_TASKS)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_one_record_in_four_has_words_that_leave_something_open(records, task, split):
    found = of(records, task, split)
    leaves_open = [r for r in found if r.facts()["open"]]
    assert len(leaves_open) == len(found) // 4
    for record in found:
        facts = record.facts()
        wanted = world.Wanted.from_json(facts["wanted"])
        scenes = wanted.scenes()
        assert world.Scene.from_json(facts["scene"]) in scenes
        assert (len(scenes) > 1) == facts["open"]
        assert np.array_equal(decode_image(record.target, ""), world.render(world.Scene.from_json(facts["scene"])))
        if task == "t2i":
            for wish in wanted.wishes:
                assert wish.words in record.prompt
            said = re.findall(r"top left|top right|bottom left|bottom right", record.prompt)
            assert len(said) == sum(len(w.positions) == 1 for w in wanted.wishes)


def test_allowed_scenes_are_drawn_evenly():
    wanted = world.Wanted("white", (world.Wish.of(world.Thing("top left", "red", "ring"), "place and color"),))
    rng = random.Random(0)
    seen = collections.Counter(world.allowed_scene(wanted, rng) for _ in range(3000))
    known = [s for s in wanted.scenes() if not any(world.is_held_out(t) for t in s.things)]
    assert len(wanted.scenes()) == 20 and set(seen) == set(known)
    assert max(seen.values()) < 1.4 * min(seen.values())


def test_held_out_records_that_leave_something_open_come_in_rows_of_the_same_words(records):
    for task in world.OPEN_TASKS:
        leaves_open = [r for r in of(records, task, "test") if r.facts()["open"]]
        for start in range(0, len(leaves_open) - world.DRAWS, world.DRAWS):
            row = leaves_open[start : start + world.DRAWS]
            assert len({(r.prompt, r.source, r.facts()["novelty"]) for r in row}) == 1


def test_two_things_of_one_shape_are_told_apart_by_their_color():
    rng = random.Random(0)
    for _ in range(500):
        wanted = world.random_wishes(rng)
        free = [w.shape for w in wanted.wishes if len(w.colors) > 1]
        assert all([w.shape for w in wanted.wishes].count(shape) == 1 for shape in free)


def test_wishes_survive_being_written():
    rng = random.Random(1)
    for _ in range(50):
        wanted = world.random_wishes(rng)
        assert world.Wanted.from_json(json.loads(json.dumps(wanted.to_json()))) == wanted


def test_held_out_wordings_use_known_words_only():
    def known(wordings):
        return [w for w in wordings if w not in world.held_out_wordings(wordings)]

    everything = " ".join(w for wordings in (world.CAPTIONS, *world.WORDINGS.values()) for w in known(wordings))
    for wordings in (world.CAPTIONS, *world.WORDINGS.values(), *world.OPEN_WORDINGS.values()):
        assert set(re.findall(r"[a-z]+", " ".join(wordings))) <= set(re.findall(r"[a-z]+", everything))
        assert len(known(wordings)) == len(wordings) - (2 if wordings == world.WORDINGS["style"] else 1)


def test_an_edit_changes_its_place_and_nothing_else(records):
    kinds = set()
    for record in of(records, "local_edit", "train"):
        facts = record.facts()
        kinds.add(facts["edit"])
        source, target = decode_image(record.source, ""), decode_image(record.target, "")
        inside = np.zeros(source.shape[:2], bool)
        changed = [p for p in map(world.cell_slice, world.POSITIONS) if not np.array_equal(source[p], target[p])]
        assert len(changed) == 1
        inside[changed[0]] = True
        assert np.array_equal(source[~inside], target[~inside])
        assert np.array_equal(target, world.render(world.Scene.from_json(facts["scene"])))
    assert kinds == set(world.EDITS)


def test_instructions_name_one_thing_only(records):
    for record in of(records, "local_edit", "train"):
        names = [t.name for t in world.Scene.from_json(record.facts()["scene"]).things]
        assert len(names) == len(set(names))


def test_styles_differ_from_the_picture_and_from_each_other():
    scene = world.random_scene(random.Random(4), fewest=3)
    pictures = [world.render(scene, style) for style in (None, *world.STYLES)]
    assert len(world.STYLES) >= 4
    for i, first in enumerate(pictures):
        for second in pictures[i + 1 :]:
            assert np.abs(first.astype(int) - second).mean() > 4


def test_pictures_are_large_enough_for_the_stock_pipeline(records):
    assert decode_image(records[0].target, "").shape == (64, 64, 3)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="'cubism' is not known; choose one of: grayscale, negative, night, sepia"):
        world.render(world.random_scene(random.Random(0)), "cubism")
    with pytest.raises(UserError, match="'sketch' is not known; choose one of: global_style, local_edit, outline"):
        list(world.world_records({"sketch": {"train": 1}}))


def test_an_outline_is_a_line_drawing_of_the_source():
    found = list(world.world_records({"outline": {"train": 60, "test": 30}}))
    ink, paper = (np.array(world.BACKGROUNDS[name]) for name in ("black", "white"))
    for record in found:
        scene = world.Scene.from_json(record.facts()["scene"])
        drawn = decode_image(record.target, "")[::8, ::8]
        inked = (drawn == ink).all(-1)
        assert np.array_equal(decode_image(record.source, ""), world.render(scene))
        assert ((drawn == paper).all(-1) | inked).all()
        for position in world.POSITIONS:
            thing, lines = scene.at(position), inked[world.cell_slice(position, scale=1)]
            shape = np.zeros((4, 4), bool)
            if thing is not None:
                row, col = world.POSITIONS[position]
                place = shape[row : row + 3, col : col + 3]
                place[:] = world.SHAPES["ring" if thing.shape == "square" else thing.shape]
                place[1, 1] &= thing.shape != "cross"  # the one other pixel with all neighbours inside
            assert np.array_equal(lines, shape)


def test_the_outlines_last_wording_is_held_out():
    held_out = world.OUTLINE_WORDINGS[-1]
    for record in world.world_records({"outline": {"train": 40, "test": 30}}):
        assert (record.prompt == held_out) == (record.facts()["novelty"] in ("wording", "both"))
    assert set(held_out.split()) <= set(" ".join((*world.OUTLINE_WORDINGS[:-1], *world.WORDINGS["style"])).split())


def test_a_later_task_changes_nothing_of_the_others(records):
    more = world.world_records({**SIZES, "outline": {"train": 2}}, open_share=0.25)
    assert [r for r in more if r.task != "outline"] == records
    assert not {word for text in world.corpus() for word in text.split()} & {"outline", "outlines"}


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_open_words_are_spread_evenly_in_the_share_asked_for(share):
    sizes = {t: {"train": 100, "test": 40} for t in world.TASKS}
    for record_task in world.OPEN_TASKS:
        for split, count in sizes[record_task].items():
            found = of(list(world.world_records({record_task: {split: count}}, open_share=share)), record_task, split)
            opened = [r.facts()["open"] for r in found]
            assert sum(opened) == round(share * count) and abs(sum(opened[: count // 2]) - share * count / 2) <= 1


def test_closed_records_do_not_depend_on_the_share_of_open_ones():
    closed, mixed = (list(world.world_records({"t2i": {"test": 20}}, open_share=share)) for share in (0, 0.25))
    assert [r for r in mixed if not r.facts()["open"]] == [r for r in closed if r in mixed]
    assert sum(r in mixed for r in closed) == 15
