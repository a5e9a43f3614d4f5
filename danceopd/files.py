"""Files that are either whole or absent, and names made from contents."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from danceopd.errors import UserError
from danceopd.text import parse_json, read_text
from danceopd.text import read_json as read_json

log = logging.getLogger(__name__)

FIELD = "field.json"  # in a field's folder (see `flow/field_io.py`): its kind and name
CHECKPOINT = "step-"  # a checkpoint's folder, before the step


def at_home(location: str | Path) -> Path:
    """A path as people write it: `~/x` lies below the home folder, which no shell puts into a recipe or `--set`."""
    path = Path(location)
    return path.expanduser() if path.parts[:1] == ("~",) else path


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path, pattern: str = "**/*", hash_one: Callable[[Path], str] = hash_file) -> str:
    """SHA-256 over the relative names and contents of the files below `folder` that match `pattern`.

    `hash_one` gives a file's own hash.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).glob(pattern) if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_one(path)}\n".encode())
    return digest.hexdigest()


def content_key(*parts: Any) -> str:
    """A 16-digit name for JSON-like values: equal values, equal name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A scratch folder beside `path` that takes its name if the block ends well, and is removed if it does not.

    For places that are the project's own, such as a workspace's products: an existing `path` is replaced, whatever it
    holds. A place that a person names is `output_folder`'s. Readers see the old folder, none, or the whole new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _beside(path)
    scratch.mkdir()
    try:
        yield scratch
        if path.exists():
            old = _beside(path)
            os.replace(path, old)
            os.replace(scratch, path)
            shutil.rmtree(old)
        else:
            os.replace(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name[:100]}.{uuid.uuid4().hex[:8]}"


def write_atomic(path: Path, data: str | bytes) -> Path:
    """Write a whole file under another name, then rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _beside(path)
    try:
        scratch.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


# ------------------------------------------------------------------------------------------ outputs that a person names

# The names in a folder that its command did not write; None if the folder is none of that command's outputs.
Strangers = Callable[[Path], Sequence[str] | None]


