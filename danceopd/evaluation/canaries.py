"""Canary pictures: whether a judge still says what it said, asked anew with every evaluation.

A model behind an endpoint changes under one name. A handful of pictures that no training touches, made of the held-out
records alone, is judged in every evaluation: each record's target, which should score high, and a spoiled one, which
should not. What was judged at two times is compared only where these pictures got the same verdicts both times.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Container, Mapping
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any

import numpy as np

from danceopd.config.recipe import Recipe
from danceopd.data.records import Record
from danceopd.evaluation.judge import Judge, Verdict
from danceopd.evaluation.metrics import metric, read_picture
from danceopd.evaluation.metrics.tools import Tools
from danceopd.evaluation.names import JUDGE
from danceopd.files import content_key

log = logging.getLogger(__name__)

RECORDS = 4  # over all judged tasks; two pictures each
_GRAY = 128


@dataclass(frozen=True)
class Canary:
    """One picture whose verdict should not change.

    Attributes:
        name: the task, the record's id, and `target` or `spoiled`.
        picture: (H, W, 3) uint8.
        source: what it was edited from, or None.
        record: whose prompt it is judged by.
    """

    name: str
    picture: np.ndarray
    source: np.ndarray | None
    record: Record


def make_canaries(recipe: Recipe, held_out: Mapping[str, list[Record]], skipped: Container[str] = ()) -> list[Canary]:
    """The canaries of an evaluation; empty where no judge scores.

    Spoiled is an edit that changed nothing (the source), or a drawing in inverted colors, or plain gray where there is
    no target.

    Args:
        recipe: its tasks name the metrics; its model the size.
        held_out: the records of every task, as they are drawn.
        skipped: metrics that are not measured.
    """
    judged = [
        [(task, record) for record in records]
        for task, records in held_out.items()
        if any(JUDGE in metric(name).tools and name not in skipped for name in recipe.tasks[task].metrics)
    ]
    turns = [pair for turn in zip_longest(*judged) for pair in turn if pair is not None]
    size = (recipe.model.height, recipe.model.width)
    return [canary for task, record in turns[:RECORDS] for canary in _canaries_of(task, record, size)]


def _canaries_of(task: str, record: Record, size: tuple[int, int]) -> list[Canary]:
    def picture(name: str) -> np.ndarray | None:
        data = getattr(record, name)
        return None if data is None else read_picture(data, *size, f"record {record.id!r}, field '{name}'")

    source, target = picture("source"), picture("target")
    if source is not None:
        spoiled = source
    else:
        spoiled = np.full((*size, 3), _GRAY, dtype=np.uint8) if target is None else 255 - target
    name = f"{task}/{record.id}"
    whole = [] if target is None else [Canary(f"{name}/target", target, source, record)]
    return [*whole, Canary(f"{name}/spoiled", spoiled, source, record)]


def judge_canaries(
    tools: Tools, recipe: Recipe, held_out: Mapping[str, list[Record]], skipped: Container[str] = ()
) -> dict[str, Any] | None:
    """Ask the judge about the canaries, as `metrics.json` keeps it; None where no judge scores.

    They are asked first and never from kept answers. Answers kept by a run before are forgotten where the canaries have
    moved since, so that an evaluation that goes on does not mix two judges.

    Raises:
        UserError: as `Judge.verdicts` does.
    """
    canaries = make_canaries(recipe, held_out, skipped)
    if not canaries:
        return None
    assert recipe.evaluate.judge is not None  # else its metrics are skipped
    found = _ask(tools.judge, canaries) | {"tolerance": recipe.evaluate.judge.canary_tolerance}
    before = tools.judge.kept_note()
    if before is not None and (moved := say_moved(found, before)):
        log.warning("evaluate: %s since %s; its answers from then are asked for anew", moved, before.get("at"))
        tools.judge.forget()
    if before is None or moved:
        tools.judge.keep_note(found)
    return found


def _ask(judge: Judge, canaries: list[Canary]) -> dict[str, Any]:
    verdicts = judge.verdicts(
        np.stack([canary.picture for canary in canaries]),
        [canary.source for canary in canaries],
        [canary.record for canary in canaries],
        anew=True,
    )
    seen = [
        [c.name, c.record.prompt, _hash(c.picture), None if c.source is None else _hash(c.source)] for c in canaries
    ]
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "pictures": content_key(seen),
        "verdicts": {c.name: _row(verdict) for c, verdict in zip(canaries, verdicts, strict=True)},
    }


def _hash(picture: np.ndarray) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


def _row(verdict: Verdict | None) -> list[float] | None:
    """Instruction, preservation, quality and the whole; None for an answer that could not be read."""
    return None if verdict is None else [*astuple(verdict), round(verdict.overall, 4)]


def moved_by(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float | None:
    """How far the judge moved between two askings, in points of 10.

    The mean over the canaries of how much each one's figure changed, of the figure (instruction, preservation, quality,
    the whole) that changed most. None where the pictures were not the same, or one has no verdict.
    """
    mine, other = ours["verdicts"], theirs["verdicts"]
    if ours["pictures"] != theirs["pictures"] or None in (*mine.values(), *other.values()):
        return None
    changes = np.abs(np.array([mine[name] for name in mine]) - np.array([other[name] for name in mine]))
    return float(changes.mean(0).max())


def say_moved(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> str:
    """Why what was judged at two times cannot be compared, or nothing if it can; the tolerance is `ours`."""
    if ours is None or theirs is None:
        return "the judge was not asked about canaries"
    moved = moved_by(ours, theirs)
    if moved is None:
        return "the judge was asked about other canaries, or did not answer"
    if moved > ours["tolerance"]:
        return f"the judge has moved by {moved:.2g} of 10 on its canaries (tolerance {ours['tolerance']:g})"
    return ""
