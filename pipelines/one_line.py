"""How commands of this package end badly: one line, and a code that says what to do about it.

1: a step failed. 2: what a user can mend. 75: a server is away, so that the same again may do (a CronJob's or a step's
next pod tries it).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from danceopd.errors import UserError

STEP_FAILED, BAD_INPUT, AGAIN = 1, 2, 75


class Away(UserError):
    """A server that does not answer for now; nothing was started."""


class StepFailed(RuntimeError):
    """A step of a run ended badly; the message says which and why, a line each."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the block an error that is ours ends the command, with its line (a `StepFailed`: lines) on stderr."""
    try:
        yield
    except UserError as error:
        typer.echo(f"danceopd: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(AGAIN if isinstance(error, Away) else BAD_INPUT) from error
    except StepFailed as error:
        typer.echo("\n".join(f"danceopd: {line}" for line in str(error).splitlines()), err=True)
        raise typer.Exit(STEP_FAILED) from error
