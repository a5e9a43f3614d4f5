"""Metrics are exact on rendered pictures, fall on wrong ones, and say what a record lacks."""

from __future__ import annotations

import base64
import dataclasses
import json

import numpy as np
import pytest

from danceopd.data import world
from danceopd.data.png import encode_png
from danceopd.data.records import Record, decode_image
from danceopd.errors import UserError
from danceopd.evaluation.metrics import MAX_PSNR, METRICS, metric
from danceopd.evaluation.metrics.editing import edit_mask


def world_task(task: str, count: int = 12) -> list[Record]:
    return list(world.world_records({task: {"test": count}}))


def pictures(records: list[Record], field: str = "target") -> np.ndarray:
    return np.stack([decode_image(getattr(r, field), r.id) for r in records])


def scene_of(record: Record) -> world.Scene:
    return world.Scene.from_json(record.facts()["scene"])


def noisy(images: np.ndarray, amount: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, amount, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("amount", [0, 20])
def test_scene_accuracy_is_one_on_the_targets_even_with_noise(amount):
    records = world_task("t2i", 24)
    assert metric("scene_accuracy").score(noisy(pictures(records), amount), records) == [1.0] * 24


def wrong_scenes(scene: world.Scene) -> dict[str, world.Scene]:
    first, *rest = scene.things
    colors, shapes, grounds = list(world.COLORS), list(world.SHAPES), list(world.BACKGROUNDS)

    def after(names: list[str], name: str) -> str:
        return names[(names.index(name) + 1) % len(names)]

    free = next(p for p in world.POSITIONS if scene.at(p) is None)
    return {
        "color": dataclasses.replace(
            scene, things=(dataclasses.replace(first, color=after(colors, first.color)), *rest)
        ),
        "shape": dataclasses.replace(
            scene, things=(dataclasses.replace(first, shape=after(shapes, first.shape)), *rest)
        ),
        "missing": dataclasses.replace(scene, things=tuple(rest)),
        "extra": dataclasses.replace(scene, things=(*scene.things, world.Thing(free, "red", "ring"))),
        "moved": dataclasses.replace(scene, things=(dataclasses.replace(first, position=free), *rest)),
        "background": dataclasses.replace(scene, background=after(grounds, scene.background)),
    }


@pytest.mark.parametrize("name", ["scene_accuracy", "valid"])
@pytest.mark.parametrize("kind", ["color", "shape", "missing", "extra", "moved", "background"])
def test_a_picture_that_differs_in_one_thing_is_wrong(kind, name):
    records = world_task("t2i", 9)
    wrong = np.stack([world.render(wrong_scenes(scene_of(r))[kind]) for r in records])
    assert metric(name).score(wrong, records) == [0.0] * 9


@pytest.mark.parametrize("name", ["scene_accuracy", "valid"])
def test_a_background_that_is_wrong_in_one_place_is_seen(name):
    record = next(r for r in world_task("t2i") if len(scene_of(r).things) == 1)
    scene = scene_of(record)
    free = next(p for p in world.POSITIONS if scene.at(p) is None)
    other = next(b for b in world.BACKGROUNDS if b != scene.background)
    picture = world.render(scene)
    picture[world.cell_slice(free)] = world.BACKGROUNDS[other]
    assert metric(name).score(picture[None], [record]) == [0.0]


def test_edit_success_is_one_on_the_targets_and_zero_on_the_untouched_sources():
    records = world_task("local_edit", 24)
    assert {r.facts()["edit"] for r in records} == set(world.EDITS)
    assert metric("edit_success").score(pictures(records), records) == [1.0] * 24
    assert metric("edit_success").score(pictures(records, "source"), records) == [0.0] * 24


def test_edit_success_looks_at_the_edited_place_only():
    records = world_task("local_edit", 12)
    drawn = pictures(records)
    for picture, record in zip(drawn, records, strict=True):
        for position in set(world.POSITIONS) - {record.facts()["position"]}:
            picture[world.cell_slice(position)] = 128
    assert metric("edit_success").score(drawn, records) == [1.0] * 12


def test_preserved_psnr_falls_with_the_outside_and_not_with_the_inside():
    records = world_task("local_edit", 6)
    inside, outside = pictures(records), pictures(records)
    for i, record in enumerate(records):
        changed = (decode_image(record.source, "") != decode_image(record.target, "")).any(axis=-1)
        inside[i][changed] = 128
        outside[i][~changed] ^= 32
    score = metric("preserved_psnr").score
    assert score(pictures(records), records) == [MAX_PSNR] * 6
    assert score(inside, records) == [MAX_PSNR] * 6
    assert score(outside, records) == pytest.approx([20 * np.log10(255 / 32)] * 6, abs=1e-3)


@pytest.mark.parametrize("name", ["psnr", "ssim", "preserved_psnr"])
def test_fidelity_falls_as_noise_grows_and_stays_in_its_range(name):
    records = world_task("local_edit", 4)
    means = [np.mean(metric(name).score(noisy(pictures(records), a), records)) for a in (0, 2, 10, 60)]
    best, least = (1.0, -1.0) if name == "ssim" else (MAX_PSNR, 0.0)
    assert means[0] == pytest.approx(best, abs=1e-3)  # SSIM in float32 misses 1 on flat areas
    assert means == sorted(means, reverse=True) and len(set(means)) == 4
    assert least <= means[-1]


def test_psnr_is_what_its_definition_says():
    record = Record("a", "t", "p", None, encode_png(np.full((64, 64, 3), 100, np.uint8)), "test")
    drawn = np.full((1, 64, 64, 3), 110, np.uint8)
    assert metric("psnr").score(drawn, [record]) == pytest.approx([20 * np.log10(255 / 10)], abs=1e-3)


@pytest.mark.parametrize("name", sorted(name for name, found in METRICS.items() if not (found.tools or found.of_set)))
def test_a_samples_value_does_not_depend_on_its_neighbors(name):
    records = world_task("local_edit", 20)
    drawn = noisy(pictures(records), 5)
    drawn[::3] = drawn[::3][::-1]
    whole = metric(name).score(drawn, records)
    alone = [metric(name).score(drawn[i : i + 1], records[i : i + 1])[0] for i in range(20)]
    assert whole == pytest.approx(alone, abs=1e-3)
    assert len(whole) == 20 and len(set(whole)) > 1
    assert metric(name).score(drawn[:0], []) == []


def test_a_picture_of_another_size_is_compared_at_the_drawn_size():
    big = Record("a", "t", "p", None, encode_png(np.full((128, 128, 3), 90, np.uint8)), "test")
    assert metric("psnr").score(np.full((1, 64, 64, 3), 90, np.uint8), [big]) == [MAX_PSNR]


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(UserError, match=r"metric: 'brisque' is not known.*edit_success.*ssim"):
        metric("brisque")


def broken_scene(change: dict) -> str:
    scene = {"background": "white", "things": [["top left", "red", "ring"]]}
    return json.dumps({"scene": scene | change, "position": "top left"})


@pytest.mark.parametrize("name", ["scene_accuracy", "edit_success"])
@pytest.mark.parametrize(
    "provenance",
    [
        "{}",
        '{"scene": 3}',
        broken_scene({"background": "pink"}),
        broken_scene({"things": [["middle", "red", "ring"]]}),
        broken_scene({"things": [["top left"]]}),
    ],
)
def test_a_record_without_a_readable_scene_is_named(name, provenance):
    record = dataclasses.replace(world_task("local_edit", 1)[0], id="mine-7", provenance=provenance)
    with pytest.raises(UserError, match=f"record 'mine-7': metric '{name}' needs a scene.*psnr or ssim"):
        metric(name).score(pictures([record]), [record])


def test_a_scene_without_a_position_does_for_drawing_and_not_for_edits():
    record = world_task("t2i", 1)[0]
    assert metric("scene_accuracy").score(pictures([record]), [record]) == [1.0]
    with pytest.raises(UserError, match="'edit_success' needs a position"):
        metric("edit_success").score(pictures([record]), [record])


@pytest.mark.parametrize("name, field", [("psnr", "target"), ("ssim", "target"), ("preserved_psnr", "source")])
def test_a_record_without_the_picture_it_needs_is_named(name, field):
    record = dataclasses.replace(world_task("local_edit", 1)[0], **{field: None})
    with pytest.raises(UserError, match=f"{record.id}.*'{name}' needs a {field}"):
        metric(name).score(np.zeros((1, 64, 64, 3), np.uint8), [record])


def test_nothing_preserved_is_an_error_and_not_a_perfect_score():
    records = world_task("global_style", 8)
    record = next(r for r in records if r.facts()["style"] == "negative")
    with pytest.raises(UserError, match="'preserved_psnr' finds no pixel that source and target share"):
        metric("preserved_psnr").score(pictures([record]), [record])


def test_the_worlds_metrics_refuse_pictures_of_another_size():
    with pytest.raises(UserError, match="'scene_accuracy' reads the small world's 64x64 pictures, these are 32x48"):
        metric("scene_accuracy").score(np.zeros((1, 32, 48, 3), np.uint8), world_task("t2i", 1))


def test_pictures_and_records_must_match_in_number():
    with pytest.raises(ValueError, match="1 pictures for 2 records"):
        metric("psnr").score(np.zeros((1, 64, 64, 3), np.uint8), world_task("t2i", 2))


# --- regions of edits ---


def edit(change: str | None = None, **facts: object) -> Record:
    """A gray picture whose top left quarter turns white, with JPEG-like noise on the target and one speck."""
    source = np.full((64, 64, 3), 100, np.uint8)
    target = noisy(source, 3)
    target[:32, :32] = 255
    target[50, 50] = 255
    data = {"source": encode_png(source), "target": encode_png(target)} | ({change: None} if change else {})
    return Record("e", "t", "p", data["source"], data["target"], "test", json.dumps(facts))


def test_a_derived_region_takes_no_noise_and_no_specks():
    mask = edit_mask(edit(), 64, 64)
    assert mask[:32, :32].all() and not mask[34:].any() and not mask[:, 34:].any()


def test_a_given_region_goes_before_a_derived_one():
    box = edit_mask(edit(box=[0.5, 0, 1, 0.25]), 64, 64)
    assert box.sum() == 32 * 16 and box[:16, 32:].all()
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[40:, 40:] = 255
    mask = edit_mask(edit("target", mask=base64.b64encode(encode_png(picture)).decode(), box=[0, 0, 1, 1]), 64, 64)
    assert mask.sum() == 24 * 24 and mask[40:, 40:].all()


def test_inside_and_outside_are_told_apart():
    record = edit()
    source, target = (decode_image(getattr(record, f), "") for f in ("source", "target"))
    half = source.copy()
    half[:32, :16] = 255
    outside = target.copy()
    outside[40:] = 0
    drawn = np.stack([source, half, target, outside])

    def values(name: str) -> list[float]:
        return metric(name).score(drawn, [record] * 4)

    assert values("edit_change") == pytest.approx([0, 0.5 * 32 / 33 * 32 / 33, 1, 1], abs=0.07)
    assert values("edit_match")[0] == 0 and values("edit_match")[1] == pytest.approx(0.5, abs=0.03)
    assert values("edit_match")[2:] == [1, 1]
    psnr = values("outside_psnr")
    assert psnr[0] == psnr[1] == MAX_PSNR and psnr[2] > 30 > 15 > psnr[3]


@pytest.mark.parametrize(
    "record, said",
    [
        (edit(box=[0, 0, 1, 1]), "covers every pixel"),
        (edit(box=[0, 0, 2, 1]), r"'box': is \[0, 0, 2, 1\]; write \[left, top"),
        (edit(box="left"), "'box': is left; write"),
        (edit(mask="???"), "'mask': not base64"),
        (edit(mask=base64.b64encode(b"text").decode()), "'mask': not a readable image"),
        (Record("e", "t", "p", edit().source, edit().source, "test"), "covers no pixel"),
    ],
)
def test_a_region_that_says_nothing_is_one_line(record, said):
    with pytest.raises(UserError, match=f"record 'e'.*{said}"):
        metric("outside_psnr").score(np.zeros((1, 64, 64, 3), np.uint8), [record])


def test_without_target_mask_or_box_there_is_no_region():
    with pytest.raises(
        UserError, match="'outside_psnr' needs a mask and it has none; give it source and target images"
    ):
        metric("outside_psnr").score(np.zeros((1, 64, 64, 3), np.uint8), [edit("target")])
