"""`danceopd serve`: a student behind HTTP until it is told to stop."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from danceopd.cli.generate import Precision
from danceopd.cli.options import StoreOption
from danceopd.errors import UserError

if TYPE_CHECKING:  # slow to import, and --help needs none of it
    import socket

KEY = "DANCEOPD_API_KEY"
CACHE = Path(tempfile.gettempdir()) / "danceopd-serving"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NAMED = [*LOOPBACK, "[::1]"]  # in a request's Host header


def serve(
    model: Annotated[str, typer.Argument(help="a student's pipeline folder, or models:/NAME@ALIAS of the registry")],
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    name: Annotated[str | None, typer.Option(help="of the model in the API; default: its folder's")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Euler steps, where a request names none; default: the student's own")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="a request may ask for")] = 50,
    max_n: Annotated[int, typer.Option(min=1, help="pictures a request may ask for")] = 4,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="of a picture; default: of the student's size")] = None,
    max_sources: Annotated[int, typer.Option(min=1, help="source images of a request")] = 4,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="of a request's body")] = 20,
    queue: Annotated[int, typer.Option(min=1, help="requests that may wait; more are told to come again")] = 8,
    grace: Annotated[int, typer.Option(min=0, help="seconds for the request in work once told to stop")] = 25,
    dtype: Annotated[Precision | None, typer.Option(help="of the weights; default: the student's own")] = None,
    tracking_uri: StoreOption = None,
    follow_every: Annotated[int, typer.Option(min=1, help="seconds between two looks at the alias")] = 30,
    cache: Annotated[Path, typer.Option(help="folder for registered versions")] = CACHE,
) -> None:
    """Serve a student over HTTP: OpenAI's images API, health, metrics, and a page to try it.

    By models:/NAME@ALIAS it follows the alias: another version takes over between two requests, once it has drawn a
    probe picture. A key in the environment variable DANCEOPD_API_KEY is asked of every client as a bearer token.
    """
    from danceopd.inference.generate import read_settings
    from danceopd.serving.reference import parse_reference

    reference = parse_reference(model)
    if reference is None:
        read_settings(Path(model))  # a wrong folder is said before anything starts
    elif not tracking_uri:
        raise UserError(f"{model}: name the registry by --tracking-uri or MLFLOW_TRACKING_URI")
    if steps is not None and steps > max_steps:
        raise UserError(f"--steps {steps} is more than --max-steps {max_steps}")
    key = os.environ.get(KEY)
    key = None if key is None else key.strip()  # a key that was read from a file may end in a line break
    if key == "":
        raise UserError(f"{KEY} is set and empty; give it a key, or unset it")
    listener = _listen(host, port)

    from danceopd.serving.follower import following, from_folder
    from danceopd.serving.schema import Limits
    from danceopd.serving.server import run_server

    limits = Limits(steps, max_steps, max_n, max_pixels, max_sources, max_upload_mb * 1_000_000)
    shown = f"[{host}]" if ":" in host else host
    if reference is None:
        load, follow, shown_name = from_folder(Path(model), dtype), None, _name(Path(model))
    else:
        load, follow = following(reference, str(tracking_uri), cache, dtype, follow_every)
        shown_name = reference.model
    run_server(
        load,
        listener,
        name or shown_name,
        limits,
        key,
        queue,
        grace,
        NAMED if host in LOOPBACK else None,
        lambda: typer.echo(f"http://{shown}:{listener.getsockname()[1]}/"),
        follow,
    )


def _name(model: Path) -> str:
    folder = model.resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name


def _listen(host: str, port: int) -> socket.socket:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from error
