"""What a metric is, and what all of them read pictures with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch import Tensor

from danceopd.data import world
from danceopd.data.encoded import load_pixels
from danceopd.data.records import Record
from danceopd.errors import UserError
from danceopd.flow.sampling import to_uint8

if TYPE_CHECKING:
    from danceopd.evaluation.metrics.tools import Tools

MAX_PSNR = 60.0
CHUNK = 4  # pictures compared at once: bounds the memory SSIM takes on large ones, and is its fastest on small ones

_ADVICE = {
    "source": "give the held-out records source images, or measure this task by another metric",
    "target": "give the held-out records target images, or measure this task by another metric",
    "scene": "only the small world's records have one; measure this task by psnr or ssim",
    "position": "only the small world's local edits have one; measure this task by psnr or ssim",
    "wanted": "only the small world's drawings and edits have one; measure this task by psnr or ssim",
    "mask": "give it source and target images, or a 'mask' or 'box' in its provenance",
}

Unit = Literal["rate", "dB", "index", "score", "distance"]


@dataclass(frozen=True)
class Metric:
    """One way to score pictures; higher is better for all.

    Attributes:
        name: as recipes write it.
        unit: `rate` (0 or 1 per sample, a share as a mean), `dB`, `index` (at most 1), `score` (0 to 10), or `distance`
            (minus a distance: at most 0).
        meaning: one line for the report.
        needs: what a record must have: `source`, `target`, `mask`, or facts of its provenance.
        measure: pictures (B, H, W, 3) uint8, their B records and the tools to B values; of a set metric, to one.
        tools: what it looks with (see `Tools`): networks, or the judge.
        of_set: whether it judges all pictures together, and no single one.
    """

    name: str
    unit: Unit
    meaning: str
    needs: tuple[str, ...]
    measure: Callable[[np.ndarray, list[Record], Tools], list[float]]
    tools: tuple[str, ...] = ()
    of_set: bool = False

    def check(self, records: list[Record]) -> None:
        """Check that every record has what this metric needs.

        Raises:
            UserError: naming the first record that has not, and the metric.
        """
        for record in records:
            for need in self.needs:
                if not _has(record, need):
                    raise UserError(
                        f"record {record.id!r}: metric '{self.name}' needs a {need} and it has none; {_ADVICE[need]}"
                    )
        if self.of_set and len(records) == 1:
            raise UserError(f"metric '{self.name}' compares sets of pictures and there is one record; give more")

    def score(self, pictures: np.ndarray, records: list[Record], tools: Tools | None = None) -> list[float]:
        """One value per sample; of a set metric, one value in all.

        Args:
            pictures: (B, H, W, 3) uint8.
            records: the B records the pictures were drawn for.
            tools: what the metric looks with; not needed where it names none.

        Raises:
            UserError: if a record lacks what the metric needs, or the pictures do not suit it.
        """
        if len(pictures) != len(records):
            raise ValueError(f"{len(pictures)} pictures for {len(records)} records")
        self.check(records)
        # One that names no tools looks at none.
        return self.measure(pictures, records, cast("Tools", tools)) if records else []


def _has(record: Record, need: str) -> bool:
    if need in ("source", "target"):
        return getattr(record, need) is not None
    facts = record.facts()
    if need == "mask":
        both = record.source is not None and record.target is not None
        return both or facts.get("mask") is not None or facts.get("box") is not None
    if need == "position":
        return facts.get("position") in world.POSITIONS
    if need == "wanted":
        return _says_what_is_wanted(facts)
    try:
        scene = world.Scene.from_json(facts["scene"])
    except (KeyError, TypeError):
        return False
    return scene.background in world.BACKGROUNDS and set(scene.things) <= set(world.ALL_THINGS)


def _says_what_is_wanted(facts: dict) -> bool:
    try:
        wanted = world.Wanted.from_json(facts["wanted"])
        scenes = wanted.scenes()
    except (KeyError, TypeError, ValueError):
        return False
    return wanted.background in world.BACKGROUNDS and bool(scenes) and set(scenes[0].things) <= set(world.ALL_THINGS)


def read_picture(data: bytes, height: int, width: int, where: str) -> np.ndarray:
    """Picture bytes as (height, width, 3) uint8; another size is cropped and resized as it is for training.

    Raises:
        UserError: naming `where`, if the bytes are no picture.
    """
    return to_uint8(load_pixels(data, height, width, where)[None])[0]


def picture_of(record: Record, field: str, shape: tuple[int, ...]) -> np.ndarray:
    """A record's source or target at the size (H, W, ...) of a drawn picture, (H, W, 3) uint8."""
    height, width = shape[:2]
    return read_picture(getattr(record, field), height, width, f"record {record.id!r}, field '{field}'")


def pictures_of(records: list[Record], field: str, shape: tuple[int, ...]) -> np.ndarray:
    """The records' sources or targets at one size, (B, H, W, 3) uint8."""
    return np.stack([picture_of(record, field, shape) for record in records])


def image_functions() -> ModuleType:
    """torchmetrics' image metrics as functions; slow to import, and quiet about parts of transformers it looks for."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torchmetrics.functional import image
    finally:
        logger.setLevel(level)
    return image


def unit_range(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 as (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def chunks(pictures: np.ndarray, records: list[Record], size: int = CHUNK) -> Iterator[tuple[np.ndarray, list[Record]]]:
    """Pictures and their records, a few at a time."""
    for start in range(0, len(records), size):
        yield pictures[start : start + size], records[start : start + size]
