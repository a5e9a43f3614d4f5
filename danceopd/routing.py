"""Mixed batches: which task each sample belongs to, hence which teacher it meets."""

from __future__ import annotations

import torch
from torch import Tensor

from danceopd.recipe import Weight


def task_counts(weights: dict[str, float], batch: int) -> dict[str, int]:
    """Share a batch among tasks by weight (largest remainder), at least one sample each.

    Raises:
        ValueError: if the batch is smaller than the number of tasks.
    """
    if batch < len(weights):
        raise ValueError(f"batch {batch} is smaller than the number of tasks {len(weights)}")
    spare, total = batch - len(weights), sum(weights.values())
    exact = {task: spare * weight / total for task, weight in weights.items()}
    counts = {task: 1 + int(share) for task, share in exact.items()}
    by_remainder = sorted(weights, key=lambda task: exact[task] - int(exact[task]), reverse=True)
    for task in by_remainder[: batch - sum(counts.values())]:
        counts[task] += 1
    return counts


def sample_weights(tasks: list[str], weights: dict[str, float]) -> Tensor:
    """Each sample's weight in the loss (B,), summing to 1, so that every task weighs as the recipe says."""
    total = sum(weights[task] for task in set(tasks))
    return torch.tensor([weights[task] / (total * tasks.count(task)) for task in tasks])


def weights_at(weights: dict[str, Weight], step: int, steps: int) -> dict[str, float]:
    """Each task's weight at update `step` of `steps`: a constant, or the phase that holds then."""

    def now(weight: Weight) -> float:
        if not isinstance(weight, tuple):
            return weight
        return next(phase.weight for phase in weight if step < phase.until * steps or phase.until == 1)

    return {task: now(weight) for task, weight in weights.items()}


class TaskSampler:
    """Draws mixed batches of rows; each task walks through its own rows in its own shuffled order.

    Args:
        rows: row numbers by task, none empty.
        seed: of the order; everything that follows is determined by it.
    """

    def __init__(self, rows: dict[str, list[int]], seed: int):
        self._rows = {task: torch.tensor(numbers) for task, numbers in rows.items()}
        self._generator = torch.Generator().manual_seed(seed)
        self._queue = {task: torch.empty(0, dtype=torch.int64) for task in rows}

    def draw(self, counts: dict[str, int]) -> tuple[list[int], list[str]]:
        """The next batch, with so many samples of each task: row numbers and their task tags."""
        rows: list[int] = []
        tags: list[str] = []
        for task, count in counts.items():
            while len(self._queue[task]) < count:
                order = torch.randperm(len(self._rows[task]), generator=self._generator)
                self._queue[task] = torch.cat([self._queue[task], self._rows[task][order]])
            taken, self._queue[task] = self._queue[task][:count], self._queue[task][count:]
            rows += taken.tolist()
            tags += [task] * count
        return rows, tags

    def state_dict(self) -> dict:
        """The position in the data: what is left of each task's order, and the generator of the next."""
        queue = {task: rows.clone() for task, rows in self._queue.items()}
        return {"queue": queue, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` gave for a sampler of the same rows."""
        self._queue = dict(state["queue"])
        self._generator.set_state(state["generator"])
