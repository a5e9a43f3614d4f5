"""What two evaluations must share: records by content, picture size, networks by their weights, the judge."""

from __future__ import annotations

from dataclasses import replace

import pytest

from danceopd.config.load import load_recipe
from danceopd.config.recipe import EvaluateRecipe, Gate
from danceopd.data.records import Record
from danceopd.evaluation.conditions import groups_of, hash_records, note_conditions, tools_of
from danceopd.evaluation.gates import gate_allowance, gate_limit
from danceopd.evaluation.validate import gate_margin


def record(name: str, source: bytes | None = None, target: bytes | None = None) -> Record:
    return Record(name, "edit", "do it", source, target, "test")


def test_records_are_named_by_what_is_drawn_and_scored():
    first = [record("a", b"1"), record("b")]
    assert hash_records(first) == hash_records([replace(r, split="val") for r in first])
    for changed in (first[:1], [first[0], record("b", b"2")], [first[0], replace(first[1], prompt="other")]):
        assert hash_records(changed) != hash_records(first)


def test_records_that_share_a_picture_are_one_group():
    """An edit chain: the next source is the last target."""
    records = [
        record("a", b"1", b"2"),
        record("b", b"1", b"3"),
        record("c", b"3", b"4"),
        record("d", b"9"),
        record("e", None, b"4"),
        record("f"),
        record("g"),
    ]
    groups = groups_of(records)
    assert len({groups[0], groups[1], groups[2], groups[4]}) == 1
    assert len(set(groups)) == 4 and groups[5] != groups[6]


def test_conditions_tell_size_steps_seed_and_tools():
    recipe = load_recipe("world", ["evaluate.seed=5", "evaluate.steps=3"])
    found = note_conditions(recipe, {"t2i": [record("a")]})
    assert (found["size"], found["steps"], found["seed"]) == ([64, 64], 3, 5)
    assert set(found["held_out"]) == {"t2i"} and found["tools"] == {}


def test_networks_go_by_their_weights_and_the_judge_by_model_and_questions(tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "copy")]
    for folder, data in zip(folders, (b"1", b"2", b"1"), strict=True):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(data)
    specs = [EvaluateRecipe(networks={"clip": str(folder)}) for folder in folders]
    one, two, copy = (tools_of(spec, ["clip_score"])["clip"] for spec in specs)
    assert one == copy != two
    assert tools_of(EvaluateRecipe(), ["clip_score"]) == {"clip": None}

    def judge(**of) -> dict:
        return tools_of(EvaluateRecipe(judge={"url": "http://a/v1", "model": "m"} | of), ["judge_overall"])

    assert judge() == judge(url="http://b/v1", timeout=5)
    assert judge() != judge(model="n") and judge() != judge(parameters={"temperature": 1})


@pytest.mark.parametrize(
    ("rule", "teacher", "limit"),
    [
        ({"retain": 0.9}, 2.0, 1.8),
        ({"retain": 0.9}, -2.0, -2.2),
        ({"retain": 0.9}, 0.0, 0.0),
        ({"retain": 1.0}, -2.0, -2.0),
        ({"max_drop": 0.5}, -2.0, -2.5),
        ({"max_drop": 0.0}, 0.0, 0.0),
    ],
)
def test_a_gate_never_asks_for_better_than_the_teacher(rule, teacher, limit):
    gate = Gate(metric="m", champion_margin=0, **rule)
    assert gate_limit(gate, teacher) == pytest.approx(limit) and gate_limit(gate, teacher) <= teacher
    assert gate_allowance(gate, teacher) == pytest.approx(teacher - limit)
    assert gate_margin(gate, limit, teacher) == pytest.approx(0.0)
    assert gate_margin(gate, teacher - 3, teacher) < 0 <= gate_margin(gate, teacher, teacher)
