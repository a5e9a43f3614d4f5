"""Every family behind `danceopd generate` and `danceopd serve`: what it draws, and what it says it cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_models import FAMILIES

from danceopd.backbones import load_backbone
from danceopd.errors import UserError
from danceopd.flow.fields import VelocityField
from danceopd.inference.generate import Drawer, Sample

MOST = {"flux2_klein": None, "z_image": 1, "sd3": 0, "qwen_image": None}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_samples_of_any_mixture_are_drawn_or_refused_by_name(folder_of, family):
    base = load_backbone(folder_of(family), family.shape())
    drawer = Drawer(VelocityField("student", base, base.transformer), family.shape())
    most = MOST[family.name]
    plain = Sample("a red ring", (), 3, 1)
    samples = [plain, replace(plain, guidance=3.0), replace(plain, size=(64, 96))]
    samples += [
        replace(plain, sources=tuple(picture(seed) for seed in range(count)))
        for count in (1, 2)
        if most is None or count <= most
    ]
    drawn = drawer.draw_samples(samples)
    assert [image.size for image in drawn] == [(s.size or (64, 64))[::-1] for s in samples]
    assert len({image.tobytes() for image in drawn}) == len(samples), "guidance, size and every source matter"
    assert drawer.draw_samples([samples[-1]])[0].tobytes() == drawn[-1].tobytes()
    if most is not None:
        too_many = replace(plain, sources=(picture(0),) * (most + 1))
        with pytest.raises(
            UserError, match=rf"sample 1: {most + 1} source image\(s\), and this student \({family.name}\)"
        ):
            drawer.draw_samples([plain, too_many])
