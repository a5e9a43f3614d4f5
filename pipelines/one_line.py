"""How commands of this package end badly: one line, and a code that says what to do about it.

1: a step failed. 2: what a user can mend. 4: the student fails a gate and was not registered. 75: a server is away,
so that the same again may do (a CronJob's or a step's next pod tries it).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from danceopd.errors import ExitCode, UserError, mendable

log = logging.getLogger("danceopd.command")


class Away(UserError):
    """A server that does not answer for now; nothing was started."""


class StepFailed(RuntimeError):
    """A step of a run ended badly; the message says which and why, a line each."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the block an error that can be mended ends the command, with its line (`StepFailed`: lines) on stderr."""
    try:
        yield
    except UserError as error:
        typer.echo(f"danceopd: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED if isinstance(error, Away) else ExitCode.BAD_INPUT) from error
    except StepFailed as error:
        typer.echo("\n".join(f"danceopd: {line}" for line in str(error).splitlines()), err=True)
        raise typer.Exit(ExitCode.FAILED) from error
    except Exception as error:
        if (told := mendable(error)) is None:
            raise
        log.debug("what led to it", exc_info=error)
        typer.echo(f"danceopd: {told[0]}", err=True)
        raise typer.Exit(told[1]) from error
