"""Mixed batches: counts, weights, order."""

from __future__ import annotations

import pytest
import torch

from danceopd.config.recipe import WeightPhase
from danceopd.data.sampler import TaskSampler
from danceopd.methods.routing import sample_weights, task_counts, weights_at

WEIGHTS = {"a": 2.0, "b": 1.0, "c": 1.0}


def test_counts_fill_the_batch_by_weight_with_at_least_one_each():
    assert task_counts(WEIGHTS, 11) == {"a": 5, "b": 3, "c": 3}
    assert task_counts({"a": 100.0, "b": 1.0}, 8) == {"a": 7, "b": 1}
    for batch in range(3, 40):
        assert sum(task_counts(WEIGHTS, batch).values()) == batch


def test_a_batch_below_the_number_of_tasks_is_refused():
    with pytest.raises(ValueError, match="smaller than the number of tasks"):
        task_counts(WEIGHTS, 2)


def test_every_task_weighs_as_the_recipe_says_whatever_its_count():
    tags = ["a"] * 7 + ["b"] * 2 + ["c"]
    weights = sample_weights(tags, WEIGHTS)
    by_task = {t: sum(w for w, tag in zip(weights.tolist(), tags, strict=True) if tag == t) for t in WEIGHTS}
    assert by_task == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})


def test_a_sampler_mixes_tasks_and_visits_every_row_once_an_epoch():
    sampler = TaskSampler({"a": list(range(10)), "b": list(range(10, 14))}, seed=0)
    drawn: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(5):
        rows, tags = sampler.draw({"a": 2, "b": 2})
        assert set(tags) == {"a", "b"}
        for row, tag in zip(rows, tags, strict=True):
            drawn[tag].append(row)
    assert sorted(drawn["a"]) == list(range(10))
    assert sorted(drawn["b"][:4]) == [10, 11, 12, 13]


def test_the_order_depends_on_the_seed_and_not_on_the_global_generator():
    def order(seed):
        sampler = TaskSampler({"a": list(range(50))}, seed)
        torch.rand(3)
        return [sampler.draw({"a": 5})[0] for _ in range(4)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_curriculum_changes_a_weight_with_its_phases_and_leaves_the_others():
    phases = (WeightPhase(until=0.5, weight=1.0), WeightPhase(until=1.0, weight=4.0))
    seen = [weights_at({"a": phases, "b": 2.0}, step, 4) for step in range(4)]
    assert [w["a"] for w in seen] == [1.0, 1.0, 4.0, 4.0]
    assert {w["b"] for w in seen} == {2.0}
