"""Which state of a training is handed over: validation scores, patience, the best so far."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from danceopd.config.recipe import SelectRecipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """How a student did on validation records.

    Attributes:
        score: the higher the better; at >= 0 it holds every gate.
        figures: what was measured, for the history.
    """

    score: float
    figures: dict


@dataclass
class Selection:
    """The best state so far, and whether it is time to end.

    Attributes:
        best: score of the best state; None before the first validation.
        best_step: when that was.
        waited: validations since.
        ended: whether training ends before its last step.
        latest: figures of the latest validation, with its step.
    """

    best: float | None = None
    best_step: int = 0
    waited: int = 0
    ended: bool = False
    latest: dict | None = None

    def see(self, step: int, validation: Validation, spec: SelectRecipe) -> bool:
        """Note a validation; returns whether it is the best so far."""
        better = self.best is None or validation.score > self.best
        if better:
            self.best, self.best_step, self.waited = validation.score, step, 0
        else:
            self.waited += 1
        held = spec.stop_when_held and validation.score >= 0
        self.ended = held or (spec.patience is not None and self.waited >= spec.patience)
        self.latest = {"step": step, "score": validation.score, "figures": validation.figures}
        log.info("validation at step %d: margin %.3g%s", step, validation.score, ", the best so far" if better else "")
        return better

    def news(self, step: int) -> dict:
        """The latest validation, if it is of this step."""
        fresh = self.latest is not None and self.latest["step"] == step
        return {"validation": self.latest, "best_step": self.best_step} if fresh else {}
