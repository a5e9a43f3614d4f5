"""What an import reads: the files and folders that its inputs name, and a row of them as it comes.

What lies there and is not read (a file of another kind, a column without a role) goes along with a row as `ignored`:
what is kept, refused and ignored is all there is.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from danceopd.data.importers.layouts import CAPTION, COMMON
from danceopd.data.importers.spec import ImportSpec
from danceopd.data.pictures import Refused
from danceopd.errors import UserError

MOST_BYTES = 1 << 28  # of one file inside a tar
SUFFIX = {"parquet": (".parquet",), "tar": (".tar", ".tar.gz", ".tgz")}
NO_KIND = "(none)"
SYSTEM_FILES = (".ds_store", "thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class InputFile:
    """One file, or one folder of pictures, wherever it lies.

    Attributes:
        system: what opens it.
        path: in that system.
        size: bytes; of a folder 0.
        ignored: files that lie beside it and are not read.
    """

    system: AbstractFileSystem
    path: str
    size: int
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Without the folders before it."""
        return plain(posixpath.basename(self.path.rstrip("/")))


@dataclass(frozen=True)
class RawRow:
    """A row as its data set has it.

    Attributes:
        file: number of its file in the list of inputs.
        number: of the row in the file.
        where: both in words.
        values: id, prompt, source, target, kind (None where there is none), and `carried`: a mapping.
        broken: why the row cannot be read at all, or None.
        ignored: (what, an example) of everything that lies there and is not read.
    """

    file: int
    number: int
    where: str
    values: dict[str, Any]
    broken: Refused | None = None
    ignored: tuple[tuple[str, str], ...] = ()


Ignored = tuple[tuple[str, str], ...]
Found = tuple[dict[str, Any] | Refused, Ignored]  # of one row: its values by role, or why there are none


def plain(name: str) -> str:
    """A file's name as text that can be written: bytes that are no UTF-8 become marks."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_system_file(name: str) -> bool:
    """Whether a file is one that systems leave behind (macOS's `._x`, `.DS_Store`, `__MACOSX/`)."""
    base = posixpath.basename(name)
    return base.startswith("._") or base.lower() in SYSTEM_FILES or "__MACOSX" in name.split("/")


def find_inputs(spec: ImportSpec) -> list[InputFile]:
    """The files to read, in a fixed order.

    Raises:
        UserError: if an input is not there, cannot be reached, or holds no such files.
    """
    found: list[InputFile] = []
    for location in spec.inputs:
        try:
            system, path = fsspec.core.url_to_fs(location)
            here = _list(system, path, spec.form.reads)
        except FileNotFoundError as error:
            raise UserError(f"input {location}: no such file or folder") from error
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"input {location}: cannot be read ({error}); check path, credentials and network"
            ) from error
        found += here
        if not here:
            kinds = " or ".join(SUFFIX.get(spec.form.reads, ("a folder",)))
            raise UserError(f"input {location}: layout {spec.layout} reads {kinds}, and there is none")
    return found


def _list(system: AbstractFileSystem, path: str, reads: str) -> list[InputFile]:
    if system.exists(path):  # a name may hold brackets
        paths = [path]
    else:
        paths = sorted(system.glob(path)) if any(sign in path for sign in "*?[") else []
        if not paths:
            raise FileNotFoundError(path)
    if reads == "folder":
        return [InputFile(system, p, 0) for p in paths if system.isdir(p)]
    found: list[InputFile] = []
    for place in paths:
        if not system.isdir(place):
            found.append(InputFile(system, place, system.size(place) or 0))
            continue
        inside = find_files(system, place)
        read = [p for p in inside if p.lower().endswith(SUFFIX[reads]) and not is_system_file(p)]
        left = tuple(p[len(place) :].lstrip("/") for p in inside if p not in set(read))
        found += [
            InputFile(system, p, system.size(p) or 0, () if number else left) for number, p in enumerate(sorted(read))
        ]
    return found


def find_files(system: AbstractFileSystem, folder: str) -> list[str]:
    """Every file below a folder, by name; on disk also below linked folders, each once."""
    if not isinstance(system, LocalFileSystem):
        return sorted(system.find(folder))
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [f"{here.rstrip('/')}/{name}" for name in names]
    return sorted(found)


def ignored_files(names: tuple[str, ...] | list[str], what: str = "file") -> Ignored:
    """Files that are not read, by their endings."""
    return tuple(
        ("a system's file", plain(name))
        if is_system_file(name)
        else (f"{what} {posixpath.splitext(name)[1].lower() or '(no ending)'}", plain(name))
        for name in names
    )


def roles_of(spec: ImportSpec, values: dict[str, Any], where: str) -> tuple[dict[str, Any], Ignored]:
    """A row's values by what they are, and the columns without a role."""
    values = {name: value for name, value in values.items() if not _is_nothing(value)}
    roles: dict[str, Any] = {}
    used = {*spec.form.carried, *COMMON, *spec.scores}
    for role in ("id", "prompt", "source", "target", "kind"):
        name = next((name for name in spec.column(role) if name in values), None)
        roles[role] = None if name is None else values[name]
        if name is not None:
            used.add(name)
    names = (*spec.form.carried, *COMMON, *spec.scores)
    roles["carried"] = {name: values[name] for name in names if name in values}
    return roles, tuple((f"column {name!r}", where) for name in values if name not in used)


def _is_nothing(value: Any) -> bool:
    """Whether a value is null, or the struct of nulls that stands for a picture that is not there."""
    return value is None or (isinstance(value, dict) and all(part is None for part in value.values()))


def with_kind(roles: dict) -> dict:
    """A picture with a caption and no source can only be a drawing."""
    return roles | {"kind": roles["kind"] or (CAPTION if roles["source"] is None else NO_KIND)}
