"""How sure a figure is: bootstrap intervals over records, paired where two fields drew the same ones, and verdicts.

Percentile bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): records are drawn with
replacement, the same ones for both sides of a comparison. Records that share a picture (edits of one source) say much
the same, so such groups are drawn whole (Davison & Hinkley, Bootstrap Methods and their Application, 1997, section
3.8): taken for independent, they would make an interval too narrow. It tells what other records of this kind would
give; it does not tell what another training run would. Where every record scores the same, the interval has no width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BETTER, EQUAL, WORSE = "better", "equal", "worse"
_ROUNDING = 1e-9  # a limit such as 0.95 * 0.8 may land above a mean that equals it
_BLOCK = 2_000_000  # indices drawn at once: 16 MB


@dataclass(frozen=True)
class Comparison:
    """The student beside another field on one task and metric; paired by record, higher is better.

    Attributes:
        reference: what it is compared with.
        difference: mean of student minus reference, in the metric's unit.
        low, high: interval of the difference.
        margin: how much worse still counts as equal, in the metric's unit; None: the recipe sets no gate here.
        verdict: `worse` if the difference falls below the margin (without one: if the whole interval lies below 0),
            `better` if the whole interval lies above 0, else `equal`.
        sure: whether the whole interval, and not the difference alone, supports the verdict.
    """

    reference: str
    difference: float
    low: float
    high: float
    margin: float | None
    verdict: str
    sure: bool


def bootstrap_interval(
    values: Sequence[float | None],
    resamples: int,
    confidence: float,
    generator: np.random.Generator,
    groups: Sequence[str] | None = None,
) -> tuple[float, float] | None:
    """The interval of a mean; None if there is no value, one is missing or not finite, or all are of one group.

    Args:
        values: one per record; for a paired comparison the differences.
        resamples: how many times the records are drawn anew.
        confidence: share of the resampled means that lie inside, in (0, 1).
        generator: of the draws.
        groups: the name of each record's group, drawn whole; none: every record is its own.
    """
    if not values or any(v is None or not math.isfinite(v) for v in values):
        return None
    sums, sizes = _by_group(np.asarray(values, dtype=np.float64), groups)
    count = len(sums)
    if count == 1 < len(values):
        return None
    means = np.empty(resamples)
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(0, count, (rows, count))
        means[start : start + rows] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _by_group(values: np.ndarray, groups: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group, in the order in which groups come."""
    if groups is None:
        return values, np.ones(len(values))
    place = {name: row for row, name in enumerate(dict.fromkeys(groups))}
    rows = np.asarray([place[name] for name in groups])
    return np.bincount(rows, weights=values), np.bincount(rows).astype(np.float64)


def judge_difference(difference: float, low: float, high: float, margin: float | None) -> tuple[str, bool]:
    """(verdict, sure) of a difference with its interval; see `Comparison`."""
    floor = 0.0 if margin is None else -margin
    if margin is None and high < 0:
        return WORSE, True
    if margin is not None and difference < floor - _ROUNDING:
        return WORSE, high < floor
    if low > 0:
        return BETTER, True
    return EQUAL, margin is not None and low >= floor - _ROUNDING


def compare(
    ours: Sequence[float | None],
    theirs: Sequence[float | None],
    reference: str,
    margin: float | None,
    resamples: int,
    confidence: float,
    generator: np.random.Generator,
    groups: Sequence[str] | None = None,
) -> Comparison | None:
    """Compare two fields' values on the same records; None if a value is missing or not finite.

    Args:
        ours: the student's values, one per record.
        theirs: the reference's values, of the same records in the same order.
        reference: its name.
        margin: see `Comparison`.
        resamples: as for `bootstrap_interval`.
        confidence: as for `bootstrap_interval`.
        generator: of the draws.
        groups: as for `bootstrap_interval`.
    """
    mine, others = ([v for v in side if v is not None and math.isfinite(v)] for side in (ours, theirs))
    if len(mine) < len(ours) or len(others) < len(theirs):
        return None
    differences = [a - b for a, b in zip(mine, others, strict=True)]
    interval = bootstrap_interval(differences, resamples, confidence, generator, groups)
    if interval is None:
        return None
    difference = math.fsum(differences) / len(differences)
    return Comparison(reference, difference, *interval, margin, *judge_difference(difference, *interval, margin))


def compare_values(
    ours: tuple[Mapping[str, list[str]], Mapping[str, Mapping[str, list]]],
    theirs: tuple[Mapping[str, list[str]], Mapping[str, Mapping[str, list]]],
    margins: Mapping[str, Mapping[str, float]],
    reference: str,
    settings: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, dict[str, dict | None]]:
    """Compare two fields of one or two evaluations, paired by record id: {task: {metric: plain data or None}}.

    Tasks and metrics that only one of them has are left out, and so are tasks whose records are not the same ones.

    Args:
        ours: record ids by task, and {task: {metric: values in their order}}.
        theirs: the other's.
        margins: {task: {metric: margin}}, where a gate sets one.
        reference: the other's name.
        settings: `seed`, `resamples` and `confidence`.
        groups: {task: the group of each record}, in the order of our ids.
    """
    table: dict[str, dict[str, dict | None]] = {}
    (our_ids, our_values), (their_ids, their_values) = ours, theirs
    for task, metrics in our_values.items():
        place = {record: row for row, record in enumerate(their_ids.get(task, []))}
        ids = our_ids[task]
        if set(ids) != set(place):
            continue
        for name, values in metrics.items():
            other = their_values.get(task, {}).get(name)
            if other is None:
                continue
            paired = [other[place[record]] for record in ids]
            margin = margins.get(task, {}).get(name)
            generator = np.random.default_rng(settings["seed"])
            found = compare(
                values,
                paired,
                reference,
                margin,
                settings["resamples"],
                settings["confidence"],
                generator,
                (groups or {}).get(task),
            )
            table.setdefault(task, {})[name] = None if found is None else asdict(found)
    return table
