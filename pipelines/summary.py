"""A run's outcome as one table: base, teacher and student per task and metric, what was kept, what was registered."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

NONE = "-"
BASE, STUDENT = "base", "student"


def summary_table(metrics: dict[str, Any], registration: dict[str, Any]) -> Table:
    """The table a run ends with.

    Args:
        metrics: an evaluation's `metrics.json`.
        registration: what was registered, as plain data.
    """
    table = Table(
        title=f"{metrics['recipe']} on its {metrics['split']} split",
        caption=registration_line(registration),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("task")
    table.add_column("metric")
    for heading in (BASE, "teacher", STUDENT, "kept", "ceiling"):
        table.add_column(heading, justify="right")
    table.add_column("gate")
    for task, kept in metrics["retention"].items():
        for number, (name, entry) in enumerate(kept.items()):
            unit = metrics["units"][name]
            base = metrics["scores"].get(BASE, {}).get(task, {}).get(name)
            ceiling = metrics["ceiling"].get(task, {}).get(name)
            figures = [figure(value, unit) for value in (base, entry["teacher"], entry["student"])]
            label = f"{task}\n(taught by {metrics['teacher_of'][task]})" if number == 0 else ""
            row = [*figures, retention(entry, unit), figure(ceiling, unit), _gate(metrics, task, name)]
            shown = f"{name}\n(not measured)" if name in metrics.get("skipped", {}) else name
            table.add_row(label, shown, *row, end_section=number == len(kept) - 1)
    return table


def figure(value: float | None, unit: str) -> str:
    """A metric's value in its unit."""
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" if unit == "rate" else f"{value:.1f} dB" if unit == "dB" else f"{value:.3f}"


def retention(entry: dict[str, float | None], unit: str) -> str:
    """What the student kept of its teacher: a share, or for decibels and distances a difference."""
    if unit in ("dB", "distance"):
        digits, suffix = (1, " dB") if unit == "dB" else (3, "")
        return NONE if entry["difference"] is None else f"{entry['difference']:+.{digits}f}{suffix}"
    return NONE if entry["ratio"] is None else f"{100 * entry['ratio']:.1f} %"


def _gate(metrics: dict[str, Any], task: str, name: str) -> str:
    verdicts = [gate["passed"] for gate in metrics["gates"] if (gate["task"], gate["metric"]) == (task, name)]
    return "" if not verdicts else "[green]holds[/]" if all(verdicts) else "[red]fails[/]"


def registration_line(registration: dict[str, Any]) -> str:
    """In one line: the registered version and its aliases, or why there is none."""
    reasons = "; ".join(registration["reasons"])
    if not registration["registered"]:
        return f"not registered: {reasons}"
    aliases = ", ".join(registration["alias"]) or "no alias"
    return f"registered as version {registration['version']} ({aliases})" + (f": {reasons}" if reasons else "")
