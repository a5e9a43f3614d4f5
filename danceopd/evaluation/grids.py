"""Rows of pictures with titles, as one image: training previews and the report's files."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT, _WRONG = "#ffffff", "#1f2328", "#d0d7de", "#cf222e"
_GAP, _MARGIN, _FONT, _LINE, _TITLE_WIDTH = 10, 14, 14, 18, 210


def resize(picture: np.ndarray, scale: float) -> Image.Image:
    """A picture (H, W, 3) uint8 scaled: sharp pixels when enlarged, smooth when reduced."""
    height, width = picture.shape[:2]
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize((max(1, round(width * scale)), max(1, round(height * scale))), method)


def fit_scale(picture: np.ndarray, side: int) -> float:
    """The scale that brings a picture's longer side to about `side` pixels: a whole factor when it is enlarged."""
    longer = max(picture.shape[:2])
    return max(1, side // longer) if longer <= side else side / longer


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """Text broken into at most `lines` lines of `width` pixels; what is left over ends in an ellipsis."""
    rows = [""]
    for word in text.split():
        while word:
            trial = f"{rows[-1]} {word}".strip()
            if font.getlength(trial) <= width:
                rows[-1], word = trial, ""
            elif rows[-1]:
                rows.append("")
            else:
                fits = next((n for n in range(len(word), 1, -1) if font.getlength(word[:n]) <= width), 1)
                rows[-1], word = word[:fits], word[fits:]
                if word:
                    rows.append("")
    if len(rows) > lines:
        rows = rows[: max(1, lines)]
        while rows[-1] and font.getlength(rows[-1] + "…") > width:
            rows[-1] = rows[-1][:-1]
        rows[-1] = rows[-1].rstrip() + "…"
    return rows


def picture_grid(
    rows: list[list[np.ndarray | None]],
    column_titles: list[str],
    row_titles: list[str],
    scale: float = 2,
    wrong: Set[tuple[int, int]] = frozenset(),
) -> Image.Image:
    """Lay pictures out in a table.

    Args:
        rows: pictures (H, W, 3) uint8; None leaves a place empty.
        column_titles: one per column, shown above.
        row_titles: one per row, wrapped at its left; all empty: no room is kept for them.
        scale: of the pictures; titles keep their size.
        wrong: places (row, column) to outline in red.

    Raises:
        ValueError: if titles and pictures do not match in number, or there is no picture.
    """
    if len(row_titles) != len(rows) or any(len(row) != len(column_titles) for row in rows):
        raise ValueError("picture_grid wants one title per row and one per column")
    tiles = [[None if p is None else resize(p, scale) for p in row] for row in rows]
    sizes = [tile.size for row in tiles for tile in row if tile is not None]
    if not sizes:
        raise ValueError("picture_grid has no picture to show")
    font = ImageFont.load_default(size=_FONT)
    width = max(max(w for w, _ in sizes), 56)
    height = max(h for _, h in sizes)
    headings = [_wrap(title, font, width, 2) for title in column_titles]
    top = _MARGIN + max(len(lines) for lines in headings) * _LINE + 4
    left = _MARGIN + (_TITLE_WIDTH + _GAP if any(row_titles) else 0)
    step = max(height, _LINE) + _GAP
    size = left + len(column_titles) * (width + _GAP) - _GAP + _MARGIN, top + len(rows) * step - _GAP + _MARGIN
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headings):
        for number, line in enumerate(lines):
            center = left + column * (width + _GAP) + width // 2
            draw.text((center, _MARGIN + number * _LINE), line, _INK, font, anchor="ma")
    for row, title in enumerate(row_titles):
        y = top + row * step
        lines = _wrap(title, font, _TITLE_WIDTH, max(1, height // _LINE))
        y_text = y + max(0, height - len(lines) * _LINE) // 2
        for number, line in enumerate(lines):
            draw.text((_MARGIN, y_text + number * _LINE), line, _INK, font)
        for column, tile in enumerate(tiles[row]):
            x = left + column * (width + _GAP)
            if tile is None:
                draw.rectangle((x, y, x + width - 1, y + height - 1), outline=_FAINT)
                continue
            x += (width - tile.width) // 2
            color, thick = (_WRONG, 3) if (row, column) in wrong else (_FAINT, 1)
            draw.rectangle((x - thick, y - thick, x + tile.width - 1 + thick, y + tile.height - 1 + thick), color)
            sheet.paste(tile, (x, y))
    return sheet
