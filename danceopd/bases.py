"""Finding a base by what a recipe calls it: the shipped small world, a folder, a hub id, an object-store URI."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from danceopd.errors import UserError
from danceopd.files import atomic_folder, content_key, hash_folder

log = logging.getLogger(__name__)
SHIPPED = {"world": "world_base"}
INDEX = "model_index.json"


@dataclass(frozen=True)
class BaseSource:
    """A base on this machine.

    Attributes:
        name: short, for folder names.
        folder: the pipeline folder.
        digest: SHA-256 of its files.
        shipped: whether it came with the package.
    """

    name: str
    folder: Path
    digest: str
    shipped: bool


def shipped_folder(name: str) -> Path:
    """Where a shipped base lies."""
    return Path(str(resources.files("danceopd"))) / "assets" / SHIPPED[name]


def fetch_base(base: str, revision: str | None, workspace: Path) -> BaseSource:
    """Bring a base to this machine.

    Args:
        base: `world`, a folder, a hub id (`owner/name`), or a URI that fsspec opens (`s3://`, `gs://`, `file://` ...).
        revision: hub revision, or None.
        workspace: where downloads go.

    Raises:
        UserError: if it is none of these, cannot be reached, holds no pipeline, or the shipped one is damaged.
    """
    if base in SHIPPED:
        return _shipped(base)
    if "://" in base:
        folder = _download(base, workspace)
    elif Path(base).is_dir():
        folder = Path(base).resolve()
    elif base.count("/") == 1 and not base.startswith((".", "/")):
        folder = _snapshot(base, revision)
    else:
        raise UserError(f"model.base {base!r}: not a folder, hub id or URI; shipped bases: {', '.join(SHIPPED)}")
    if not (folder / INDEX).is_file():
        raise UserError(f"model.base {base!r}: no {INDEX} in {folder}; give a diffusers pipeline folder")
    return BaseSource(Path(base).name, folder, hash_folder(folder), shipped=False)


def _shipped(name: str) -> BaseSource:
    folder = shipped_folder(name)
    pinned = (folder.parent / f"{SHIPPED[name]}.sha256").read_text().strip()
    digest = hash_folder(folder)
    if digest != pinned:
        raise UserError(f"shipped base {name!r}: files differ from their pinned hash; reinstall the package")
    return BaseSource(name, folder, digest, shipped=True)


def _download(uri: str, workspace: Path) -> Path:
    import fsspec

    folder = Path(workspace) / "downloads" / content_key(uri)
    if folder.is_dir():
        return folder
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        with atomic_folder(folder) as scratch:
            filesystem.get(path.rstrip("/") + "/", str(scratch), recursive=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"model.base {uri!r}: cannot be read ({error}); check the URI, credentials and network"
        ) from error
    return folder


def _snapshot(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.base {repo!r}: not in the local cache and not to be downloaded ({reason})") from error
