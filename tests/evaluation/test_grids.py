"""Picture grids keep every pixel, mark what is wrong, and leave empty places empty."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from danceopd.evaluation.grids import _wrap, fit_scale, picture_grid, resize

RED, GREEN, BLUE = ((255, 0, 0), (0, 200, 0), (0, 0, 255))


def plain(color: tuple[int, int, int], height: int = 16, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def count(image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == color).all(axis=-1).sum())


def test_every_picture_is_there_at_its_scale_and_in_its_place():
    image = picture_grid([[plain(RED), plain(GREEN)], [plain(BLUE), None]], ["a", "b"], ["one", "two"], scale=3)
    assert [count(image, c) for c in (RED, GREEN, BLUE)] == [48 * 48] * 3
    pixels = np.asarray(image)
    where = {c: np.argwhere((pixels == c).all(axis=-1)).mean(axis=0) for c in (RED, GREEN, BLUE)}
    assert where[RED][0] == where[GREEN][0] < where[BLUE][0]
    assert where[RED][1] == where[BLUE][1] < where[GREEN][1]


def test_a_wrong_picture_is_outlined_and_no_other():
    rows = [[plain(GREEN), plain(BLUE)]]
    outline = (207, 34, 46)
    assert count(picture_grid(rows, ["a", "b"], [""]), outline) == 0
    image = picture_grid(rows, ["a", "b"], [""], 2, {(0, 1)})
    assert count(image, outline) == 38 * 38 - 32 * 32
    columns = np.argwhere((np.asarray(image) == outline).all(axis=-1))[:, 1]
    assert columns.min() > np.argwhere((np.asarray(image) == GREEN).all(axis=-1))[:, 1].max()


def test_row_titles_take_room_only_when_there_are_any():
    rows = [[plain(RED)]]
    assert picture_grid(rows, ["a"], [""]).width < picture_grid(rows, ["a"], ["draw it"]).width


@pytest.mark.parametrize("scale", [0.25, 1, 2])
def test_any_scale_and_shape(scale):
    image = picture_grid([[plain(RED, 32, 64)]], ["wide"], ["x"], scale)
    assert count(image, RED) == round(32 * scale) * round(64 * scale)


@pytest.mark.parametrize("text", ["", "short", "a few words that need two lines", "w" * 300, "図を赤くする " * 40])
def test_wrapped_text_stays_in_its_box(text):
    font = ImageFont.load_default(size=14)
    lines = _wrap(text, font, 120, 3)
    assert 1 <= len(lines) <= 3
    assert all(font.getlength(line) <= 120 for line in lines)
    if len(text) > 100:
        assert lines[-1].endswith("…")
    else:
        assert " ".join(lines) == text


def test_fit_scale_enlarges_by_whole_factors_and_reduces_exactly():
    assert fit_scale(plain(RED, 64, 64), 128) == 2
    assert fit_scale(plain(RED, 100, 60), 128) == 1
    assert max(resize(plain(RED, 512, 256), fit_scale(plain(RED, 512, 256), 128)).size) == 128


@pytest.mark.parametrize(
    "rows, columns, titles",
    [([[plain(RED)]], ["a", "b"], [""]), ([[plain(RED)]], ["a"], []), ([[None]], ["a"], [""]), ([], [], [])],
)
def test_titles_that_do_not_match_and_grids_without_pictures_are_refused(rows, columns, titles):
    with pytest.raises(ValueError, match="picture_grid"):
        picture_grid(rows, columns, titles)
