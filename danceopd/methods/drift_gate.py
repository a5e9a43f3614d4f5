"""Whether rollouts may follow a student's merged copy: while its query states lie where the student's would."""

from __future__ import annotations

import logging

from danceopd.config.recipe import DistillRecipe
from danceopd.flow.rollout import rollout_drift
from danceopd.methods.base import Distillation, Group
from danceopd.training.learner import Learner

log = logging.getLogger(__name__)


class DriftGate:
    """Measures, once per log entry, where the merged copy leads (`danceopd.training.merged`), and closes if it is far.

    Args:
        spec: the recipe's section.
        learner: whose rollouts go back to its own weights when the gate is closed.
        closed: whether it was closed before an interruption.
    """

    def __init__(self, spec: DistillRecipe, learner: Learner, closed: bool = False):
        self._every, self._limit, self._learner = spec.log_every, spec.drift_limit, learner
        self.closed = closed
        self._last: float | None = None
        if closed:
            learner.merged = None

    def look(self, setup: Distillation, groups: list[Group], done: int) -> None:
        """Measure the drift on this batch if an entry is due; every process must call it, and all decide alike."""
        self._last = None
        if self._learner.merged is None or done % self._every:
            return
        own, copy = setup.path(self._learner.field), setup.path(self._learner.walker)
        mine = None
        if groups:
            group = groups[0]
            with self._learner.precision():
                stop, stride = group.stop[:, -1], setup.rollout_stride
                mine = rollout_drift(own, copy, group.noise, group.grid, stop, group.condition, stride)
        found = [drift for drift in self._learner.processes.gather(mine) if drift is not None]
        drift = self._last = sum(found) / len(found)
        if drift > self._limit:
            log.warning(
                "distill step %d: the merged student's query states are %.3g of the way from its own, more than "
                "distill.rollout_drift allows (%g): rollouts follow its own weights from here on",
                done,
                drift,
                self._limit,
            )
            self.closed, self._learner.merged = True, None

    def news(self) -> dict[str, float]:
        """What the history should say of the last update."""
        return {} if self._last is None else {"rollout_drift": self._last}
