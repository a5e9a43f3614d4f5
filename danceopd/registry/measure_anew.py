"""Whether the champion has to be measured beside a student, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from danceopd.errors import UserError
from danceopd.evaluation.measured import Measured
from danceopd.registry.champion import cannot_compare
from danceopd.registry.versions import RegisteredModel


@dataclass(frozen=True)
class MeasuredAnew:
    """The champion as a student's run measured it.

    Attributes:
        model: name of the registered model.
        version: the champion's number.
        measured: its figures, or None if it could not be measured.
        reason: why not, in words.
    """

    model: str
    version: str
    measured: Measured | None
    reason: str = ""


def needs_measuring(model: RegisteredModel, student: str, measured: Measured) -> bool:
    """Whether the champion's own figures do not tell how a student compares with it.

    They do not where it was measured otherwise, or by a judge that has moved on its canaries since: a judge behind an
    endpoint may change from one day to another under the same name, so both are then judged in one run.

    Args:
        model: the registered model.
        student: digest of the student.
        measured: the student's figures.
    """
    champion = model.champion()
    if champion is None or champion.tags.get("student") == student:
        return False
    if not measured.metrics["passed"] or measured.version(model.name, str(champion.version)) is not None:
        return False
    try:
        theirs = model.measured(champion)
    except UserError:  # its figures are gone
        return True
    return _lacks_a_figure(measured, theirs) or bool(cannot_compare(measured, theirs))


def _lacks_a_figure(ours: Measured, theirs: Measured) -> bool:
    """Whether the champion has no figure for a gate on one of its tasks, since a network was not there."""
    return any(g["task"] in theirs.scores and theirs.scores[g["task"]].get(g["metric"]) is None for g in ours.gates)
