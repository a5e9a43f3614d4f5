"""Rows of a folder of pictures: listed in `metadata.jsonl` or `metadata.csv`, or each with its caption beside it.

A metadata file, wherever it lies in the folder, describes the pictures of its own folder and of those below it;
pictures that none is for have a caption of the same name (`.txt`, `.caption`) or a `.json` of fields.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from danceopd.data.importers.inputs import (
    Found,
    Ignored,
    InputFile,
    find_files,
    ignored_files,
    is_system_file,
    plain,
    roles_of,
    with_kind,
)
from danceopd.data.importers.spec import ImportSpec
from danceopd.data.pictures import Refused
from danceopd.errors import UserError
from danceopd.text import decode, json_lines, parse_csv, parse_json

DECODED = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
)
UNDECODED = (".heic", ".heif", ".jp2", ".j2k", ".jxl", ".psd", ".svg", ".exr", ".ico", ".tga")  # rows, each refused
PICTURES = (*DECODED, *UNDECODED)
CAPTIONS = (".txt", ".caption")
FIELDS = ".json"  # of one picture
METADATA = ("metadata.jsonl", "metadata.csv")


def folder_rows(spec: ImportSpec, folder: InputFile, skip: int) -> Iterator[tuple[int, Found]]:
    """A folder's rows from number `skip` on.

    Raises:
        UserError: if there are no pictures, or a metadata file cannot be read.
    """
    names = [path[len(folder.path) :].lstrip("/") for path in find_files(folder.system, folder.path)]
    if spec.images is None and not any(_is_picture(name) for name in names):
        raise UserError(f"{folder.path}: no pictures ({', '.join(DECODED)}) in the folder")
    listed = _metadata_files(names, folder)
    left = {name for name in names if name not in set(listed.values())}
    rows = _all_rows(spec, folder, listed, left)
    for number, (values, ignored) in enumerate(_with_rest(rows, lambda: _rest(left))):
        if number >= skip:
            yield number, (values, ignored)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES) and not is_system_file(name)


def _metadata_files(names: list[str], folder: InputFile) -> dict[str, str]:
    """The metadata file of each folder that has one."""
    found: dict[str, str] = {}
    for name in names:
        home, base = posixpath.split(name)
        if base in METADATA:
            if home in found:
                raise UserError(f"{folder.path}: both {found[home]} and {name}; remove one of them")
            found[home] = name
    return found


def _with_rest(rows: Iterable[Found], rest: Callable[[], Ignored]) -> Iterator[Found]:
    """The rows; with the last one goes what no row has taken."""
    last: Found | None = None
    for row in rows:
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last[0], (*last[1], *rest())


def _rest(left: set[str]) -> Ignored:
    found: list[tuple[str, str]] = []
    for name in sorted(left):
        if _is_picture(name):
            found.append(("picture that no metadata names", plain(name)))
        elif name.lower().endswith((*CAPTIONS, FIELDS)) and not is_system_file(name):
            found.append(("caption or fields of no picture", plain(name)))
        else:
            found += ignored_files([name])
    return tuple(found)


def _all_rows(spec: ImportSpec, folder: InputFile, listed: dict[str, str], left: set[str]) -> Iterator[Found]:
    beside = sorted(left)
    for home, metadata in listed.items():
        yield from _listed(spec, folder, home, metadata, left)
    yield from _captioned(spec, folder, [name for name in beside if not _is_covered(name, listed)], left)


def _is_covered(name: str, listed: dict[str, str]) -> bool:
    return any(not home or name.startswith(f"{home}/") for home in listed)


# ------------------------------------------------------------------------------------------------------------ metadata


def _listed(spec: ImportSpec, folder: InputFile, home: str, metadata: str, left: set[str]) -> Iterator[Found]:
    for line, values in _lines(folder, metadata):
        where = f"{plain(metadata)}, line {line}"
        if isinstance(values, UserError):
            yield Refused("line-not-json", str(values)), ()
            continue
        roles, ignored = roles_of(spec, values, where)
        for role in ("source", "target"):
            if isinstance(roles[role], str) and spec.images is None:
                roles[role] = _below(home, roles[role])
                left.discard(posixpath.normpath(roles[role]))
        yield with_kind(roles), ignored


def _below(home: str, name: str) -> str:
    """A name in a metadata file, from the data set's folder; one that leads out of it is refused later."""
    return name if not home or name.startswith("/") or "://" in name else f"{home}/{name}"


def _lines(folder: InputFile, metadata: str) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    path = f"{folder.path.rstrip('/')}/{metadata}"
    try:
        if metadata.endswith(".jsonl"):
            with folder.system.open(path, "rb") as lines:
                yield from json_lines(lines, path)
        else:
            _, rows = parse_csv(decode(folder.system.cat_file(path), path), path)
            for line, cells in rows:
                found = cells if isinstance(cells, UserError) else {n: c for n, c in cells.items() if c.strip()}
                yield line, found
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


# ------------------------------------------------------------------------------------------------------------ captions


def _captioned(spec: ImportSpec, folder: InputFile, names: list[str], left: set[str]) -> Iterator[Found]:
    beside: dict[str, str] = {}
    for name in names:  # `A.TXT` is the caption of `A.png`
        stem, suffix = posixpath.splitext(name)
        beside.setdefault(stem + suffix.lower(), name)
    for name in names:
        if not _is_picture(name):
            continue
        stem = posixpath.splitext(name)[0]
        left.discard(name)
        values: dict[str, Any] = {}
        ignored: Ignored = ()
        try:
            if (fields := beside.get(stem + FIELDS)) is not None:
                left.discard(fields)
                values = _fields(folder, fields)
            roles, ignored = roles_of(spec, values, plain(name))
            if (caption := next((beside[stem + end] for end in CAPTIONS if stem + end in beside), None)) is not None:
                left.discard(caption)
                roles["prompt"] = folder.system.cat_file(f"{folder.path.rstrip('/')}/{caption}")
        except UserError as error:
            yield Refused("line-not-json", str(error)), ()
            continue
        except OSError as error:
            said = error.strerror or error
            yield Refused("caption-unreadable", f"{folder.name}: {plain(name)}: caption: {said}"), ()
            continue
        # Read later and by whoever decodes it: only its path goes along.
        if isinstance(roles["source"], str):
            roles["source"] = _below(posixpath.dirname(name), roles["source"])
        yield with_kind(roles | {"target": name}), ignored


def _fields(folder: InputFile, name: str) -> dict[str, Any]:
    where = f"{folder.name}: {plain(name)}"
    value = parse_json(decode(folder.system.cat_file(f"{folder.path.rstrip('/')}/{name}"), where), where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object of fields such as 'caption'")
    return value
