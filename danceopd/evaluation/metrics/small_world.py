"""The small world's metrics: they read a picture back exactly.

Each place of the board is compared with every rendering it could hold, and counts as whatever is nearest.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from danceopd.data import world
from danceopd.data.records import Record
from danceopd.errors import UserError
from danceopd.evaluation.metrics.base import Metric
from danceopd.evaluation.metrics.tools import Tools


@cache
def candidates(position: str) -> tuple[tuple[tuple[str, world.Thing | None], ...], np.ndarray]:
    """Everything one place can hold, as (background, thing), and its renderings (K, CELL * CELL * 3)."""
    things = [None, *(t for t in world.ALL_THINGS if t.position == position)]
    options = tuple((background, thing) for background in world.BACKGROUNDS for thing in things)
    return options, np.stack([world.draw_cell(background, position, thing).ravel() for background, thing in options])


def board(pictures: np.ndarray, name: str) -> np.ndarray:
    """Pictures as means of the board's grid pixels, (B, GRID, GRID, 3) float64.

    A rendering is constant inside a grid pixel, so nearest by squared error is the same on means as on pixels.
    """
    if pictures.shape[1:] != (world.SIZE, world.SIZE, 3):
        height, width = pictures.shape[1:3]
        raise UserError(
            f"metric '{name}' reads the small world's {world.SIZE}x{world.SIZE} pictures, these are "
            f"{height}x{width}; set model.height and model.width to {world.SIZE}"
        )
    shape = (len(pictures), world.GRID, world.SCALE, world.GRID, world.SCALE, 3)
    return pictures.reshape(shape).mean(axis=(2, 4), dtype=np.float64)


def distances(board: np.ndarray, position: str) -> np.ndarray:
    """Squared error (B, K) between one place of the boards and its candidates."""
    cells = board[(slice(None), *world.cell_slice(position, scale=1))].reshape(len(board), 1, -1)
    return np.square(cells - candidates(position)[1]).sum(axis=-1)


def _scene(record: Record) -> world.Scene:
    return world.Scene.from_json(record.facts()["scene"])


def _scene_accuracy(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    read = board(pictures, "scene_accuracy")
    scenes = [_scene(r) for r in records]
    right = np.ones(len(records), dtype=bool)
    for position in world.POSITIONS:
        options = candidates(position)[0]
        wanted = [options.index((scene.background, scene.at(position))) for scene in scenes]
        right &= distances(read, position).argmin(axis=1) == wanted
    return right.astype(float).tolist()


def _edit_success(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    read = board(pictures, "edit_success")
    values = np.zeros(len(records))
    places = [r.facts()["position"] for r in records]
    for position in sorted(set(places)):
        rows = [i for i, place in enumerate(places) if place == position]
        scenes = [_scene(records[i]) for i in rows]
        options = candidates(position)[0]
        backgrounds = np.array([background for background, _ in options])
        elsewhere = backgrounds != np.array([scene.background for scene in scenes])[:, None]
        nearest = np.where(elsewhere, np.inf, distances(read[rows], position)).argmin(axis=1)
        values[rows] = [options[k][1] == scene.at(position) for k, scene in zip(nearest, scenes, strict=True)]
    return values.tolist()


METRICS = (
    Metric(
        "scene_accuracy",
        "rate",
        "share of pictures in which every place and the background are right",
        ("scene",),
        _scene_accuracy,
    ),
    Metric(
        "edit_success",
        "rate",
        "share of pictures in which the edited place holds exactly what was asked for",
        ("scene", "position"),
        _edit_success,
    ),
)
