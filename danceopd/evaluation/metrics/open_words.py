"""The small world's metrics for words that leave something open: any whole scene that they allow is right.

A record says which scenes its words allow (`world.Wanted`); a picture is judged against the nearest of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from danceopd.data import world
from danceopd.data.records import Record
from danceopd.evaluation.metrics.base import Metric, pictures_of
from danceopd.evaluation.metrics.editing import psnr_over
from danceopd.evaluation.metrics.small_world import board, candidates, distances
from danceopd.evaluation.metrics.tools import Tools

SHARP = 30.0  # dB: what blurs two scenes stays well below it, what the autoencoder loses well above

Score = Callable[[np.ndarray, list[Record], Tools], list[float]]

_EVERYWHERE = np.ones((world.SIZE, world.SIZE), bool)


@cache
def _places(position: str) -> dict[tuple[str, world.Thing | None], int]:
    """The index of everything that one place can hold, among its candidates."""
    return {option: k for k, option in enumerate(candidates(position)[0])}


@cache
def _allowed(wanted: world.Wanted) -> tuple[tuple[world.Scene, ...], np.ndarray]:
    """The S scenes that words allow, and what each of the four places holds in them as indices, (S, 4)."""
    scenes = tuple(wanted.scenes())
    held = [[_places(p)[scene.background, scene.at(p)] for p in world.POSITIONS] for scene in scenes]
    return scenes, np.array(held)


@dataclass(frozen=True)
class _Reading:
    """What a picture shows.

    Attributes:
        scene: the nearest scene of those that its words allow.
        whole: whether every place is nearer to what this scene holds there than to anything else.
        psnr: dB to this scene's rendering.
    """

    scene: world.Scene
    whole: bool
    psnr: float

    @property
    def valid(self) -> bool:
        return self.whole and self.psnr >= SHARP


def _wanted(record: Record) -> world.Wanted:
    return world.Wanted.from_json(record.facts()["wanted"])


def _read(pictures: np.ndarray, records: list[Record], name: str) -> list[_Reading]:
    drawn = board(pictures, name)
    apart = [distances(drawn, position) for position in world.POSITIONS]
    readings = []
    for row, (picture, record) in enumerate(zip(pictures, records, strict=True)):
        scenes, held = _allowed(_wanted(record))
        nearest = np.sum([d[row][held[:, place]] for place, d in enumerate(apart)], axis=0).argmin()
        whole = [d[row].argmin() for d in apart] == held[nearest].tolist()
        readings.append(
            _Reading(scenes[nearest], whole, psnr_over(_EVERYWHERE, picture, world.render(scenes[nearest])))
        )
    return readings


def _valid(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    return [float(reading.valid) for reading in _read(pictures, records, "valid")]


def _sharpness(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    return [reading.psnr for reading in _read(pictures, records, "sharpness")]


def _left_open(score: Score) -> Score:
    """The mean of a metric over the records whose words leave something open; no value where none do."""

    def scored(pictures: np.ndarray, records: list[Record], tools: Tools) -> list[float]:
        rows = [row for row, record in enumerate(records) if len(_allowed(_wanted(record))[0]) > 1]
        if not rows:
            return [float("nan")]
        return [float(np.mean(score(np.asarray(pictures)[rows], [records[row] for row in rows], tools)))]

    return scored


def _untouched(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    """The nearest allowed scene says which place was edited, where the words leave that open."""
    values = []
    sources = pictures_of(records, "source", (world.SIZE, world.SIZE))
    readings = _read(pictures, records, "untouched")
    for picture, source, reading in zip(pictures, sources, readings, strict=True):
        wanted = world.render(reading.scene)
        kept = np.ones((world.SIZE, world.SIZE), bool)
        for place in map(world.cell_slice, world.POSITIONS):
            kept[place] = np.array_equal(wanted[place], source[place])
        values.append(psnr_over(kept, picture, source))
    return values


def _choices(scene: world.Scene, wanted: world.Wanted) -> list[tuple[str, float]]:
    """What a scene chose where its words leave something open: each choice, and how often two draws should differ."""
    free = []
    things = list(scene.things)
    for wish in sorted(wanted.wishes, key=lambda w: (len(w.positions), len(w.colors))):  # the narrowest first
        thing = next(
            t for t in things if t.shape == wish.shape and t.position in wish.positions and t.color in wish.colors
        )
        things.remove(thing)
        for value, options in ((thing.position, wish.positions), (thing.color, wish.colors)):
            if len(options) > 1:
                free.append((value, 1 - 1 / len(options)))
    return free


def _diversity(pictures: np.ndarray, records: list[Record], _: Tools) -> list[float]:
    """Simpson's index, which two draws estimate without bias as well as many."""
    by_words: dict[tuple, list[list[tuple[str, float]]]] = {}
    for reading, record in zip(_read(pictures, records, "diversity"), records, strict=True):
        wanted = _wanted(record)
        by_words.setdefault((record.prompt, record.source, wanted), []).append(_choices(reading.scene, wanted))
    shares = []
    for draws in by_words.values():
        pairs = list(itertools.combinations(draws, 2))
        for choice in range(len(draws[0]) if pairs else 0):
            differ = np.mean([a[choice][0] != b[choice][0] for a, b in pairs])
            shares.append(differ / draws[0][choice][1])
    return [float(np.mean(shares))] if shares else [float("nan")]


METRICS = (
    Metric(
        "valid",
        "rate",
        f"share of pictures that are one whole scene which the words allow, at {SHARP:.0f} dB or more",
        ("wanted",),
        _valid,
    ),
    Metric(
        "sharpness",
        "dB",
        "PSNR to the nearest rendering that the words allow",
        ("wanted",),
        _sharpness,
    ),
    Metric(
        "open_valid",
        "rate",
        "`valid`, of the words alone that leave something open",
        ("wanted",),
        _left_open(_valid),
        of_set=True,
    ),
    Metric(
        "open_sharpness",
        "dB",
        "`sharpness`, of the words alone that leave something open",
        ("wanted",),
        _left_open(_sharpness),
        of_set=True,
    ),
    Metric(
        "untouched",
        "dB",
        "PSNR to the source outside of the place that was edited",
        ("wanted", "source"),
        _untouched,
    ),
    Metric(
        "diversity",
        "index",
        "how often two draws for the same words differ in what these leave open, as a share of how often even draws do",
        ("wanted",),
        _diversity,
        of_set=True,
    ),
)
