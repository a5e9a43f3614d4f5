"""A folder of pictures: one a row and seed, by the student or by several fields side by side, with a manifest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from danceopd import __version__
from danceopd.batch_files import Row, refuse
from danceopd.errors import UserError
from danceopd.evaluation.grids import fit_scale, picture_grid, resize
from danceopd.fields import Field
from danceopd.files import atomic_folder, write_json
from danceopd.generate import Drawer, Sample, encode_picture, open_image, to_fitted

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
GRID_ROWS = 12  # of one grid picture
TILE = 192  # pixels of its pictures' longer side, about


@dataclass(frozen=True)
class Item:
    """One picture to draw.

    Attributes:
        where: the row it comes from, for errors.
        name: of its file, without ending.
        sources: files of its source images.
        sample: everything else; its `sources` are read when it is drawn.
    """

    where: str
    name: str
    sources: tuple[Path, ...]
    sample: Sample


def plan(rows: list[Row], defaults: Sample, seeds: list[int]) -> list[Item]:
    """One item a row and seed: rows take from `defaults` what they leave open, and all `seeds` unless they say one.

    Args:
        rows: what to draw.
        defaults: steps, guidance and size.
        seeds: of rows that name none.

    Raises:
        UserError: if two pictures would have one name.
    """
    items = []
    digits = max(4, len(str(len(rows))))
    for number, row in enumerate(rows, start=1):
        mine = seeds if row.seed is None else [row.seed]
        stem = row.name or f"{number:0{digits}d}"
        for seed in mine:
            sample = Sample(
                row.prompt,
                (),
                seed,
                defaults.steps if row.steps is None else row.steps,
                defaults.guidance if row.guidance is None else row.guidance,
                defaults.size if row.size is None else row.size,
            )
            items.append(Item(row.where, stem if len(mine) == 1 else f"{stem}-seed{seed}", row.sources, sample))
    first: dict[str, Item] = {}
    for item in items:
        if first.setdefault(item.name.lower(), item) is not item:
            other = first[item.name.lower()].where
            raise UserError(f"{item.where}: its picture {item.name!r} has the name of one of {other}; name them apart")
    return items


def with_sources(item: Item) -> Sample:
    """An item's sample with its source images read."""
    return replace(item.sample, sources=tuple(open_image(path) for path in item.sources))


def check_items(drawer: Drawer, items: list[Item]) -> None:
    """Refuse, row by row, what the student cannot draw, before anything is drawn."""
    problems: dict[str, None] = {}  # several seeds of a row are one problem
    for item in items:
        try:
            drawer.check(item.sample, item.where)
            drawer.check_shape(len(item.sources), item.sample.size, item.where)
        except UserError as error:
            problems[str(error)] = None
    refuse(list(problems))


def check_folder(out: Path) -> None:
    """Refuse an output folder in which something lies already."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: exists already; several pictures and a grid go to a folder that is new or empty")


def draw_batch(
    drawer: Drawer, fields: Mapping[str, Field], items: list[Item], out: Path, grid: bool, batch: int, about: dict
) -> Path:
    """Draw items with every field into a folder that appears, whole, at the end.

    It holds `<field>/<name>.png`, with `grid` one or more `grid*.png` (source images, then the fields; all pictures of
    a row start from the same noise), and `manifest.json`.

    Args:
        drawer: the student.
        fields: the columns, in order.
        items: the rows, in order.
        out: the folder; it must be new or empty.
        grid: whether to lay the pictures out side by side as well.
        batch: samples a forward pass.
        about: facts of the student for the manifest.

    Raises:
        UserError: if `out` holds something, or the student cannot draw an item.
    """
    check_folder(out)
    check_items(drawer, items)
    entries, tiles = [], []
    with atomic_folder(Path(out).resolve()) as scratch:
        for name in fields:
            (scratch / name).mkdir()
        for part, sources, drawn in _draw(drawer, fields, items, batch):
            for place, item in enumerate(part):
                pictures = {name: column[place] for name, column in drawn.items()}
                files = {name: f"{name}/{item.name}.png" for name in fields}
                data = {name: encode_picture(picture) for name, picture in pictures.items()}
                for name, path in files.items():
                    (scratch / path).write_bytes(data[name])
                entries.append(_entry(item, files, data, next(iter(pictures.values())).size))
                if grid:
                    tiles.append([[_tile(s) for s in sources[place]], [_tile(p) for p in pictures.values()]])
            if 10 * len(entries) // len(items) > 10 * (len(entries) - len(part)) // len(items):  # ten lines at most
                log.info("drawn %d of %d", len(entries), len(items))
        grids = _write_grids(scratch, list(fields), items, tiles) if grid else []
        manifest = {"danceopd": __version__, "student": about, "fields": list(fields), "grids": grids}
        write_json(scratch / MANIFEST, manifest | {"pictures": entries})
    return out


def _draw(
    drawer: Drawer, fields: Mapping[str, Field], items: list[Item], batch: int
) -> Iterator[tuple[list[Item], list[list[Image.Image]], dict[str, list[Image.Image]]]]:
    """Parts of the items, in order, with their source images and pictures; never more than a part in memory."""
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        samples = [with_sources(item) for item in part]
        height, width = drawer.settings.height, drawer.settings.width
        shown = [[to_fitted(image, *(s.size or (height, width))) for image in s.sources] for s in samples]
        yield part, shown, drawer.draw_fields(fields, samples, batch)


def _entry(item: Item, files: dict[str, str], data: dict[str, bytes], size: tuple[int, int]) -> dict:
    sample = item.sample
    return {
        "files": files,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in data.items()},
        "prompt": sample.prompt,
        "sources": [
            {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in item.sources
        ],
        "seed": sample.seed,
        "steps": sample.steps,
        "guidance": sample.guidance,
        "size": f"{size[0]}x{size[1]}",
    }


def _tile(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return np.asarray(resize(pixels, fit_scale(pixels, TILE)))


def _write_grids(folder: Path, fields: list[str], items: list[Item], tiles: list) -> list[str]:
    most = max(len(sources) for sources, _ in tiles)
    heads = ["source"] if most == 1 else [f"source {number + 1}" for number in range(most)]
    rows = [[*sources, *[None] * (most - len(sources)), *drawn] for sources, drawn in tiles]
    titles = [f"seed {item.sample.seed}: {item.sample.prompt}" for item in items]
    pages = range(0, len(rows), GRID_ROWS)
    names = ["grid.png"] if len(pages) == 1 else [f"grid-{page + 1:03d}.png" for page in range(len(pages))]
    for name, start in zip(names, pages, strict=True):
        stop = start + GRID_ROWS
        picture_grid(rows[start:stop], [*heads[:most], *fields], titles[start:stop], scale=1).save(folder / name)
    return names
