"""Files that are either whole or absent, and names made from contents."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from danceopd.text import parse_json, read_text
from danceopd.text import read_json as read_json

FIELD = "field.json"  # in a field's folder (see `checkpoint.py`): its kind and name


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path, pattern: str = "**/*") -> str:
    """SHA-256 over the relative names and contents of the files below `folder` that match `pattern`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).glob(pattern) if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def content_key(*parts: Any) -> str:
    """A 16-digit name for JSON-like values: equal values, equal name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A scratch folder beside `path` that takes its name if the block ends well, and is removed if it does not.

    An existing `path` is replaced. Readers see the old folder, none, or the whole new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
        if path.exists():
            old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
            os.replace(path, old)
            os.replace(scratch, path)
            shutil.rmtree(old)
        else:
            os.replace(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_atomic(path: Path, data: str | bytes) -> Path:
    """Write a whole file under another name, then rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        scratch.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


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
