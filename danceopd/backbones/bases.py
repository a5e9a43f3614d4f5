"""Bringing weights to this machine by what a recipe calls them.

A base is the shipped small world, a pipeline folder, a hub id, or a URI that fsspec opens (`hf://`, `s3://`, `gs://`);
a teacher is a folder, a file, or such a URI. What was downloaded once stays in the workspace under its URI's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.backbones.hashes import hash_weights, noted_hashes
from danceopd.errors import UserError
from danceopd.files import at_home, atomic_folder, content_key, hash_folder, hold
from danceopd.text import read_object

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SHIPPED = {"world": "world_base", "world_open": "world_open_base"}
INDEX = "model_index.json"
TOKENIZERS = ("tokenizer", "processor")  # what the folders of them are called
OTHER_FORMATS = ["*.bin", "*.ckpt", "*.gguf", "*.msgpack", "*.onnx", "*.onnx_data", "*.pt", "*.pth"]


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
    return Path(str(resources.files("danceopd.backbones"))) / "shipped" / SHIPPED[name]


def fetch_base(base: str, revision: str | None, workspace: Path) -> BaseSource:
    """Bring a base to this machine, and hash it; of files that the workspace has seen as they are nothing is read.

    Args:
        base: `world` or `world_open`, a folder, a hub id (`owner/name`), or a URI that fsspec opens (`s3://`,
            `gs://`, `file://` ...).
        revision: hub revision, or None.
        workspace: where downloads go, and hashes are noted.

    Raises:
        UserError: if it is none of these, cannot be reached, holds no whole pipeline, or the shipped one is damaged.
    """
    folder = find_base(base, revision, workspace)
    if base in SHIPPED:
        return BaseSource(base, folder, _pinned(base), shipped=True)
    return BaseSource(Path(base).name, folder, hash_weights(folder, workspace), shipped=False)


def find_base(base: str, revision: str | None, workspace: Path) -> Path:
    """A base's pipeline folder, brought to this machine and whole, but not hashed.

    Raises:
        UserError: as `fetch_base` does.
    """
    if base in SHIPPED:
        return _check_shipped(base)
    if "://" in base:
        folder = _download(base, workspace, "model.base")
    elif at_home(base).is_dir():
        folder = at_home(base).resolve()
    elif at_home(base).is_file():
        raise UserError(
            f"model.base {base!r}: a single file holds a transformer alone; name the pipeline it belongs "
            "to as model.base, and the file as model.transformer"
        )
    elif base.count("/") == 1 and not base.startswith((".", "/", "~")):
        folder = _snapshot(base, revision)
    else:
        raise UserError(f"model.base {base!r}: not a folder, hub id or URI; shipped bases: {', '.join(SHIPPED)}")
    _check_whole(base, folder)
    return folder


def fetch_weights(location: str, workspace: Path, what: str) -> Path:
    """Bring weights to this machine: a folder, a file, or a URI of either that fsspec opens.

    Args:
        location: where they lie.
        workspace: where downloads go.
        what: what the recipe calls them, for messages.

    Raises:
        UserError: if there is nothing, or it cannot be reached.
    """
    if "://" in location:
        return _download(location, workspace, what)
    if not at_home(location).exists():
        raise UserError(f"{what} {location!r}: no such file or folder; the hub's are written hf://owner/name")
    return at_home(location)


def fetch_configs(base: str, revision: str | None, workspace: Path) -> Path:
    """A base's folder with its configuration files at least: of a hub's or a store's base nothing else is downloaded.

    Raises:
        UserError: if it cannot be found or reached.
    """
    if base in SHIPPED:
        return shipped_folder(base)
    if "://" in base:
        folder = _download(base, workspace, "model.base", only=".json")
    elif at_home(base).is_dir():
        folder = at_home(base)
    else:
        return _snapshot(base, revision, only="*.json")
    if not (folder / INDEX).is_file():
        raise UserError(f"model.base {base!r}: no {INDEX} in {folder}; give a diffusers pipeline folder")
    return folder


def components(index: Path) -> list[str]:
    """Names of a pipeline's parts, each a folder beside its `model_index.json`."""
    found = {name: kind for name, kind in read_object(index).items() if isinstance(kind, list) and kind}
    return [name for name, kind in found.items() if not name.startswith("_") and kind[0] is not None]


