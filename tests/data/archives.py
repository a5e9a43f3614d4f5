"""Tar files for tests, as other tools write them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    """Write files by name, in order, a name as often as it is there."""
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
