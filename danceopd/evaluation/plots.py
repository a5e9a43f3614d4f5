"""Plots of a training history: loss by task, and where on the path the queries were asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def plot_history(history: list[dict], path: Path) -> None:
    """Write one PNG: the loss of each task over the steps, and the histogram of query noise levels by task."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, queries = figure.subplots(1, 2)
    steps = [entry["step"] for entry in history]
    tasks = sorted({task for entry in history for task in entry["loss"]})
    for task in tasks:
        losses.plot(steps, [entry["loss"].get(task, np.nan) for entry in history], label=task)
    if tasks:
        losses.set(xlabel="step", ylabel="loss", yscale="log")
        losses.legend(frameon=False)
    else:
        losses.set(title="nothing was trained")
    bottom = None
    for task in tasks:
        counts = np.sum([entry["sigma_histogram"][task] for entry in history if task in entry["sigma_histogram"]], 0)
        edges = np.linspace(0, 1, len(counts) + 1)
        bottom = np.zeros(len(counts)) if bottom is None else bottom
        queries.bar(edges[:-1], counts, width=np.diff(edges), bottom=bottom, align="edge", label=task)
        bottom = bottom + counts
    queries.set(xlabel="sigma of the query (1 = noise)", ylabel="queries", xlim=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
