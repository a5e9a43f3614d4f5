"""Intervals that cover, pairs that sharpen, verdicts that agree with the gates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from danceopd.evaluation.statistics import bootstrap_interval, compare, compare_values, judge_difference

SETTINGS = {"seed": 0, "resamples": 1000, "confidence": 0.95}


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_an_interval_holds_the_mean_and_narrows_with_more_records():
    widths = []
    for count in (25, 400):
        values = draw(1).normal(3.0, 1.0, count).tolist()
        low, high = bootstrap_interval(values, 2000, 0.95, draw())
        assert low < np.mean(values) < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_intervals_cover_as_often_as_they_say():
    generator = draw(5)
    hits = 0
    for _ in range(300):
        low, high = bootstrap_interval(generator.normal(0, 1, 60).tolist(), 300, 0.9, generator)
        hits += low <= 0 <= high
    assert 0.84 < hits / 300 < 0.96


def test_more_confidence_is_wider_and_the_seed_decides():
    values = draw(2).normal(size=50).tolist()
    narrow, wide = (bootstrap_interval(values, 1000, c, draw()) for c in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap_interval(values, 1000, 0.99, draw()) == wide
    assert bootstrap_interval(values, 1000, 0.99, draw(9)) != wide


def test_many_records_are_drawn_in_blocks_of_bounded_memory(monkeypatch):
    from danceopd.evaluation import statistics

    values = draw(2).normal(size=50).tolist()
    whole = bootstrap_interval(values, 500, 0.95, draw())
    monkeypatch.setattr(statistics, "_BLOCK", 170)
    assert bootstrap_interval(values, 500, 0.95, draw()) == whole


def test_groups_that_share_a_picture_are_drawn_whole():
    """Twenty sources, each edited ten times to one value: as sure as twenty records, not as two hundred."""
    sources = draw(1).normal(size=20)
    values, groups = np.repeat(sources, 10).tolist(), np.repeat([f"s{i}" for i in range(20)], 10).tolist()
    alone, apart, whole = (
        bootstrap_interval(sources.tolist(), 2000, 0.95, draw()),
        bootstrap_interval(values, 2000, 0.95, draw()),
        bootstrap_interval(values, 2000, 0.95, draw(), groups),
    )
    assert whole == pytest.approx(alone)
    assert (whole[1] - whole[0]) / (apart[1] - apart[0]) > 2.5
    ungrouped = [f"r{i}" for i in range(200)]
    assert bootstrap_interval(values, 2000, 0.95, draw(), ungrouped) == pytest.approx(apart)


def test_groups_of_unequal_size_weigh_by_their_records():
    values, groups = [0.0] * 9 + [1.0], ["a"] * 9 + ["b"]
    low, high = bootstrap_interval(values, 2000, 0.9, draw(), groups)
    assert (low, high) == (0.0, 1.0)
    found = compare(values, [0.0] * 10, "t", None, 500, 0.9, draw(), groups)
    assert found.difference == pytest.approx(0.1)


def test_one_group_tells_nothing_of_others():
    assert bootstrap_interval([1.0, 2.0], 100, 0.95, draw(), ["a", "a"]) is None
    assert compare([1.0, 2.0], [1.0, 1.0], "t", None, 100, 0.95, draw(), ["a", "a"]) is None


def test_two_evaluations_are_compared_by_groups():
    values = ({"t": ["a", "b", "c", "d"]}, {"t": {"m": [1.0, 1.0, 0.0, 0.0]}})
    other = ({"t": ["d", "c", "b", "a"]}, {"t": {"m": [0.0, 0.0, 0.0, 0.0]}})
    found = compare_values(values, other, {}, "champion", SETTINGS, {"t": ["x", "x", "y", "y"]})["t"]["m"]
    assert (found["low"], found["high"]) == (0.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0, None], [1.0, math.nan], [math.inf, 0.0]])
def test_what_has_no_mean_has_no_interval(values):
    assert bootstrap_interval(values, 100, 0.95, draw()) is None
    if values:
        assert compare(values, [1.0] * len(values), "t", None, 100, 0.95, draw()) is None


def test_pairs_show_what_lies_hidden_in_the_spread_of_the_records():
    theirs = draw(3).normal(30, 5, 100)
    ours = theirs + 0.5 + 0.1 * draw(4).normal(size=100)
    found = compare(ours.tolist(), theirs.tolist(), "teacher", 1.0, 1000, 0.95, draw())
    assert found.verdict == "better" and found.sure and 0.45 < found.low < found.high < 0.55
    alone = [bootstrap_interval(v.tolist(), 1000, 0.95, draw()) for v in (ours, theirs)]
    assert alone[0][0] < alone[1][1]  # unpaired, the two overlap


@pytest.mark.parametrize(
    ("difference", "low", "high", "margin", "verdict", "sure"),
    [
        (0.3, 0.1, 0.5, 1.0, "better", True),
        (0.3, -0.1, 0.5, 1.0, "equal", True),
        (-0.5, -0.9, -0.2, 1.0, "equal", True),
        (-0.5, -1.2, 0.2, 1.0, "equal", False),
        (-1.0, -1.0, -1.0, 1.0, "equal", True),  # at its margin exactly, as the gate has it
        (-1.1, -1.5, -0.8, 1.0, "worse", False),
        (-1.6, -2.0, -1.2, 1.0, "worse", True),
        (-0.1, -0.2, 0.1, 0.0, "worse", False),
        (0.0, 0.0, 0.0, 0.0, "equal", True),
        (-0.1, -0.2, -0.05, None, "worse", True),
        (-0.1, -0.2, 0.05, None, "equal", False),
        (0.1, 0.05, 0.2, None, "better", True),
    ],
)
def test_verdicts(difference, low, high, margin, verdict, sure):
    assert judge_difference(difference, low, high, margin) == (verdict, sure)


def test_two_evaluations_are_paired_by_record_whatever_their_order():
    values = draw(6).normal(size=20).tolist()
    ids = [f"r{i}" for i in range(20)]
    ours = ({"t": ids}, {"t": {"m": values}})
    theirs = ({"t": ids[::-1]}, {"t": {"m": [v - 1 for v in values[::-1]]}})
    found = compare_values(ours, theirs, {"t": {"m": 0.5}}, "champion", SETTINGS)["t"]["m"]
    assert found["difference"] == pytest.approx(1) and found["high"] - found["low"] < 1e-9
    assert (found["verdict"], found["margin"], found["reference"]) == ("better", 0.5, "champion")


def test_other_records_other_tasks_and_other_metrics_are_not_compared():
    ours = ({"a": ["x"], "b": ["x"]}, {"a": {"m": [1.0], "n": [1.0]}, "b": {"m": [1.0]}})
    theirs = ({"a": ["x"], "b": ["y"]}, {"a": {"m": [1.0]}, "b": {"m": [1.0]}})
    assert set(compare_values(ours, theirs, {}, "champion", SETTINGS)) == {"a"}
    assert set(compare_values(ours, theirs, {}, "champion", SETTINGS)["a"]) == {"m"}
