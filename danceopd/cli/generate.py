"""`danceopd generate`: one picture, or a folder of them from a batch file, beside the teachers if that is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from danceopd.errors import UserError

if TYPE_CHECKING:  # torch and diffusers are slow to import, and --help needs neither
    from danceopd.flow.fields import Field
    from danceopd.inference.batch_files import Row
    from danceopd.inference.draw_batch import Item
    from danceopd.inference.side_by_side import Origins

Precision = Literal["float32", "bfloat16"]


def generate(
    model: Annotated[Path, typer.Argument(help="a student's pipeline folder")],
    prompt: Annotated[str | None, typer.Argument(help="caption or instruction")] = None,
    image: Annotated[list[Path], typer.Option("--image", "--source", help="picture to edit; repeatable")] = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(help="PNG, JPEG or WebP to write; for several pictures, a new folder  [default: out.png, or out]"),
    ] = None,
    seed: Annotated[list[int], typer.Option(min=0, help="repeatable: a picture each")] = [0],  # noqa: B006
    steps: Annotated[int | None, typer.Option(min=1, help="Euler steps; default: the student's own")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="scale of classifier-free guidance, 1: none; default: the student's own")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; default: the student's own")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL or CSV: prompt, and perhaps source, seed, steps, guidance, size, name")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="teachers and student side by side, from the same noise")
    ] = False,
    teacher: Annotated[
        list[str], typer.Option(help="for --grid: NAME=WEIGHTS, repeatable; default: those it was distilled from")
    ] = [],  # noqa: B006
    base: Annotated[str | None, typer.Option(help="for --teacher: the base they belong to")] = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures per forward pass; the last bit may depend on it")] = 1,
    dtype: Annotated[Precision | None, typer.Option(help="of the weights; default: the student's own")] = None,
) -> None:
    """Draw or edit pictures with a student: one, or a batch; `--grid` lays its teachers' beside them."""
    from danceopd.files import check_output, check_output_file
    from danceopd.inference.draw_batch import plan
    from danceopd.inference.generate import FORMATS, Sample, is_drawn, read_settings, read_size

    if (teacher or base) and not grid:
        raise UserError("--teacher and --base are for --grid; add it")
    read_settings(model)  # a wrong folder is said before anything else is read
    rows = _rows(prompt, image, prompts)
    wanted = None if size is None else read_size(size, "--size")
    items = plan(rows, Sample("", (), 0, steps, guidance, wanted), seed)
    if len(items) == 1 and prompts is None and not grid:
        file = out or Path("out.png")
        check_output_file(file, tuple(FORMATS), is_drawn)
        typer.echo(_draw_one(model, items[0], file, dtype))
        return
    folder = out or Path("out")
    if folder.suffix.lower() in FORMATS:
        raise UserError(f"--out {folder}: several pictures and a grid go to a folder; name one")
    check_output(folder)
    origins = _origins(model, base, teacher) if grid else None
    typer.echo(_draw_many(model, items, folder, origins, batch, dtype))


def _rows(prompt: str | None, images: list[Path], prompts: Path | None) -> list[Row]:
    from danceopd.inference.batch_files import Row, read_rows
    from danceopd.inference.generate import open_image

    if (prompt is None) == (prompts is None):
        raise UserError("give either a prompt, or a batch file by --prompts")
    if prompts is None:
        assert prompt is not None
        for path in images:
            open_image(path)
        return [Row("the prompt", prompt, tuple(images))]
    if images:
        raise UserError("--image goes with a prompt; in a batch file the field 'source' names source images")
    return read_rows(prompts)


def _draw_one(model: Path, item: Item, out: Path, dtype: Precision | None) -> Path:
    from danceopd.files import write_atomic
    from danceopd.inference.draw_batch import check_items, with_sources
    from danceopd.inference.generate import encode_file, open_student

    drawer = open_student(model, dtype)
    check_items(drawer, [item])
    [picture] = drawer.draw_samples([with_sources(item)])
    return write_atomic(out, encode_file(picture, out.suffix.lower()))


def _draw_many(
    model: Path, items: list[Item], folder: Path, origins: Origins | None, batch: int, dtype: Precision | None
) -> Path:
    from danceopd.inference.draw_batch import draw_batch
    from danceopd.inference.generate import open_student, own_dtype
    from danceopd.inference.side_by_side import STUDENT, open_side_by_side

    about: dict[str, Any] = {"model": str(model), "dtype": dtype or own_dtype(model)}
    fields: dict[str, Field]
    if origins is None:
        drawer = open_student(model, dtype)
        fields = {STUDENT: drawer.field}
    else:
        drawer, fields = open_side_by_side(model, origins, dtype)
        about |= {"base": str(origins.base), "teachers": {n: str(path) for n, path in origins.teachers.items()}}
    return draw_batch(drawer, fields, items, folder, origins is not None, batch, about)


def _origins(model: Path, base: str | None, teachers: list[str]) -> Origins:
    from danceopd.inference.batch_files import read_name
    from danceopd.inference.side_by_side import find_origins, named_origins

    if not teachers:
        if base is not None:
            raise UserError("--base belongs to --teacher NAME=WEIGHTS; without one the student's own base is taken")
        return find_origins(model)
    named: dict[str, str] = {}
    for text in teachers:
        name, sign, weights = text.partition("=")
        if not sign or not weights:
            raise UserError(f"--teacher {text!r}: write NAME=WEIGHTS")
        if read_name(name, f"--teacher {text!r}") in named:
            raise UserError(f"--teacher {text!r}: {name} is named twice")
        named[name] = weights
    return named_origins(base, named, Path("runs"))
