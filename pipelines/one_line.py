"""How commands of this package end badly: one line and code 2 for what a user can mend, code 1 for a failed step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from danceopd.errors import UserError

STEP_FAILED, BAD_INPUT = 1, 2


class StepFailed(RuntimeError):
    """A step of a run ended badly; the message says which and why, a line each."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the block a `UserError` ends the command with its one line on stderr, a `StepFailed` with its lines."""
    try:
        yield
    except UserError as error:
        typer.echo(f"danceopd: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except StepFailed as error:
        typer.echo("\n".join(f"danceopd: {line}" for line in str(error).splitlines()), err=True)
        raise typer.Exit(STEP_FAILED) from error
