"""Mixed batches of rows: each task walks through its own records."""

from __future__ import annotations

import torch


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
