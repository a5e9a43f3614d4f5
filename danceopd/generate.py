"""Draws and edits pictures from an exported student: the plain interface behind the command line and the served model.

A student is its pipeline folder: diffusers' own layout, with `danceopd.json` beside `model_index.json` naming the
picture size and how prompts are encoded. Pictures do not depend on what else is drawn in the same call.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import ValidationError
from torch import Tensor

from danceopd.backbones import Condition, load_backbone
from danceopd.backbones.base import SETTINGS
from danceopd.devices import best_device
from danceopd.errors import UserError
from danceopd.fields import VelocityField
from danceopd.files import read_json
from danceopd.recipe import ModelRecipe
from danceopd.sample import sample_pixels, to_uint8

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Drawer:
    """A loaded student.

    Attributes:
        field: its velocity field.
        settings: picture size and prompt encoding, from the student's folder.
    """

    field: VelocityField
    settings: ModelRecipe

    def draw(
        self, prompts: list[str], images: list[Image.Image | None], seeds: list[int], steps: int, batch: int = 32
    ) -> list[Image.Image]:
        """Draw one picture a prompt, or edit one where an image is given.

        A picture depends on its own prompt, image and seed alone, up to the rounding of float arithmetic in batches of
        different size (one level of 255).

        Args:
            prompts: captions or instructions, B of them.
            images: pictures to edit, any size and mode; cropped to the student's ratio and resized. None: draw.
            seeds: B seeds in [0, 2**63 - 1].
            steps: Euler steps, at least 1.
            batch: samples a forward pass.

        Raises:
            UserError: if the lists differ in length, a prompt is empty, or a number is out of range.
        """
        _check(prompts, images, seeds, steps, batch)
        drawn: dict[int, Image.Image] = {}
        for has_source in (False, True):  # one sequence length a batch
            rows = [row for row, image in enumerate(images) if (image is not None) == has_source]
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                condition = self._condition([prompts[row] for row in part], [images[row] for row in part])
                pixels = to_uint8(sample_pixels(self.field, condition, [int(seeds[row]) for row in part], steps))
                drawn |= {row: Image.fromarray(picture) for row, picture in zip(part, pixels, strict=True)}
        return [drawn[row] for row in range(len(prompts))]

    @torch.no_grad()
    def _condition(self, prompts: list[str], images: list[Image.Image | None]) -> Condition:
        backbone, height, width = self.field.backbone, self.settings.height, self.settings.width
        device = next(self.field.network.parameters()).device
        pixels = [to_pixels(image, height, width) for image in images if image is not None]
        source = backbone.encode_images(torch.stack(pixels)).to(device) if pixels else None
        prompt = backbone.encode_prompts(prompts, [[shown] for shown in pixels] or None)
        return Condition(prompt.to(device), source, height, width)


def _check(prompts: list[str], images: list, seeds: list[int], steps: int, batch: int) -> None:
    if not len(prompts) == len(images) == len(seeds):
        raise UserError(f"{len(prompts)} prompts, {len(images)} images, {len(seeds)} seeds; give one of each a sample")
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"sample {row}: the prompt is empty; say what to draw or to change")
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"sample {row}: seed {seed} is out of range; use 0 to {MAX_SEED}")
    for name, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name} is {value}; use 1 or more")


def to_pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """A picture as (3, height, width) float32 in [-1, 1]: turned upright by its EXIF tag, cropped, resized."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def decode_picture(data: bytes, where: str) -> Image.Image:
    """Picture bytes, decoded to the last one.

    Raises:
        UserError: naming `where`, if the bytes are no whole picture.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow raises many kinds for damaged files
        text = "unknown format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise UserError(f"{where}: not a readable image ({text}); give a whole PNG or JPEG") from error
    return image


def open_image(path: Path) -> Image.Image:
    """A picture from a file.

    Raises:
        UserError: if there is no such file, or it is no picture.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such image file")
    return decode_picture(path.read_bytes(), str(path))


def encode_picture(image: Image.Image) -> bytes:
    """PNG bytes of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read_settings(folder: Path) -> ModelRecipe:
    """The settings a student was exported with.

    Raises:
        UserError: if the folder has none, or they do not fit.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise UserError(f"{folder}: no {SETTINGS} there; give the pipeline folder that a distillation run exported")
    settings = read_json(path)
    try:
        return ModelRecipe.model_validate({**settings, "base": str(folder)})
    except (ValidationError, TypeError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "not a mapping"}
        where = ".".join(map(str, what["loc"]))
        raise UserError(f"{path}: {where}{': ' if where else ''}{what['msg']}; export the student again") from error


def open_student(folder: Path) -> Drawer:
    """Load an exported student from its pipeline folder.

    Raises:
        UserError: if the folder is no student's pipeline.
    """
    settings = read_settings(folder)
    backbone = load_backbone(Path(folder), settings, best_device())
    return Drawer(VelocityField("student", backbone, backbone.transformer), settings)
