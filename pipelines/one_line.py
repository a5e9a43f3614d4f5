"""Errors a user can mend, as the commands of this package show them: one line, exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from danceopd.errors import UserError

BAD_INPUT = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the block a `UserError` ends the command with its one line on stderr."""
    try:
        yield
    except UserError as error:
        typer.echo(f"danceopd: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(BAD_INPUT) from error
