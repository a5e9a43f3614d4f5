"""A folder of pictures: one per row and seed, by the student or by several fields side by side, with a manifest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from danceopd import __version__
from danceopd.errors import UserError
from danceopd.evaluation.grids import fit_scale, picture_grid, resize
from danceopd.files import hash_file, output_folder, write_json
from danceopd.flow.fields import Field
from danceopd.inference.batch_files import Row, refuse
from danceopd.inference.generate import Drawer, Sample, encode_picture, open_image, to_fitted

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
    """One item per row and seed: rows take from `defaults` what they leave open, and all `seeds` unless they say one.

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
        batch: samples per forward pass.
        about: facts of the student for the manifest.

    Raises:
        UserError: if `out` holds something, or the student cannot draw an item.
    """
    check_items(drawer, items)
    entries = []
    with output_folder(out) as scratch:
        for name in fields:
            (scratch / name).mkdir()
        pages = _Pages(scratch, list(fields), items) if grid else None
        for item, sources, pictures in _draw(drawer, fields, items, batch):
            entries.append(_write_pictures(scratch, item, pictures, drawer))
            if pages is not None:
                pages.add(item, sources, list(pictures.values()))
            if 10 * len(entries) // len(items) > 10 * (len(entries) - 1) // len(items):  # ten lines at most
                log.info("drawn %d of %d", len(entries), len(items))
        manifest = {"danceopd": __version__, "student": about, "fields": list(fields), "pictures": entries}
        write_json(scratch / MANIFEST, manifest | {"grids": [] if pages is None else pages.names})
    return out


def _draw(
    drawer: Drawer, fields: Mapping[str, Field], items: list[Item], batch: int
) -> Iterator[tuple[Item, list[Image.Image], dict[str, Image.Image]]]:
    """The items, in order, with their source images as the student sees them and each field's picture."""
    own = drawer.settings.height, drawer.settings.width
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        samples = [with_sources(item) for item in part]
        drawn = drawer.draw_fields(fields, samples, batch)
        for place, (item, sample) in enumerate(zip(part, samples, strict=True)):
            shown = [to_fitted(image, *(sample.size or own)) for image in sample.sources]
            yield item, shown, {name: pictures[place] for name, pictures in drawn.items()}


def _write_pictures(folder: Path, item: Item, pictures: dict[str, Image.Image], drawer: Drawer) -> dict:
    """Write an item's pictures, and return its entry in the manifest."""
    sample, files, hashes = item.sample, {}, {}
    for field, picture in pictures.items():
        data = encode_picture(picture)
        files[field], hashes[field] = f"{field}/{item.name}.png", hashlib.sha256(data).hexdigest()
        (folder / files[field]).write_bytes(data)
    width, height = picture.size
    return {
        "files": files,
        "sha256": hashes,
        "prompt": sample.prompt,
        "sources": [{"file": str(path), "sha256": hash_file(path)} for path in item.sources],
        "seed": sample.seed,
        "steps": drawer.steps_of(sample),
        "guidance": drawer.guidance_of(sample),
        "size": f"{width}x{height}",
    }


class _Pages:
    """Writes rows of pictures as `grid.png`, or as numbered files of `GRID_ROWS` rows; holds the rows of one."""

    def __init__(self, folder: Path, fields: list[str], items: list[Item]):
        self._folder, self._left = folder, len(items)
        self._most = max(len(item.sources) for item in items)
        heads = ["source"] if self._most == 1 else [f"source {number + 1}" for number in range(self._most)]
        self._heads = [*heads, *fields]
        self._single = len(items) <= GRID_ROWS
        self._rows: list[list[np.ndarray | None]] = []
        self._titles: list[str] = []
        self.names: list[str] = []

    def add(self, item: Item, sources: list[Image.Image], drawn: list[Image.Image]) -> None:
        """One row; the last of a file writes it."""
        places = [*map(_tile, sources), *[None] * (self._most - len(sources))]
        self._rows.append([*places, *map(_tile, drawn)])
        self._titles.append(f"seed {item.sample.seed}: {item.sample.prompt}")
        self._left -= 1
        if len(self._rows) == GRID_ROWS or not self._left:
            self.names.append("grid.png" if self._single else f"grid-{len(self.names) + 1:03d}.png")
            picture_grid(self._rows, self._heads, self._titles, scale=1).save(self._folder / self.names[-1])
            self._rows, self._titles = [], []


def _tile(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return np.asarray(resize(pixels, fit_scale(pixels, TILE)))
