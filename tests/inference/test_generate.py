"""Pictures from an exported student: what they depend on, and what they must not depend on."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from danceopd.config.sampling import SAMPLING, Sampling, write_sampling
from danceopd.data.encoded import load_pixels
from danceopd.errors import UserError
from danceopd.files import write_json
from danceopd.flow.fields import VelocityField
from danceopd.inference.generate import (
    MAX_SEED,
    Drawer,
    Sample,
    decode_picture,
    encode_picture,
    open_image,
    open_student,
    read_settings,
    read_size,
    to_pixels,
)

STEPS = 2


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


def same(a: Image.Image, b: Image.Image) -> bool:
    """Equal up to the rounding of a batch of another size."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) <= 1


@pytest.fixture(scope="module")
def drawer(student_pipeline) -> Drawer:
    return open_student(student_pipeline)


def test_a_sample_does_not_depend_on_its_batch(drawer):
    prompts = ["red square", "blue circle", "make it green", "remove it", "red square"]
    images = [None, None, picture(1), picture(2), None]
    seeds = [3, 4, 5, 6, 7]
    together = drawer.draw(prompts, images, seeds, STEPS)
    for batch in (1, 2):
        apart = drawer.draw(prompts, images, seeds, STEPS, batch=batch)
        assert all(same(a, b) for a, b in zip(together, apart, strict=True))
    order = [4, 2, 0, 3, 1]
    shuffled = drawer.draw([prompts[i] for i in order], [images[i] for i in order], [seeds[i] for i in order], STEPS)
    assert all(same(shuffled[place], together[i]) for place, i in enumerate(order))


def test_prompt_image_seed_and_steps_all_matter(drawer):
    plain = drawer.draw(["red square"], [None], [0], STEPS)[0]
    assert plain.size == (64, 64) and plain.mode == "RGB"
    assert same(plain, drawer.draw(["red square"], [None], [0], STEPS)[0])
    for others in (
        drawer.draw(["blue circle"], [None], [0], STEPS),
        drawer.draw(["red square"], [picture(1)], [0], STEPS),
        drawer.draw(["red square"], [None], [1], STEPS),
        drawer.draw(["red square"], [None], [0], STEPS + 1),
    ):
        assert not np.array_equal(np.asarray(plain), np.asarray(others[0]))
    edits = drawer.draw(["red square"] * 2, [picture(1), picture(2)], [0, 0], STEPS)
    assert not np.array_equal(np.asarray(edits[0]), np.asarray(edits[1]))


def test_one_sample_after_the_other_is_the_same_to_the_bit(drawer):
    samples = [Sample("red square", (), 3, 2), Sample("make it green", (picture(1),), 4, 3), Sample("a", (), 3, 2, 2.0)]
    together = drawer.draw_samples(samples)
    for sample, drawn in zip(reversed(samples), reversed(together), strict=True):
        assert drawer.draw_samples([sample])[0].tobytes() == drawn.tobytes()


def test_every_source_image_matters_and_so_does_their_order(drawer):
    one, two = picture(1), picture(2)
    drawn = drawer.draw_samples([Sample("mix", shown, 0, 2) for shown in ((one,), (one, two), (two, one))], batch=3)
    assert len({image.tobytes() for image in drawn}) == 3


def test_guidance_one_is_the_plain_field_and_more_is_another(drawer):
    plain, same_again, guided = drawer.draw_samples([Sample("ring", (), 0, 2, scale) for scale in (None, 1, 3.0)])
    assert plain.tobytes() == same_again.tobytes() != guided.tobytes()


def test_a_picture_of_another_size_is_drawn_and_edited(drawer):
    drawn, edited = drawer.draw_samples(
        [Sample("ring", (), 0, 2, size=(32, 96)), Sample("mix", (picture(1),), 0, 2, size=(32, 96))]
    )
    assert drawn.size == edited.size == (96, 32)


def test_sizes_are_written_width_first():
    assert read_size("96x32", "--size") == (32, 96)
    for wrong in ("96", "96x", "0x32", "96X32", "-1x5", "1e3x5", None, 96):
        with pytest.raises(UserError, match=r"--size: .* is no size; write WIDTHxHEIGHT"):
            read_size(wrong, "--size")


def test_what_a_family_cannot_take_is_refused(drawer, monkeypatch):
    monkeypatch.setattr(drawer.field.backbone, "most_sources", 1)
    with pytest.raises(UserError, match=r"here: 2 source image\(s\), and this student \(flux2_klein\) takes 1"):
        drawer.check(Sample("mix", (picture(1), picture(2))), "here")
    monkeypatch.setattr(drawer.field.backbone, "most_sources", 0)
    with pytest.raises(UserError, match="draws only"):
        drawer.check(Sample("mix", (picture(1),)), "here")
    with pytest.raises(UserError, match="here: picture size 40x64: both sides must be multiples of 16"):
        drawer.check(Sample("ring", size=(40, 64)), "here")
    for scale in (0.5, 101.0, float("nan")):
        with pytest.raises(UserError, match="guidance is"):
            drawer.check(Sample("ring", guidance=scale), "here")


def test_nothing_to_draw_is_nothing(drawer):
    assert drawer.draw([], [], [], STEPS) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a", "b"], [None], [0], 2), "2 prompts, 1 images, 1 seeds"),
        ((["a", " "], [None, None], [0, 0], 2), "sample 1: the prompt is empty"),
        ((["a"], [None], [-1], 2), "sample 0: seed -1 is out of range"),
        ((["a"], [None], [MAX_SEED + 1], 2), "out of range"),
        ((["a"], [None], [0], 0), "steps is 0"),
        ((["a"], [None], [0], 2, 0), "batch is 0"),
    ],
)
def test_bad_samples_are_named(drawer, arguments, words):
    with pytest.raises(UserError, match=words):
        drawer.draw(*arguments)


