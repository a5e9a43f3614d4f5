"""What is measured on a drawn picture, one value a sample; every metric is named once, in `METRICS`.

The small world's metrics read a picture back exactly: each place of the board is compared with every rendering it could
hold, and counts as whatever is nearest. The others need no more than a source and a target image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from danceopd.data import world
from danceopd.data.encoded import load_pixels
from danceopd.data.records import Record
from danceopd.errors import UserError, unknown_name
from danceopd.sample import to_uint8

MAX_PSNR = 60.0
_CHUNK = 4  # pictures compared at once: bounds the memory SSIM takes on large ones, and is its fastest on small ones

_ADVICE = {
    "source": "give the held-out records source images, or measure this task by another metric",
    "target": "give the held-out records target images, or measure this task by another metric",
    "scene": "only the small world's records have one; measure this task by psnr or ssim",
    "position": "only the small world's local edits have one; measure this task by psnr or ssim",
}


@dataclass(frozen=True)
class Metric:
    """One way to score pictures; higher is better for all.

    Attributes:
        name: as recipes write it.
        unit: `rate` (0 or 1 a sample, a share as a mean), `dB`, or `index` (at most 1).
        meaning: one line for the report.
        needs: what a record must have: `source`, `target`, or facts of its provenance.
        measure: pictures (B, H, W, 3) uint8 and their B records to B values.
    """

    name: str
    unit: Literal["rate", "dB", "index"]
    meaning: str
    needs: tuple[str, ...]
    measure: Callable[[np.ndarray, list[Record]], list[float]]

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

    def score(self, pictures: np.ndarray, records: list[Record]) -> list[float]:
        """One value a sample.

        Args:
            pictures: (B, H, W, 3) uint8.
            records: the B records the pictures were drawn for.

        Raises:
            UserError: if a record lacks what the metric needs, or the pictures do not suit it.
        """
        if len(pictures) != len(records):
            raise ValueError(f"{len(pictures)} pictures for {len(records)} records")
        self.check(records)
        return self.measure(pictures, records) if records else []


def _has(record: Record, need: str) -> bool:
    if need in ("source", "target"):
        return getattr(record, need) is not None
    facts = record.facts()
    if need == "position":
        return facts.get("position") in world.POSITIONS
    try:
        scene = world.Scene.from_json(facts["scene"])
    except (KeyError, TypeError):
        return False
    return scene.background in world.BACKGROUNDS and set(scene.things) <= set(world.ALL_THINGS)


@cache
def _candidates(position: str) -> tuple[tuple[tuple[str, world.Thing | None], ...], np.ndarray]:
    """Everything one place can hold, as (background, thing), and its renderings (K, CELL * CELL * 3)."""
    things = [None, *(t for t in world.ALL_THINGS if t.position == position)]
    options = tuple((background, thing) for background in world.BACKGROUNDS for thing in things)
    return options, np.stack([world.draw_cell(background, position, thing).ravel() for background, thing in options])


def _board(pictures: np.ndarray, name: str) -> np.ndarray:
    """Pictures as means of the board's grid pixels, (B, GRID, GRID, 3) float64.

    A rendering is constant inside a grid pixel, so nearest by squared error is the same on means as on pixels.
    """
    if pictures.shape[1:] != (world.SIZE, world.SIZE, 3):
        height, width = pictures.shape[1:3]
        raise UserError(f"metric '{name}' reads the small world's {world.SIZE}x{world.SIZE} pictures, these are "
                        f"{height}x{width}; set model.height and model.width to {world.SIZE}")  # fmt: skip
    shape = (len(pictures), world.GRID, world.SCALE, world.GRID, world.SCALE, 3)
    return pictures.reshape(shape).mean(axis=(2, 4), dtype=np.float64)


def _distances(board: np.ndarray, position: str) -> np.ndarray:
    """Squared error (B, K) between one place of the boards and its candidates."""
    cells = board[(slice(None), *world.cell_slice(position, scale=1))].reshape(len(board), 1, -1)
    return np.square(cells - _candidates(position)[1]).sum(axis=-1)


def _scene(record: Record) -> world.Scene:
    return world.Scene.from_json(record.facts()["scene"])


def _scene_accuracy(pictures: np.ndarray, records: list[Record]) -> list[float]:
    board = _board(pictures, "scene_accuracy")
    scenes = [_scene(r) for r in records]
    right = np.ones(len(records), dtype=bool)
    for position in world.POSITIONS:
        options, _ = _candidates(position)
        wanted = [options.index((scene.background, scene.at(position))) for scene in scenes]
        right &= _distances(board, position).argmin(axis=1) == wanted
    return right.astype(float).tolist()


def _edit_success(pictures: np.ndarray, records: list[Record]) -> list[float]:
    board = _board(pictures, "edit_success")
    values = np.zeros(len(records))
    places = [r.facts()["position"] for r in records]
    for position in sorted(set(places)):
        rows = [i for i, place in enumerate(places) if place == position]
        scenes = [_scene(records[i]) for i in rows]
        options, _ = _candidates(position)
        backgrounds = np.array([background for background, _ in options])
        elsewhere = backgrounds != np.array([scene.background for scene in scenes])[:, None]
        nearest = np.where(elsewhere, np.inf, _distances(board[rows], position)).argmin(axis=1)
        values[rows] = [options[k][1] == scene.at(position) for k, scene in zip(nearest, scenes, strict=True)]
    return values.tolist()


def read_picture(data: bytes, height: int, width: int, where: str) -> np.ndarray:
    """Picture bytes as (height, width, 3) uint8; another size is cropped and resized as it is for training.

    Raises:
        UserError: naming `where`, if the bytes are no picture.
    """
    return to_uint8(load_pixels(data, height, width, where)[None])[0]


def _decoded(records: list[Record], field: str, shape: tuple[int, ...]) -> np.ndarray:
    height, width = shape[1:3]
    parts = [read_picture(getattr(r, field), height, width, f"record {r.id!r}, field '{field}'") for r in records]
    return np.stack(parts)


def _unit_range(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def _against_targets(
    pictures: np.ndarray, records: list[Record], compare: Callable[[Tensor, Tensor], Tensor]
) -> list[float]:
    values: list[float] = []
    for start in range(0, len(records), _CHUNK):
        part = pictures[start : start + _CHUNK]
        targets = _decoded(records[start : start + _CHUNK], "target", part.shape)
        values += compare(_unit_range(part), _unit_range(targets)).tolist()
    return values


def _psnr(pictures: np.ndarray, records: list[Record]) -> list[float]:
    from torchmetrics.functional.image import peak_signal_noise_ratio  # slow to import

    def compare(drawn: Tensor, wanted: Tensor) -> Tensor:
        value = peak_signal_noise_ratio(drawn, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
        return value.clamp(0, MAX_PSNR)

    return _against_targets(pictures, records, compare)


def _ssim(pictures: np.ndarray, records: list[Record]) -> list[float]:
    from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import

    def compare(drawn: Tensor, wanted: Tensor) -> Tensor:
        return structural_similarity_index_measure(drawn, wanted, data_range=1.0, reduction="none")

    return _against_targets(pictures, records, compare)


def _preserved_psnr(pictures: np.ndarray, records: list[Record]) -> list[float]:
    from torchmetrics.functional.image import peak_signal_noise_ratio  # slow to import

    values = []
    for picture, record in zip(pictures, records, strict=True):
        source, target = (_decoded([record], field, (1, *picture.shape))[0] for field in ("source", "target"))
        outside = (source == target).all(axis=-1)
        if not outside.any():
            raise UserError(f"record {record.id!r}: metric 'preserved_psnr' finds no pixel that source and target "
                            "share; measure this task by psnr or ssim")  # fmt: skip
        drawn, wanted = (torch.from_numpy(p[outside]).float() / 255 for p in (picture, target))
        value = peak_signal_noise_ratio(drawn, wanted, data_range=1.0)
        values.append(value.clamp(0, MAX_PSNR).item())
    return values


METRICS = {
    m.name: m
    for m in (
        Metric(
            "scene_accuracy", "rate", "share of pictures in which every place and the background are right",
            ("scene",), _scene_accuracy,
        ),
        Metric(
            "edit_success", "rate", "share of pictures in which the edited place holds exactly what was asked for",
            ("scene", "position"), _edit_success,
        ),
        Metric(
            "preserved_psnr", "dB", "PSNR to the target over the pixels the edit should leave alone, at most 60 dB",
            ("source", "target"), _preserved_psnr,
        ),
        Metric("psnr", "dB", "PSNR to the target over the whole picture, at most 60 dB", ("target",), _psnr),
        Metric("ssim", "index", "structural similarity to the target, 1 when equal", ("target",), _ssim),
    )
}  # fmt: skip


def metric(name: str) -> Metric:
    """A metric by name.

    Raises:
        UserError: if there is none, listing the names.
    """
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    return METRICS[name]
