"""Files of pictures to draw, JSONL or CSV: one row per picture, checked whole before anything is drawn.

Every row is read, and every wrong field of every row is found, before the file is refused: a batch is mended once.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danceopd.errors import UserError
from danceopd.inference.generate import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, check_prompt, open_image, read_size
from danceopd.text import decode, json_lines, parse_csv, read_bytes

SHOWN = 5  # problems told of a file; the others are counted
LISTED = ";"  # between the source images of one CSV cell


@dataclass(frozen=True)
class Row:
    """One row; what it leaves open is None.

    Attributes:
        where: the file and line, for errors.
        prompt: caption or instruction.
        sources: pictures to edit.
        seed: of the noise.
        steps: Euler steps.
        guidance: scale of classifier-free guidance.
        size: (height, width) in pixels.
        name: of the picture's file, without its ending.
    """

    where: str
    prompt: str
    sources: tuple[Path, ...] = ()
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    name: str | None = None


def read_rows(path: Path) -> list[Row]:
    """Read a batch file. Paths of source images in it are relative to its folder.

    Raises:
        UserError: naming file, line and field of what is wrong, the first `SHOWN` of it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a batch file is one of {', '.join(readers)}")
    data = read_bytes(path)
    problems: list[str] = []
    rows = [row for line, found in reader(data, path, problems) if (row := _row(path, line, found, problems))]
    problems += _repeated_names(rows)
    refuse(problems)
    if not rows:
        raise UserError(f"{path}: no rows; give one per picture, each with at least a prompt")
    return rows


def refuse(problems: list[str]) -> None:
    """Raise a `UserError` that tells the first of the problems and counts the others, if there are any."""
    if problems:
        more = len(problems) - SHOWN
        raise UserError("; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else ""))


def _json_lines(data: bytes, path: Path, problems: list[str]) -> Iterator[tuple[int, dict]]:
    for line, found in json_lines(io.BytesIO(data), str(path)):
        if isinstance(found, UserError):
            problems.append(str(found))
        else:
            yield line, found


def _csv_rows(data: bytes, path: Path, problems: list[str]) -> Iterator[tuple[int, dict]]:
    names, rows = parse_csv(decode(data, str(path)), str(path))
    for name in names:
        if name not in _READERS:
            problems.append(f"{path}, line 1: column {name!r} is not known; columns are: {', '.join(_READERS)}")
    if problems:
        return
    for line, found in rows:
        if isinstance(found, UserError):
            problems.append(str(found))
            continue
        cells: dict[str, Any] = {name: cell for name, cell in found.items() if cell.strip()}
        if "source" in cells:
            cells["source"] = [part.strip() for part in cells["source"].split(LISTED)]
        yield line, cells


def _row(path: Path, line: int, found: dict[str, Any], problems: list[str]) -> Row | None:
    where, values = f"{path}, line {line}", {}
    before = len(problems)
    for name, value in found.items():
        if name not in _READERS:
            problems.append(f"{where}: field {name!r} is not known; fields are: {', '.join(_READERS)}")
        elif value is not None:
            try:
                values["sources" if name == "source" else name] = _READERS[name](
                    value, f"{where}, field '{name}'", path
                )
            except UserError as error:
                problems.append(str(error))
    if found.get("prompt") is None:
        problems.append(f"{where}, field 'prompt': missing; say what to draw or to change")
    return Row(where, **values) if len(problems) == before else None


def _read_prompt(value: Any, where: str, _: Path) -> str:
    check_prompt(value, where)
    return value


def _read_sources(value: Any, where: str, path: Path) -> tuple[Path, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{where}: {value!r}; give the path of a picture, or a list of paths")
    found = tuple(path.parent / name for name in names)
    for one in found:
        try:
            open_image(one)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return found


def _number(kind: type, low: float, high: float, what: str) -> Callable[[Any, str, Path], Any]:
    def read(value: Any, where: str, _: Path) -> Any:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            number = kind(value)
            if isinstance(value, float) and number != value:  # int() would cut a fraction off
                raise ValueError
        except (ValueError, OverflowError):
            raise UserError(f"{where}: {value!r}; give {what}") from None
        if not low <= number <= high:
            raise UserError(f"{where}: {value!r}; give {what}")
        return number

    return read


def _read_size(value: Any, where: str, _: Path) -> tuple[int, int]:
    return read_size(value, where)


def read_name(value: Any, where: str, _: Path | None = None) -> str:
    """A name that is a file's or folder's on any system, without its `.png`.

    Raises:
        UserError: if it is not.
    """
    text = value.removesuffix(".png") if isinstance(value, str) else ""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", text) or text.endswith("."):
        raise UserError(f"{where}: {value!r}; use letters, digits, '_', '-' and '.', at most 100, no folders")
    return text


_READERS: dict[str, Callable[[Any, str, Path], Any]] = {
    "prompt": _read_prompt,
    "source": _read_sources,
    "seed": _number(int, 0, MAX_SEED, f"a whole number from 0 to {MAX_SEED}"),
    "steps": _number(int, 1, MAX_STEPS, f"a whole number from 1 to {MAX_STEPS}"),
    "guidance": _number(float, 1, MAX_GUIDANCE, f"a number from 1 (none) to {MAX_GUIDANCE:g}"),
    "size": _read_size,
    "name": read_name,
}


def _repeated_names(rows: list[Row]) -> list[str]:
    first: dict[str, Row] = {}
    problems = []
    for row in rows:
        if row.name is not None and first.setdefault(row.name.lower(), row) is not row:
            problems.append(f"{row.where}, field 'name': {row.name!r} is taken by {first[row.name.lower()].where}")
    return problems
