"""What a person is told when a student fails a gate: by how much, how sure that is, and what to try next."""

from __future__ import annotations

from typing import Any

from danceopd.config.recipe import Recipe

MORE_STEPS, MORE_WEIGHT = 1.5, 1.3  # of the recipe's: enough to see, not enough to forget the other tasks


def say_shortfalls(metrics: dict[str, Any], recipe: Recipe) -> list[str]:
    """A line for each gate that failed, then what to try and where to look; empty if all hold.

    Args:
        metrics: the evaluation's `metrics.json`.
        recipe: what was run.
    """
    lines = say_failed_gates(metrics)
    measured = [gate for gate in metrics["gates"] if not gate["passed"] and _measured(gate)]
    tasks = list(dict.fromkeys(gate["task"] for gate in measured if gate["task"] in recipe.tasks))
    if tasks:
        lines.append(f"try: {'; '.join(_tries(tasks, measured, recipe))}")
        lines.append(f"look at: report.html, where the student falls furthest below its teacher on {', '.join(tasks)}")
    return lines


def say_failed_gates(metrics: dict[str, Any]) -> list[str]:
    """A line for each gate that failed, in an evaluation's `metrics.json`: by how much, and how sure that is."""
    failed = [gate for gate in metrics["gates"] if not gate["passed"]]
    return [_shortfall(gate, metrics) if _measured(gate) else _unmeasured(gate) for gate in failed]


def _measured(gate: dict[str, Any]) -> bool:
    return gate["value"] is not None and gate["limit"] is not None


def _unmeasured(gate: dict[str, Any]) -> str:
    return f"{gate['task']} {gate['metric']}: not measured" + (f" ({gate['reason']})" if gate.get("reason") else "")


def _shortfall(gate: dict[str, Any], metrics: dict[str, Any]) -> str:
    unit = metrics["units"][gate["metric"]]
    short = f"{_amount(gate['limit'] - gate['value'], unit)} short of its gate at {_value(gate['limit'], unit)}"
    line = f"{gate['task']} {gate['metric']}: {_value(gate['value'], unit)}, {short} ({gate['rule']})"
    if not gate.get("interval"):
        return line
    low, high = gate["interval"]
    told = f"its {100 * metrics['statistics']['confidence']:g} % interval, {_value(low, unit)} to {_value(high, unit)}"
    if _in_doubt(gate):
        return f"{line}; {told}, reaches over the gate: so many records cannot tell"
    return f"{line}; {told}, lies below the gate: no matter of which records were drawn"


def _in_doubt(gate: dict[str, Any]) -> bool:
    return bool(gate.get("interval")) and gate["interval"][1] >= gate["limit"]


def _tries(tasks: list[str], failed: list[dict[str, Any]], recipe: Recipe) -> list[str]:
    found = [f"more training, --set distill.steps={round(recipe.distill.steps * MORE_STEPS)}"]
    for task in tasks:
        weight = recipe.tasks[task].weight
        if len(recipe.tasks) > 1 and isinstance(weight, float | int):
            found.append(f"more weight on it, --set tasks.{task}.weight={weight * MORE_WEIGHT:.3g}")
    if any(map(_in_doubt, failed)):
        found.append(f"another draw, --set seed={recipe.seed + 1}, or more records, --set evaluate.per_task=...")
    return found


def _value(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "rate" else f"{value:.1f} dB" if unit == "dB" else f"{value:.3g}"


def _amount(value: float, unit: str) -> str:
    return f"{100 * value:.1f} points" if unit == "rate" else _value(value, unit)
