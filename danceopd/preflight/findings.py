"""What a check found before training: one line each, errors end the run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from danceopd.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, doubtful, or good to know.

    Attributes:
        level: `error` stops the run.
        check: which check found it.
        message: what, with figures, and how to mend it.
    """

    level: Literal["error", "warning", "note"]
    check: str
    message: str


def settle(findings: list[Finding]) -> None:
    """Log notes and warnings.

    Raises:
        UserError: with one line per error, if there are errors.
    """
    for finding in findings:
        if finding.level != "error":
            log.log(logging.WARNING if finding.level == "warning" else logging.INFO, "preflight: %s", finding.message)
    errors = [finding.message for finding in findings if finding.level == "error"]
    if errors:
        raise UserError("\n".join(errors))
