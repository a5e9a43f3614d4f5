"""`danceopd world ...`: the small world that ships with the project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from danceopd.errors import UserError

world_app = typer.Typer(no_args_is_help=True, help="The small world that ships with the project.")


@world_app.command("build-base")
def world_build_base(
    out: Annotated[Path, typer.Option(help="folder for the pipeline; <out>.sha256 and <out>.json appear beside it")],
    vae_steps: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    open_steps: Annotated[int | None, typer.Option(min=0, help="on captions that leave something open")] = None,
) -> None:
    """Make the small world's base from nothing: 34 minutes of training; 10,500 open steps took 42 more."""
    from dataclasses import replace

    from danceopd.files import check_output
    from danceopd.pretraining.world_base import BuildPlan, build_base

    check_output(out)
    for beside in (out.with_suffix(".sha256"), out.with_suffix(".json")):
        if beside.exists():
            raise UserError(f"{beside}: is there already, and would be written beside {out}; name another --out")
    given = {"vae_steps": vae_steps, "steps": steps, "open_steps": open_steps}
    figures = build_base(out, replace(BuildPlan(), **{k: v for k, v in given.items() if v is not None}))
    typer.echo(figures)
