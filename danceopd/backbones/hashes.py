"""SHA-256 of weights that lie where a recipe says, read again only where a file has changed.

A base of 4 to 20 billion weights is 8 to 40 GB, and the hash of all its files names every step's product. So the
workspace notes each file's hash with its size, its inode number and the times of its last change, and a file that still
has these is not read again. The times are the file system's own as well (ctime), which nothing sets back, so a file
that was rewritten under its old date is read. Where inode numbers do not last (some buckets mounted as folders), all is
read each time. Notes that are removed are made anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from danceopd.errors import UserError
from danceopd.files import content_key, hash_file, hash_folder, write_json
from danceopd.text import read_object

log = logging.getLogger(__name__)

NOTES = "cache/hashes"  # below the workspace, one file a place
SETTLED = 10.0  # seconds: what changed within them may change again without another time, as file systems count it


def hash_weights(weights: Path, workspace: Path) -> str:
    """`hash_file` or `hash_folder` of weights; only what has changed since this workspace last asked is read."""
    with noted_hashes(weights, workspace) as hash_one:
        return hash_one(weights) if weights.is_file() else hash_folder(weights, hash_one=hash_one)


@contextmanager
def noted_hashes(place: Path, workspace: Path) -> Iterator[Callable[[Path], str]]:
    """A `hash_file` for a place or files below it, which reads none that is as the workspace's notes have it.

    What it reads is noted at the end. Notes are replaced whole, and every process writes only what it has seen: of
    several at once the last one's stay.

    Args:
        place: a folder, which may be read-only, or a file.
        workspace: keeps the notes.
    """
    place = Path(place)
    file = Path(workspace) / NOTES / f"{content_key(str(place.resolve()))}.json"
    known, found, read = _read_notes(file), {}, 0

    def hash_one(path: Path) -> str:
        nonlocal read
        name, stamp = path.relative_to(place).as_posix(), _stamp(path)
        noted = known.get(name)
        if isinstance(noted, list) and noted[:-1] == stamp:
            return noted[-1]
        asked = time.time()
        digest = hash_file(path)
        read += stamp[0]
        if _stamp(path) == stamp and stamp[-1] < (asked - SETTLED) * 1e9:
            found[name] = [*stamp, digest]
        return digest

    yield hash_one
    if read:
        log.debug("%s: %d bytes were read to hash it", place, read)
    if found:
        with suppress(OSError):  # a workspace that takes no notes has all read again
            write_json(file, known | found)


def _read_notes(file: Path) -> dict:
    try:
        return read_object(file) if file.is_file() else {}
    except UserError:
        return {}


def _stamp(path: Path) -> list[int]:
    """What is another when a file's contents are: size, inode number, and times of its last change in nanoseconds.

    The device's number is none of it: it is another on each machine that mounts the same volume.
    """
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
