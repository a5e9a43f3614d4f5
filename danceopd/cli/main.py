"""`danceopd ...`: the command line. Bad input ends with one line on stderr and exit code 2."""

from __future__ import annotations

import functools
import logging
import os
import sys
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup
from typer.main import get_command

from danceopd import __version__
from danceopd.cli.data import data_app
from danceopd.cli.generate import generate
from danceopd.cli.recipe import recipe_app
from danceopd.cli.registry import registry_app
from danceopd.cli.serve import serve
from danceopd.cli.steps import distill, evaluate, finetune, map_, register
from danceopd.cli.study import study
from danceopd.cli.tracking import add_tracking
from danceopd.cli.world import world_app
from danceopd.devices import wait_briefly
from danceopd.errors import ExitCode, Interrupted, mendable

log = logging.getLogger(__name__)
# typer brings its own copy of click, whose error base it does not export.
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Many specialists, one flow-matching student."
)
app.add_typer(data_app, name="data")
app.add_typer(world_app, name="world")
app.add_typer(registry_app, name="registry")
app.add_typer(recipe_app, name="recipe")
for command in (finetune, distill, evaluate, register, study, generate, serve):
    app.command()(command)
app.command("map")(map_)
add_tracking(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"danceopd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="more log lines")] = False,
) -> None:
    wait_briefly()
    set_up_logging(logging.DEBUG if verbose else logging.INFO)


def set_up_logging(level: int) -> None:
    """Our own log lines to stderr: colored on a terminal, plain elsewhere. Libraries speak from WARNING up."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Of several processes the first speaks for all.
    logging.getLogger("danceopd").setLevel(level if os.environ.get("RANK", "0") == "0" else logging.WARNING)


@functools.cache
def root_command() -> TyperGroup:
    """The whole command, with the sub-commands that packages above this one offer (`danceopd pipeline ...`)."""
    for entry in entry_points(group="danceopd.commands"):
        app.add_typer(entry.load(), name=entry.name)
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def main() -> None:
    """Entry point: what a user can mend becomes one line and an exit code, mostly 2; only a bug is a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        code = root_command().main(standalone_mode=False)
    except UsageError as error:
        where = f" ({error.ctx.command_path} --help)" if error.ctx else ""
        sys.exit(_say(error.format_message() + where, ExitCode.BAD_INPUT))
    except Interrupted as stop:
        sys.exit(_say(str(stop), stop.code))
    except (typer.Abort, KeyboardInterrupt) as stop:
        if isinstance(stop.__cause__, EOFError):  # typer takes a file that ends too early for Ctrl-D
            sys.exit(_say_mendable(stop.__cause__))
        sys.exit(_say("interrupted", ExitCode.CTRL_C))
    except BrokenPipeError:  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(ExitCode.PIPE_CLOSED)
    except Exception as error:
        sys.exit(_say_mendable(error))
    sys.exit(code if isinstance(code, int) else 0)


def _say_mendable(error: Exception) -> int:
    if (told := mendable(error)) is None:
        raise error
    log.debug("what led to it", exc_info=error)
    return _say(*told)


def _say(message: str, code: int) -> int:
    print(f"danceopd: {' '.join(message.split())}", file=sys.stderr)
    return code