def _check_whole(base: str, folder: Path) -> None:
    if not (folder / INDEX).is_file():
        raise UserError(f"model.base {base!r}: no {INDEX} in {folder}; give a diffusers pipeline folder")
    lacking = [name for name in components(folder / INDEX) if not (folder / name).is_dir()]
    if lacking:
        raise UserError(f"model.base {base!r}: {folder} is not whole, it lacks {', '.join(lacking)}; download it again")


def _pinned(name: str) -> str:
    return (shipped_folder(name).parent / f"{SHIPPED[name]}.sha256").read_text().strip()


def _check_shipped(name: str) -> Path:
    """A shipped base's folder. It is small, and read each time: an installation may be damaged."""
    folder = shipped_folder(name)
    if hash_folder(folder) != _pinned(name):
        raise UserError(f"shipped base {name!r}: files differ from their pinned hash; reinstall the package")
    return folder


def _download(uri: str, workspace: Path, what: str, only: str = "") -> Path:
    """A URI's folder, or its file, below the workspace; of a folder the files that end in `only`."""
    import fsspec

    folder = Path(workspace) / "downloads" / (content_key(uri, only) if only else content_key(uri))
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        path = path.rstrip("/")
        file = folder / Path(path).name
        if not folder.is_dir():
            lock = Path(workspace) / ".locks" / f"downloads-{folder.name}"
            with hold(folder, lock, wait=True):  # pods of one job begin at once
                if not folder.is_dir():
                    _get(filesystem, path, folder, only)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{what} {uri!r}: cannot be read ({error}); check the URI, credentials and network") from error
    return file if file.is_file() and file.suffix == ".safetensors" and len(list(folder.iterdir())) == 1 else folder


def _get(filesystem: AbstractFileSystem, path: str, folder: Path, only: str) -> None:
    """Download a file, or of a folder the files that end in `only` and the tokenizers."""
    single = filesystem.isfile(path)
    with atomic_folder(folder) as scratch:
        if single:
            filesystem.get_file(path, str(scratch / Path(path).name))
        elif only:
            for name in filesystem.find(path):
                part = name[len(path) :].strip("/").partition("/")[0]
                if name.endswith(only) or part.startswith(TOKENIZERS):
                    place = scratch / name[len(path) :].lstrip("/")
                    place.parent.mkdir(parents=True, exist_ok=True)
                    filesystem.get_file(name, str(place))
        else:
            filesystem.get(path + "/", str(scratch), recursive=True)


def _snapshot(repo: str, revision: str | None, only: str = "*") -> Path:
    """A hub model's pipeline folder: of its parts the files like `only`, and nothing else of the repository."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what, which = f"model.base {repo!r}", f" --revision {revision}" if revision else ""
    try:
        index = Path(hf_hub_download(repo, INDEX, revision=revision))
        parts = components(index)
        # A tokenizer is small, and only a whole one can count tokens.
        wanted = [INDEX, *(f"{name}/*" if name.startswith(TOKENIZERS) else f"{name}/{only}" for name in parts)]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=OTHER_FORMATS))
    except RevisionNotFoundError as error:
        raise UserError(f"{what}: the hub has no revision {revision!r} of it") from error
    except RepositoryNotFoundError as error:  # gated ones are of this kind
        raise UserError(
            f"{what}: the hub shows no such model to this user; check the name, accept the model's terms "
            "there, and set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "in offline mode (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "without a network"
        raise UserError(
            f"{what}: not in the local cache and not to be downloaded {why}; fetch it where there is one: "
            f"hf download {repo}{which}, or give a folder"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"{what}: no {INDEX} there; give a diffusers pipeline") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{what}: not to be downloaded ({str(error).splitlines()[0]})") from error


def hash_encoders(folder: Path, workspace: Path) -> str:
    """SHA-256 of what encodes prompts and pictures: of a pipeline folder all but the transformer and the scheduler."""
    names = sorted(set(components(folder / INDEX)) - {"transformer", "scheduler"})
    kind = read_object(folder / INDEX).get("_class_name")
    with noted_hashes(folder, workspace) as hash_one:
        return content_key(kind, [(name, hash_folder(folder / name, hash_one=hash_one)) for name in names])
