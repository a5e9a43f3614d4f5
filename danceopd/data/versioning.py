"""The data's version: what `data.dvc` and git say of a dataset folder, and whether the folder is what they say.

`data.dvc` holds DVC's own entry for `data/` and, under `meta`, the content hash of the records and the pyarrow that
wrote them: a clone without a remote has nothing else to tell other records from the same records in other bytes.
Where there is no repository (a pod, an unpacked archive) every answer is None.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version  # of pyarrow, without importing it
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.errors import UserError
from danceopd.text import parse_yaml_documents, read_text

if TYPE_CHECKING:  # DVC takes two seconds to import, and most runs ask it nothing
    from dvc.repo import Repo

DVC_FILE = "data.dvc"
_GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")


@dataclass(frozen=True)
class DvcEntry:
    """What `data.dvc` tracks.

    Attributes:
        path: the tracked folder, absolute.
        md5: DVC's hash of it.
        meta: what the project keeps beside the entry: `content`, `pyarrow`, and what `track` was given.
    """

    path: Path
    md5: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class DataVersion:
    """What names the data of a run; None where there is no git, or nothing is tracked.

    Attributes:
        git: revision of the repository, ending in `-dirty` if tracked files are changed.
        dvc: DVC's hash of the folder, confirmed.
    """

    git: str | None
    dvc: str | None


def find_repo(start: Path) -> Path | None:
    """The repository around a folder: the nearest one upwards that has a `.git` or a `.dvc`, or None."""
    start = Path(start).resolve()
    return next((p for p in (start, *start.parents) if (p / ".git").exists() or (p / ".dvc").is_dir()), None)


def git_revision(repo: Path) -> str | None:
    """The commit that is checked out, with `-dirty` behind it if tracked files are changed; None without one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # Inside a git hook these name the hook's repository, whatever the working directory.
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_PLACES}
    try:
        done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def tracked(repo: Path, folder: Path) -> DvcEntry | None:
    """What `<repo>/data.dvc` says of a folder, or None if it does not track it.

    Raises:
        UserError: if `data.dvc` is not a DVC file.
    """
    repo, file = Path(repo), Path(repo) / DVC_FILE
    if not (repo / ".dvc").is_dir() or not file.is_file():
        return None
    try:
        [data] = parse_yaml_documents(read_text(file), str(file))
        out = data["outs"][0]
        entry = DvcEntry((repo / data.get("wdir", ".") / out["path"]).resolve(), out["md5"], data.get("meta") or {})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a DVC file with one output; 'git restore data.dvc' mends it") from error
    return entry if entry.path == Path(folder).resolve() else None


def verify(repo: Path, folder: Path) -> DataVersion:
    """Have DVC confirm that a folder is what `data.dvc` names; puts it into DVC's cache if it is not there yet.

    Regenerated data is in no cache of a fresh clone; afterwards `dvc status` is clean.

    Raises:
        UserError: if it is not, saying whether the records or only the bytes of their shards differ.
    """
    entry = tracked(repo, folder)
    if entry is not None:
        with _dvc(repo, "cannot check the data") as dvc:
            out = dvc.stage.load_one(_target(repo)).outs[0]
            if out.workspace_status():
                raise _mismatch(entry)
            if dvc.status([_target(repo)]):
                out.commit(relink=False)
    return DataVersion(git_revision(repo), entry.md5 if entry else None)


def pull(repo: Path) -> bool:
    """Bring the tracked data from DVC's default remote; False if nothing is tracked or no remote is configured.

    Raises:
        UserError: if the remote does not give it.
    """
    if not (Path(repo) / ".dvc").is_dir() or not (Path(repo) / DVC_FILE).is_file():
        return False
    with _dvc(repo, "cannot read DVC's configuration") as dvc:
        remote = dvc.config["core"].get("remote")
    if remote is None:
        return False
    trouble = (
        f"'dvc pull' from remote {remote!r} failed; check its address, credentials and network, "
        "or build the data here after 'dvc remote default --unset'"
    )
    with _dvc(repo, trouble) as dvc:
        dvc.pull(targets=[_target(repo)])
    return True


def track(repo: Path, folder: Path, **meta: str) -> DvcEntry:
    """Record a dataset folder as the version that `data.dvc` names, as `dvc add` does, with `meta` beside it.

    Args:
        repo: root of a DVC repository.
        folder: a dataset folder named `data` in it.
        meta: anything to keep beside the entry; content hash and pyarrow's version are added.

    Raises:
        UserError: if the folder is no dataset, lies elsewhere, or DVC refuses it.
    """
    from danceopd.data.assemble import open_dataset  # reading an entry needs no shards, and a client has no pyarrow

    repo, folder = Path(repo).resolve(), Path(folder).resolve()
    if folder != repo / Path(DVC_FILE).stem:
        raise UserError(f"{folder}: {DVC_FILE} tracks {repo / Path(DVC_FILE).stem}; build the dataset there first")
    content = open_dataset(folder).content
    with _dvc(repo, "cannot track the data") as dvc:
        (stage,) = dvc.add([str(folder)])
        stage.meta = {"content": content, "pyarrow": version("pyarrow"), **meta}
        stage.dump()
    entry = tracked(repo, folder)
    assert entry is not None
    return entry


@contextmanager
def _dvc(repo: Path, trouble: str) -> Iterator[Repo]:
    """DVC's repository object; what DVC raises becomes one line that begins with `trouble`."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        # DVC insists on git, which an unpacked archive does not have.
        config = {} if _in_git(Path(repo)) else {"core": {"no_scm": True}}
        with Repo(str(repo), config=config) as opened:
            yield opened
    except DvcException as error:
        raise UserError(f"{Path(repo) / DVC_FILE}: {trouble} ({error})") from error


def _target(repo: Path) -> str:
    return str(Path(repo).resolve() / DVC_FILE)  # DVC takes a relative one from the working directory


def _in_git(repo: Path) -> bool:
    return any((p / ".git").exists() for p in (repo.resolve(), *repo.resolve().parents))


def _mismatch(entry: DvcEntry) -> UserError:
    from danceopd.data.assemble import verify_dataset
    from danceopd.data.columns import INDEX
    from danceopd.data.records import MANIFEST

    where = f"{entry.path}: not the data that {DVC_FILE} names"
    mend = "remove the folder and run again to get that, or record this as the new version with 'danceopd data track'"
    if not (entry.path / MANIFEST).is_file() or "content" not in entry.meta:
        return UserError(f"{where} (md5 {entry.md5}); {mend}")
    manifest = verify_dataset(entry.path)
    wanted, found = entry.meta["content"], manifest["content"]
    if found != wanted:
        return UserError(f"{where}: other records (content {found[:16]} instead of {wanted[:16]}); {mend}")
    present = {p.relative_to(entry.path).as_posix() for p in entry.path.rglob("*") if p.is_file()}
    if strange := sorted(present - {MANIFEST, INDEX, *manifest["files"]}):
        return UserError(f"{where}: the same records and, beside them, {', '.join(strange)}; move that elsewhere")
    reader, writer = version("pyarrow"), entry.meta.get("pyarrow", "another version")
    return UserError(
        f"{where}: the same records, in shards of other bytes (pyarrow {reader} here, {writer} there); "
        f"install the versions of constraints.txt, then {mend}"
    )
