"""A study's figures as points with intervals, and as lines over sampling steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def plot_study(summary: dict, path: Path) -> None:
    """Write one PNG: retention and each metric of a study's variants, means with intervals, beside the teachers'.

    Args:
        summary: from `danceopd.studies.table.summarise`.
        path: the PNG.
    """
    rows = summary["variants"]
    panels = [("retention", [row["retention"] for row in rows], summary["teachers"]["retention"])]
    for task, name in summary["metrics"]:
        unit = summary["units"][name]
        label = f"{task} {name}" + (f" [{unit}]" if unit == "dB" else "")
        panels.append((label, [r["scores"][f"{task}/{name}"] for r in rows], summary["teachers"]["scores"][task][name]))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (1.5 + 3.1 * columns, lines * (1.1 + 0.24 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns, sharey=True)).ravel()
    places = np.arange(len(rows))[::-1]
    for axis, (label, points, teacher) in zip(axes, panels, strict=False):
        means = [np.nan if p["mean"] is None else p["mean"] for p in points]
        axis.errorbar(means, places, xerr=[p["half"] or 0.0 for p in points], fmt="o", ms=4, capsize=3, lw=1.2)
        for place, point in zip(places, points, strict=True):
            values = [np.nan if value is None else value for value in point["values"]]
            axis.plot(values, [place] * len(values), ".", ms=3, color="0.6", zorder=0)
        if teacher is not None:
            axis.axvline(teacher, color="0.5", lw=1, ls="--")
        axis.set(title=label, yticks=places, yticklabels=[row["variant"] for row in rows])
        axis.title.set_fontsize(10)
        axis.grid(axis="x", alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    percent = round(100 * summary["confidence"])
    figure.supxlabel(f"mean over seeds with {percent} % interval; small dots: seeds; dashed: teachers", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def plot_steps(summary: dict, path: Path) -> None:
    """Write one PNG: each metric by sampling steps, of variants, teachers and base, means with intervals.

    Args:
        summary: from `danceopd.studies.table.summarise`, of a study with `at_steps`.
        path: the PNG.
    """
    steps = sorted(summary["at_steps"])
    fields = [(row["variant"], row["by_steps"], {"marker": "o"}) for row in summary["variants"]]
    fields += [
        ("teacher", summary["teachers"]["by_steps"], {"marker": "s", "color": "0.35", "ls": "--"}),
        ("base", summary["base"]["by_steps"], {"marker": "^", "color": "0.7", "ls": ":"}),
    ]
    columns = min(4, len(summary["metrics"]))
    lines = -(-len(summary["metrics"]) // columns)
    figure = Figure(figsize=(1 + 3.1 * columns, 0.6 + 2.6 * lines), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axis, (task, name) in zip(axes, summary["metrics"], strict=False):
        for label, by_steps, style in fields:
            points = [by_steps[str(n)][f"{task}/{name}"]["score"] for n in steps]
            means = [np.nan if p["mean"] is None else p["mean"] for p in points]
            axis.errorbar(
                steps, means, [p["half"] or 0.0 for p in points], label=label, ms=4, lw=1.2, capsize=2, **style
            )
        unit = summary["units"][name]
        axis.set_xscale("log", base=2)
        axis.set_xticks(steps, labels=list(map(str, steps)))
        axis.set_title(f"{task} {name}" + (f" [{unit}]" if unit == "dB" else ""), fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[len(summary["metrics"]) :]:
        axis.set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(6, len(fields)), frameon=False
    )
    figure.supxlabel("sampling steps", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
