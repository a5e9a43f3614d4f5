"""How a registered model is named, and what it must draw before it is served."""

from __future__ import annotations

import pytest
from PIL import Image

from danceopd.errors import UserError
from danceopd.serving.follower import try_out
from danceopd.serving.reference import Reference, parse_reference


class OfOneColor:
    def draw_samples(self, samples):
        return [Image.new("RGB", (8, 8), "black")]


class Broken:
    def draw_samples(self, samples):
        raise RuntimeError("out of paint")


@pytest.mark.parametrize(("drawer", "words"), [(OfOneColor(), "is of one color"), (Broken(), "(out of paint)")])
def test_a_student_that_cannot_draw_a_probe_is_not_served(drawer, words):
    with pytest.raises(UserError) as refusal:
        try_out(drawer, "x version 3")
    assert words in str(refusal.value) and "x version 3" in str(refusal.value)


def test_references():
    assert parse_reference("models:/a-b@champion") == Reference("a-b", "champion")
    assert parse_reference("runs/world/students/x/pipeline") is None
    for text in ("models:/a", "models:/a/3", "models:a@b"):
        with pytest.raises(UserError, match="write it as models:/NAME@ALIAS"):
            parse_reference(text)
