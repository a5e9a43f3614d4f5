"""What a vision-language judge says of a picture, in the manner of GEdit-Bench and VIEScore (`evaluation/judge.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from danceopd.data.records import Record
from danceopd.evaluation.judge import Verdict
from danceopd.evaluation.metrics.base import Metric, picture_of
from danceopd.evaluation.metrics.tools import Tools


def _judged(parts: tuple[str, ...], value: Callable[[Verdict], float]) -> Callable:
    def measure(pictures: np.ndarray, records: list[Record], tools: Tools) -> list[float]:
        sources = [None if r.source is None else picture_of(r, "source", pictures.shape[1:]) for r in records]
        verdicts = tools.judge.verdicts(pictures, sources, records, parts)
        return [math.nan if verdict is None else value(verdict) for verdict in verdicts]

    return measure


METRICS = (
    Metric(
        "judge_instruction",
        "score",
        "the judge: how well the prompt was followed, 0 to 10",
        (),
        _judged(("semantic",), lambda v: v.instruction),
        tools=("judge",),
    ),
    Metric(
        "judge_preservation",
        "score",
        "the judge: how well what the prompt does not name was left alone, 0 to 10",
        ("source",),
        _judged(("semantic",), lambda v: v.preservation),
        tools=("judge",),
    ),
    Metric(
        "judge_quality",
        "score",
        "the judge: the lower of naturalness and freedom from artifacts (PQ), 0 to 10",
        (),
        _judged(("quality",), lambda v: v.quality),
        tools=("judge",),
    ),
    Metric(
        "judge_overall",
        "score",
        "the judge: geometric mean of the semantic score (SC: the lower of instruction and "
        "preservation) and quality (PQ), 0 to 10",
        (),
        _judged(("semantic", "quality"), lambda v: v.overall),
        tools=("judge",),
    ),
)