def test_the_largest_seed_is_taken(drawer):
    assert len(drawer.draw(["a"], [None], [MAX_SEED], 1)) == 1


def test_a_source_is_seen_as_in_training():
    for size in ((64, 64), (100, 80), (70, 200)):
        image = picture(1, size)
        assert np.array_equal(to_pixels(image, 64, 64), load_pixels(encode_picture(image), 64, 64, "here"))


def test_a_source_is_turned_upright():
    upright = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: a viewer rotates it by 90 degrees clockwise
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    turned = decode_picture(buffer.getvalue(), "here")
    assert np.array_equal(to_pixels(turned, 64, 64), to_pixels(upright, 64, 64))


def test_any_image_mode_is_taken():
    for mode in ("L", "RGBA", "P", "1", "LA", "CMYK"):
        assert to_pixels(picture(1).convert(mode), 64, 64).shape == (3, 64, 64)


def test_bad_pictures_are_refused(tmp_path):
    whole = encode_picture(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    with pytest.raises(UserError, match=r"row 3: not a readable image \(none of PNG"):
        decode_picture(b"no picture", "row 3")
    with pytest.raises(UserError, match="row 3: not a readable image"):
        decode_picture(whole[: len(whole) // 2], "row 3")
    with pytest.raises(UserError, match="no such image file"):
        open_image(tmp_path / "none.png")
    (tmp_path / "cut.png").write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"cut\.png: not a readable image"):
        open_image(tmp_path / "cut.png")


def test_open_image_gives_back_what_was_written(tmp_path):
    (tmp_path / "whole.png").write_bytes(encode_picture(picture(5)))
    assert np.array_equal(np.asarray(open_image(tmp_path / "whole.png")), np.asarray(picture(5)))


def test_settings_come_from_the_folder(drawer, backbone):
    exclude = {"base", "revision"}
    assert drawer.settings.model_dump(exclude=exclude) == backbone.settings.model_dump(exclude=exclude)


def test_a_folder_that_is_no_student_is_refused(student_pipeline, tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"no danceopd.json there"):
        open_student(tiny_base)
    with pytest.raises(UserError, match=r"no danceopd.json there"):
        open_student(tmp_path / "none")
    shutil.copy(student_pipeline / "danceopd.json", tmp_path)
    with pytest.raises(UserError, match="no Flux2KleinPipeline folder"):
        open_student(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": -1}, "height: Input should be greater than 0"),
        ({"backbone": "unet"}, "backbone: "),
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
    ],
)
def test_damaged_settings_are_refused(student_pipeline, tmp_path, change, words):
    settings = json.loads((student_pipeline / "danceopd.json").read_text())
    (tmp_path / "danceopd.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=words):
        read_settings(tmp_path)
    (tmp_path / "danceopd.json").write_text("[]")
    with pytest.raises(UserError, match="not a mapping"):
        read_settings(tmp_path)


def test_a_student_is_drawn_as_its_folder_states_unless_a_sample_says_otherwise(student_pipeline, tmp_path):
    shutil.copytree(student_pipeline, tmp_path / "student")
    silent = open_student(tmp_path / "student")
    assert silent.sampling == Sampling(steps=8, guidance=1.0)
    write_sampling(tmp_path / "student", Sampling(steps=2, guidance=40.0, fixed=True))
    drawer = open_student(tmp_path / "student")
    [own] = drawer.draw_samples([Sample("a red ring")])
    asked = [Sample("a red ring", steps=2, guidance=40.0), Sample("a red ring", steps=2, guidance=1.0)]
    guided, plain = silent.draw_samples(asked)
    assert own.tobytes() == guided.tobytes() != plain.tobytes()
    assert drawer.draw_samples(asked[1:])[0].tobytes() == plain.tobytes()
    assert drawer.draw(["a red ring"], [None], [0])[0].tobytes() == own.tobytes()


def test_fields_beside_a_student_are_drawn_as_their_run_drew_them(drawer):
    other = VelocityField("teacher", drawer.field.backbone, drawer.field.network)
    both = {"student": drawer.field, "teacher": other}
    known = replace(drawer, sampling=Sampling(steps=1), samplings={"teacher": Sampling(steps=3, guidance=40.0)})
    drawn = known.draw_fields(both, [Sample("a red ring")])
    [few] = drawer.draw_samples([Sample("a red ring", steps=1)])
    [many] = drawer.draw_samples([Sample("a red ring", steps=3, guidance=40.0)])
    assert (drawn["student"][0].tobytes(), drawn["teacher"][0].tobytes()) == (few.tobytes(), many.tobytes())
    same = known.draw_fields(both, [Sample("a red ring", steps=1, guidance=1.0)])
    assert same["student"][0].tobytes() == same["teacher"][0].tobytes() == few.tobytes()


@pytest.mark.parametrize("found", [{"steps": 0}, {"guidance": 0.5}, {"pace": 3}, [4]])
def test_a_statement_that_does_not_fit_is_refused(student_pipeline, tmp_path, found):
    shutil.copytree(student_pipeline, tmp_path / "student")
    write_json(tmp_path / "student" / SAMPLING, found)
    with pytest.raises(UserError, match=r"sampling\.json: .*; write \{\"steps\": 8, \"guidance\": 1.0, .* or remove"):
        open_student(tmp_path / "student")
