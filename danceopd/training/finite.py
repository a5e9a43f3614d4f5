"""Training ends where a number is none: what is said then, and how many batches may be left out before it is."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from danceopd.config.recipe import TrainRecipe
from danceopd.data.encoded import EncodedRecords
from danceopd.errors import UserError

log = logging.getLogger(__name__)
_SHOWN = 5  # records in a message


@dataclass
class FiniteGuard:
    """Watches the losses and the gradient of every update, which are on the CPU already.

    Attributes:
        where: what trains, for messages (`distill`, `teachers.x.train`).
        spec: the recipe's section; its `skip_bad_batches` may be left out.
        encoded: whose records are trained on.
        skipped: batches left out so far.
    """

    where: str
    spec: TrainRecipe
    encoded: EncodedRecords
    skipped: int = 0

    def good(self, step: int, norm: float, bad_rows: Sequence[int], rows: Sequence[int]) -> bool:
        """Whether an update was one; if not, it is counted.

        Args:
            step: updates before it.
            norm: of the gradient; one that is not finite changed no weight.
            bad_rows: rows of the batch whose loss is not finite.
            rows: of the whole batch.

        Raises:
            UserError: with step, tasks and records, if no more batches may be left out.
        """
        if math.isfinite(norm) and not bad_rows:
            return True
        what = "the loss" if bad_rows else "the gradient"
        told = f"{self.where}: {what} is not a number at step {step + 1}, {self._records(bad_rows or rows)}"
        self.skipped += 1
        if self.skipped <= self.spec.skip_bad_batches:
            log.warning("%s; batch left out, %d of %d", told, self.skipped, self.spec.skip_bad_batches)
            return False
        raise UserError(
            f"{told}; nothing is exported. Look at these records, lower {self.where}.lr ({self.spec.lr:g}), or let "
            f"{self.where}.skip_bad_batches leave some batches out ({self.skipped - 1} were)"
        )

    def _records(self, rows: Sequence[int]) -> str:
        tasks = sorted({self.encoded.tasks[row] for row in rows})
        shown = list(rows[:_SHOWN])
        names = self.encoded.ids(shown) if self.encoded.ids is not None else [f"row {row}" for row in shown]
        more = f" and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
        return f"task {', '.join(tasks)}, records {', '.join(names)}{more}"


def not_finite(losses: Mapping[str, Sequence[float]], rows: Sequence[int], tags: Sequence[str]) -> list[int]:
    """The rows of a group whose losses are not all finite.

    Args:
        losses: by task, sample by sample; each sample may have several.
        rows: of the group.
        tags: their tasks.
    """
    bad = []
    for task, values in losses.items():
        mine = [row for row, tag in zip(rows, tags, strict=True) if tag == task]
        each = len(values) // len(mine)
        bad += [row for place, row in enumerate(mine) if not all(map(math.isfinite, values[place * each :][:each]))]
    return bad
