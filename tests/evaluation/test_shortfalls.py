"""What is said when a gate fails."""

from __future__ import annotations

from danceopd.config.load import load_recipe
from danceopd.evaluation.shortfalls import say_shortfalls

UNITS = {"valid": "rate", "edit_success": "rate", "psnr": "dB"}


def metrics(*gates: dict) -> dict:
    return {"gates": list(gates), "units": UNITS, "statistics": {"confidence": 0.95}}


def gate(task: str, metric: str, value: float | None, limit: float, interval: list | None, **more) -> dict:
    held = value is not None and value >= limit
    facts = {"task": task, "metric": metric, "value": value, "limit": limit, "interval": interval}
    return facts | {"passed": held, "rule": "retain 0.95", "reason": None} | more


def test_nothing_is_said_when_all_gates_hold():
    assert say_shortfalls(metrics(gate("t2i", "valid", 0.97, 0.95, [0.9, 0.99])), load_recipe("world")) == []


def test_a_shortfall_that_the_records_cannot_tell_names_figures_and_another_draw():
    recipe = load_recipe("world", ["seed=3", "distill.steps=1000", "tasks.t2i.weight=0.5"])
    told = say_shortfalls(metrics(gate("t2i", "valid", 0.927, 0.935, [0.885, 0.964])), recipe)
    assert told[0] == (
        "t2i valid: 92.7 %, 0.8 points short of its gate at 93.5 % (retain 0.95); its 95 % interval, 88.5 % to 96.4 %, "
        "reaches over the gate: so many records cannot tell"
    )
    assert "--set distill.steps=1500" in told[1] and "--set tasks.t2i.weight=0.65" in told[1]
    assert "--set seed=4" in told[1]
    assert told[2].startswith("look at: report.html") and told[2].endswith("t2i")


def test_a_clear_shortfall_proposes_no_other_draw_and_names_every_task():
    gates = [gate("global_style", "psnr", 30.0, 36.3, [29.5, 30.5]), gate("local_edit", "edit_success", 0.5, 0.9, None)]
    told = say_shortfalls(metrics(*gates, gate("t2i", "valid", 1.0, 0.9, None)), load_recipe("world"))
    assert "6.3 dB short of its gate at 36.3 dB" in told[0] and "lies below the gate" in told[0]
    assert told[1] == "local_edit edit_success: 50.0 %, 40.0 points short of its gate at 90.0 % (retain 0.95)"
    assert "seed=" not in told[2] and "tasks.t2i" not in told[2]
    assert told[3].endswith("global_style, local_edit")


def test_a_gate_without_a_value_says_why():
    told = say_shortfalls(
        metrics(gate("t2i", "valid", None, 0.9, None, reason="clip is not there")), load_recipe("world")
    )
    assert told == ["t2i valid: not measured (clip is not there)"]
