"""Draws and edits pictures from an exported student: the plain interface behind the command line and the servers.

A student is its pipeline folder: diffusers' own layout, with `danceopd.json` beside `model_index.json` naming the
picture size and how prompts are encoded. Pictures do not depend on what else is drawn in the same call.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as attribute
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError
from torch import Tensor

from danceopd.backbones import load_backbone
from danceopd.backbones.base import SETTINGS, Condition
from danceopd.backbones.weights import stored_dtype
from danceopd.config.recipe import ModelRecipe
from danceopd.config.sampling import Sampling, read_sampling
from danceopd.data.encoded import tell_cut
from danceopd.data.pictures import MAX_PIXELS, read_picture
from danceopd.devices import best_device
from danceopd.errors import UserError
from danceopd.files import read_json
from danceopd.flow.fields import Field, VelocityField
from danceopd.flow.guidance import guided_at
from danceopd.flow.sampling import sample_pixels, to_uint8

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAKER, _SOFTWARE = "danceopd", 0x0131


@dataclass(frozen=True)
class Sample:
    """One picture to draw, or to make of others.

    Attributes:
        prompt: caption or instruction.
        sources: pictures to edit, any size and mode; cropped to the picture's ratio and resized. None: draw.
        seed: of the noise it starts from, in [0, 2**63 - 1].
        steps: Euler steps; None: as the field's sampling says.
        guidance: scale of classifier-free guidance, at the price of a second forward pass per step; 1: the plain field.
            None: as the field's sampling says; where nothing says it, the field as it is.
        size: (height, width) in pixels; None: the student's own.
    """

    prompt: str
    sources: tuple[Image.Image, ...] = ()
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Drawer:
    """A loaded student.

    Attributes:
        field: its velocity field.
        settings: picture size and prompt encoding, from the student's folder.
        sampling: steps and guidance where a sample names none, from the student's folder.
        samplings: the same of other fields that are drawn beside it, by name.
    """

    field: VelocityField
    settings: ModelRecipe
    sampling: Sampling = attribute(default_factory=Sampling)
    samplings: Mapping[str, Sampling] = attribute(default_factory=dict)

    def steps_of(self, sample: Sample, field: str = "") -> int:
        """Euler steps that a field takes for a sample: the sample's own, else the field's, else the student's."""
        return sample.steps if sample.steps is not None else self.samplings.get(field, self.sampling).steps

    def guidance_of(self, sample: Sample, field: str = "") -> float | None:
        """The scale at which a field is guided for a sample; None: as the field is."""
        if sample.guidance is not None:
            return sample.guidance
        if field in ("", self.field.name):
            return self.sampling.guidance
        return self.samplings[field].guidance if field in self.samplings else None

    def draw(
        self,
        prompts: list[str],
        images: list[Image.Image | None],
        seeds: list[int],
        steps: int | None = None,
        batch: int = 32,
        guidance: float | None = None,
    ) -> list[Image.Image]:
        """Draw one picture per prompt, or edit one where an image is given; see `draw_samples`.

        Args:
            prompts: captions or instructions, B of them.
            images: pictures to edit. None: draw.
            seeds: B seeds.
            steps: Euler steps, at least 1; None: the student's own.
            batch: samples per forward pass.
            guidance: scale of classifier-free guidance, at least 1 (none); None: the student's own.

        Raises:
            UserError: if the lists differ in length, a prompt is empty, or a number is out of range.
        """
        if not len(prompts) == len(images) == len(seeds):
            counts = f"{len(prompts)} prompts, {len(images)} images, {len(seeds)} seeds"
            raise UserError(f"{counts}; give one of each per sample")
        rows = zip(prompts, images, seeds, strict=True)
        samples = [Sample(text, () if one is None else (one,), int(seed), steps, guidance) for text, one, seed in rows]
        return self.draw_samples(samples, batch)

    def draw_samples(self, samples: list[Sample], batch: int = 1) -> list[Image.Image]:
        """Draw samples of any mixture.

        A picture depends on its own sample alone, up to the rounding of float arithmetic in batches of different size
        (one level of 255); in batches of one it is the same to the bit, whatever else is drawn.

        Raises:
            UserError: naming the sample, if this student cannot draw it.
        """
        return self.draw_fields({self.field.name: self.field}, samples, batch)[self.field.name]

    def draw_fields(
        self, fields: Mapping[str, Field], samples: list[Sample], batch: int = 1
    ) -> dict[str, list[Image.Image]]:
        """Draw the same samples with several fields of the student's base, from the same noise and encodings.

        Args:
            fields: by name; perhaps the student, perhaps its teachers.
            samples: what to draw.
            batch: samples per forward pass.

        Returns:
            For each field its pictures in the samples' order.

        Raises:
            UserError: naming the sample, if this student cannot draw it.
        """
        if batch < 1:
            raise UserError(f"batch is {batch}; use 1 or more")
        for row, sample in enumerate(samples):
            self.check(sample, f"sample {row}")
        tell_cut(self.field.backbone, [(sample.prompt, len(sample.sources)) for sample in samples])
        groups: dict[tuple, list[int]] = {}  # one shape, one grid and one guidance per batch
        for row, sample in enumerate(samples):
            key = len(sample.sources), sample.steps, sample.guidance, self._size(sample)
            groups.setdefault(key, []).append(row)
        drawn: dict[str, dict[int, Image.Image]] = {name: {} for name in fields}
        for rows in groups.values():
            first = samples[rows[0]]
            guided = {name: self._guided(field, self.guidance_of(first, name)) for name, field in fields.items()}
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                condition = self._condition([samples[row] for row in part])
                seeds = [samples[row].seed for row in part]
                for name, field in guided.items():
                    pixels = to_uint8(sample_pixels(field, condition, seeds, self.steps_of(first, name)))
                    drawn[name] |= {row: Image.fromarray(one) for row, one in zip(part, pixels, strict=True)}
        return {name: [pictures[row] for row in range(len(samples))] for name, pictures in drawn.items()}

    def check(self, sample: Sample, where: str) -> None:
        """Refuse what this student cannot draw, without drawing.

        Raises:
            UserError: naming `where`.
        """
        check_prompt(sample.prompt, where)
        if not 0 <= sample.seed <= MAX_SEED:
            raise UserError(f"{where}: seed {sample.seed} is out of range; use 0 to {MAX_SEED}")
        if sample.steps is not None and not 1 <= sample.steps <= MAX_STEPS:
            raise UserError(f"{where}: steps is {sample.steps}; use 1 to {MAX_STEPS}")
        if sample.guidance is not None and not 1 <= sample.guidance <= MAX_GUIDANCE:  # nan is not, either
            raise UserError(f"{where}: guidance is {sample.guidance}; use 1 (none) to {MAX_GUIDANCE:g}")
        self.check_shape(len(sample.sources), sample.size, where)

    def check_shape(self, sources: int, size: tuple[int, int] | None, where: str) -> None:
        """Refuse a number of source images or a picture size that the student's family does not take.

        Raises:
            UserError: naming `where`.
        """
        most = self.field.backbone.most_sources
        if most is not None and sources > most:
            known = "draws only; it takes no source image" if most == 0 else f"takes {most} source image(s) at most"
            raise UserError(f"{where}: {sources} source image(s), and this student ({self.settings.backbone}) {known}")
        try:
            self.field.backbone.latent_shape(*(size or (self.settings.height, self.settings.width)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def _size(self, sample: Sample) -> tuple[int, int]:
        return sample.size or (self.settings.height, self.settings.width)

    @staticmethod
    @torch.no_grad()
    def _guided(field: Field, guidance: float | None) -> Field:
        def empty() -> Tensor:
            return field.backbone.encode_prompts([""])[0].to(next(field.network.parameters()).device)

        return field if guidance is None else guided_at(field, guidance, empty)

    @torch.no_grad()
    def _condition(self, samples: list[Sample]) -> Condition:
        """Of samples of one size and number of sources."""
        backbone, (height, width) = self.field.backbone, self._size(samples[0])
        device = next(self.field.network.parameters()).device
        shown = [[to_pixels(image, height, width) for image in sample.sources] for sample in samples]
        # The first sources of all samples, then the second ones, laid one behind the other.
        places = [backbone.encode_images(torch.stack(list(place))) for place in zip(*shown, strict=True)]
        source = torch.cat(places, dim=1).to(device) if places else None
        prompt = backbone.encode_prompts([sample.prompt for sample in samples], shown if places else None)
        return Condition(prompt.to(device), source, height, width)


def check_prompt(prompt: object, where: str) -> None:
    """Refuse what is no text that a tokenizer takes.

    Raises:
        UserError: naming `where`.
    """
    if not isinstance(prompt, str):
        raise UserError(f"{where}: the prompt is {type(prompt).__name__}, not text; say what to draw or to change")
    if not prompt.strip():
        raise UserError(f"{where}: the prompt is empty; say what to draw or to change")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # JSON can write them, UTF-8 cannot
        raise UserError(f"{where}: the prompt holds half a character (a lone surrogate); write it anew")


def read_size(text: object, where: str) -> tuple[int, int]:
    """A size written as WIDTHxHEIGHT, as (height, width).

    Raises:
        UserError: if it is written otherwise.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text.strip()) if isinstance(text, str) else None
    if found is None:
        raise UserError(f"{where}: {text!r} is no size; write WIDTHxHEIGHT in pixels, for example 1024x768")
    return int(found[2]), int(found[1])


def to_fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """A picture turned upright by its EXIF tag, cropped to the ratio of a size and brought to it."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return image


def to_pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """A picture as (3, height, width) float32 in [-1, 1], fitted to that size."""
    pixels = np.array(to_fitted(image, height, width))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def decode_picture(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Picture bytes as an upright RGB picture, seen as training sees them (see `data.pictures`).

    Raises:
        UserError: naming `where`, if the bytes are no whole picture, or one of more than `max_pixels`.
    """
    return read_picture(data, where, max_pixels=max_pixels).image


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


def encode_file(image: Image.Image, ending: str) -> bytes:
    """A picture's bytes in the format of a file's ending, marked as drawn here (EXIF's `Software`)."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[_SOFTWARE] = MAKER
    image.save(buffer, FORMATS[ending], exif=exif, quality=95)
    return buffer.getvalue()


def is_drawn(path: Path) -> bool:
    """Whether a file is a picture that `encode_file` wrote, so that another may take its place."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(_SOFTWARE) == MAKER
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


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


def open_student(folder: Path, dtype: str | None = None) -> Drawer:
    """Load an exported student from its pipeline folder.

    Args:
        folder: the pipeline's.
        dtype: of its transformer's weights; None: as they lie in their files, where a CPU maps them into memory.

    Raises:
        UserError: if the folder is no student's pipeline.
    """
    settings = read_settings(folder).model_copy(update={"dtype": dtype or own_dtype(folder)})
    backbone = load_backbone(Path(folder), settings, best_device())
    sampling = read_sampling(folder) or Sampling()
    return Drawer(VelocityField("student", backbone, backbone.transformer), settings, sampling)


def own_dtype(folder: Path) -> str:
    """The dtype in which a student's transformer was written."""
    return str(stored_dtype(Path(folder) / "transformer")).removeprefix("torch.")