def link_file(source: Path, target: Path) -> Path:
    """Give a file a second name, or where the file system knows none a copy; nobody writes into it from then on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def link_folder(source: Path, target: Path, but: Sequence[str] = ()) -> None:
    """The files of a folder in another one, by `link_file`; those named in `but` are left out."""
    for file in sorted(Path(source).rglob("*")):
        if file.is_file() and file.name not in but:
            link_file(file, target / file.relative_to(source))


def check_output(path: Path, strangers: Strangers | None = None) -> Path:
    """Where a folder may appear: a new place, an empty folder, or an older output of the same command.

    Args:
        path: as it was given.
        strangers: says what else an older output holds; None: there is no older output to replace.

    Returns:
        The path, absolute, without links.

    Raises:
        UserError: for any other place, or one that cannot be written to.
    """
    place = _place(path)
    mend = "name a new or an empty folder"
    if place.exists() and not place.is_dir():
        raise UserError(f"{path}: a file, and a folder is to be written; {mend}")
    if place == Path.cwd() or place in Path.cwd().parents:
        raise UserError(f"{path}: the folder you are in, or one around it; {mend}")
    if os.path.ismount(place):  # nothing takes its place by a rename
        raise UserError(f"{path}: a mounted volume; name a folder in it")
    held = sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []
    if held:
        others = None if strangers is None else strangers(place)
        if others is None:
            raise UserError(f"{path}: holds {_some(held)}, and no older output of this command; {mend}")
        if others:
            raise UserError(f"{path}: holds {_some(sorted(others))}, which this command did not write; {mend}")
    return place


def check_output_file(path: Path, endings: Sequence[str], own: Callable[[Path], bool]) -> Path:
    """Where a file may appear: a new place, or an older output of the same command.

    Args:
        path: as it was given.
        endings: names of the formats that can be written, such as `.png`.
        own: whether an existing file is such an output.

    Returns:
        The path, absolute, without links.

    Raises:
        UserError: for any other place, another ending, or a place that cannot be written to.
    """
    place = _place(path)
    if place.suffix.lower() not in endings:
        raise UserError(f"{path}: ends in none of {', '.join(endings)}; the name says the format that is written")
    if place.is_dir():
        raise UserError(f"{path}: a folder, and a file is to be written; name a file in it")
    if place.exists() and not own(place):
        raise UserError(f"{path}: is there already, and no older output of this command; name another file")
    return place


def _place(path: Path) -> Path:
    try:
        place = at_home(path).resolve()
        place.exists()  # what is wrong with the name shows here
        nearest = next(parent for parent in place.parents if parent.exists())
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: no place for an output ({getattr(error, 'strerror', None) or error})") from error
    if not nearest.is_dir():
        raise UserError(f"{path}: {nearest} is a file; name a place in a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: no permission to write in {nearest}")
    return place


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


class HeldElsewhere(UserError):
    """Another process is writing the same output."""


@contextmanager
def output_folder(path: Path, strangers: Strangers | None = None) -> Iterator[Path]:
    """A scratch folder that becomes the output `path`, whole, if the block ends well; see `check_output`.

    Raises:
        UserError: if the place is none for this output, or another process is writing there.
    """
    place = check_output(path, strangers)
    with lock_output(place):
        check_output(path, strangers)  # what another process made meanwhile
        with atomic_folder(place) as scratch:
            yield scratch


@contextmanager
def lock_output(path: Path) -> Iterator[None]:
    """Hold a place against other processes, by a file beside it that is gone afterwards.

    Raises:
        HeldElsewhere: naming the process that holds it.
        UserError: if nothing can be written there.
    """
    path = Path(path).resolve()
    made = [parent for parent in path.parents if not parent.exists()]
    file = path.parent / f".{path.name[:100]}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, blocking=False)
        lock.acquire()
    except Timeout as error:
        if not file.is_file():  # where no file can be made, the lock goes on trying
            raise UserError(f"{path}: no place for an output (no file can be made in {path.parent})") from error
        holder = file.read_text().strip() or "another process"
        raise HeldElsewhere(f"{path}: {holder} is writing there; wait for it to end") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone, and makes a new one
        lock.release()
        for parent in made:  # of an output that was not made
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def hold(path: Path, lock: Path, wait: bool) -> Iterator[None]:
    """Hold a product's place against other processes that would make the same one.

    A killed process holds nothing. On a file system that knows no locks nothing is held.

    Args:
        path: of the product.
        lock: a file that stands for it. It stays, unless what was held for fails: then it and the folders that were
            made for it are gone again.
        wait: whether to wait for the other process.

    Raises:
        HeldElsewhere: if another process holds it, and there is no waiting.
    """
    made = [folder for folder in lock.parents if not folder.exists()]
    file = _take(path, lock, wait)
    with file:
        try:
            yield
        except BaseException:
            if _try_lock(file.fileno()):
                lock.unlink(missing_ok=True)
                with suppress(OSError):  # others have put something there
                    for folder in made:
                        folder.rmdir()
            raise


def _take(path: Path, lock: Path, wait: bool) -> IO[str]:
    """The lock's file, opened and ours, or on a file system without locks just opened."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a")  # noqa: SIM115 - the caller holds by it
        except FileNotFoundError:  # whoever failed just removed the folder
            continue
        waited = 0
        while (locked := _try_lock(file.fileno())) is False:
            if not wait:
                file.close()
                raise HeldElsewhere(f"{path}: another process is making it; run it again when that one has ended")
            if waited % 60 == 0:
                log.info("%s: another process is making it; waiting for it", path)
            waited += 1
            time.sleep(1)
        if locked is None or _names(lock, file):
            return file
        file.close()  # whoever held it failed and removed it; the next ones lock another file


def _names(path: Path, file: IO[str]) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool | None:
    """True if the file is ours now, False if another holds it, None if its file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def write_json(path: Path, value: Any) -> Path:
    """Write JSON, sorted and indented, atomically."""
    return write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def forget_origin(folder: Path) -> None:
    """Drop `_name_or_path` from the config files below `folder`: equal weights, equal files, from anywhere."""
    for path in sorted(Path(folder).rglob("*.json")):
        text = read_text(path)
        if "_name_or_path" not in text:
            continue
        data = parse_json(text, str(path))
        if isinstance(data, dict) and data.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(data, indent=2) + "\n")
