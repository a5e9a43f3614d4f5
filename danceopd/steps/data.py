"""The step that makes the task-tagged dataset, or finds it under DVC or in the workspace."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.config.recipe import Recipe
from danceopd.devices import usable_cores
from danceopd.files import HeldElsewhere, at_home, check_output, content_key, hold, read_json, write_json
from danceopd.tracking import recording
from danceopd.workspace import Product, joined_processes, main_first, make_product, portable

if TYPE_CHECKING:  # what reads and writes datasets is imported when it is needed
    from danceopd.data.assemble import DatasetFolder

log = logging.getLogger(__name__)


def build_data(
    recipe: Recipe, workspace: Path, folder: Path | None = None, repo: Path | None = None, workers: int | None = None
) -> Product:
    """Make the task-tagged dataset, or find it: under DVC in the repository, in the workspace, or at `folder`.

    A build that was killed goes on when it is started again (`danceopd.data.looked`).

    Args:
        recipe: its data section says what.
        workspace: where the product's card lies, and the dataset itself if it is not tracked.
        folder: write the dataset here instead.
        repo: the repository whose `data.dvc` may track the dataset; default: the one around the working directory.
        workers: threads that decode and hash pictures; None: one a core.

    Raises:
        UserError: for invalid records, or data that is not what `data.dvc` names.
    """
    from danceopd.data.assemble import open_dataset
    from danceopd.data.records import MANIFEST

    place = _find_place(recipe, workspace, folder, repo)
    with main_first():
        _pull(place)
        processes = joined_processes()
        rebuild = folder is not None and (processes is None or processes.main)
        if rebuild or not (place.home / MANIFEST).is_file():
            with hold(place.home, place.lock, wait=processes is None):
                if rebuild or not (place.home / MANIFEST).is_file():  # another command may have made it meanwhile
                    _assemble(recipe, place.home, workers)
        dataset = open_dataset(place.home)
        dataset.columns()  # made here, once, where an earlier version left none
    return _make_card(recipe, workspace, place, dataset)


def build_share(
    recipe: Recipe,
    workspace: Path,
    share: tuple[int, int],
    folder: Path | None = None,
    repo: Path | None = None,
    workers: int | None = None,
) -> Product | None:
    """One worker's part of a dataset that several make: its share of the input files is looked at.

    The worker that finds all of them looked at writes the dataset, as `build_data` does. One that is there already
    from these settings and inputs is left as it is.

    Args:
        recipe: as `build_data` takes it; the same for all.
        workspace: for all the same place.
        share: this worker's number, from 0, and how many there are.
        folder: write the dataset here instead; for all the same place.
        repo: as `build_data` takes it.
        workers: threads of this one.

    Returns:
        The product; None if other workers have files to look at still, or one is writing the dataset.

    Raises:
        UserError: as `build_data` does.
    """
    from danceopd.data.assemble import open_dataset, strangers
    from danceopd.data.looked import look_at_share, looked_folder

    place = _find_place(recipe, workspace, folder, repo)
    _pull(place)
    if _is_built(place):
        log.info("%s: built before with these settings", place.home)
    else:
        check_output(place.home, strangers)
        kept, count = looked_folder(place.home), workers or usable_cores()
        if left := look_at_share(recipe.data, kept, _needs_source(recipe), share, count):
            log.info("%d file(s) are other workers'; the last of them writes %s", len(left), place.home)
            return None
        try:
            with hold(place.home, place.lock, wait=False):
                if not _is_built(place):  # another worker may have made it meanwhile
                    _assemble(recipe, place.home, workers)
                    _note_built(place)
        except HeldElsewhere:
            log.info("%s: another worker writes it", place.home)
            return None
    return _make_card(recipe, workspace, place, open_dataset(place.home))


@dataclass(frozen=True)
class _Place:
    """Where a dataset lies and what around it matters.

    Attributes:
        home: the dataset's folder.
        repo: the repository around, if there is one.
        used: the same, if its tracked `data/` is the dataset or holds inputs.
        lock: held while the dataset is made.
        note: file that says which dataset workers wrote at a `home` that a person named; None: `home` is named by its
            settings and inputs.
    """

    home: Path
    repo: Path | None
    used: Path | None
    lock: Path
    note: Path | None


def _find_place(recipe: Recipe, workspace: Path, folder: Path | None, repo: Path | None) -> _Place:
    from danceopd.data import versioning

    repo = versioning.find_repo(Path.cwd()) if repo is None else repo
    generated, read = _tracked_use(recipe, repo)
    tracked, revision = generated and folder is None, data_revision(recipe, repo)
    own = Path(workspace) / "datasets" / f"{recipe.name}-{revision}"
    home = Path(folder or (repo / "data" if repo is not None and tracked else own)).resolve()
    return _Place(
        home,
        repo,
        repo if tracked or read else None,
        Path(workspace) / ".locks" / f"datasets-{content_key(str(home))}",
        None if folder is None else Path(workspace) / "cache" / "built" / f"{content_key(str(home), revision)}.json",
    )


def _pull(place: _Place) -> None:
    from danceopd.data import versioning

    if place.used is not None and not (place.used / "data").is_dir():
        versioning.pull(place.used)


def _needs_source(recipe: Recipe) -> dict[str, bool]:
    return {task: spec.needs_source for task, spec in recipe.tasks.items()}


def _assemble(recipe: Recipe, home: Path, workers: int | None) -> None:
    from danceopd.data.assemble import assemble, assemble_seen, recipe_records
    from danceopd.data.looked import forget_looked, looked_folder, seen_records

    log.info("assembling the dataset at %s", home)
    needs_source, count = _needs_source(recipe), workers or usable_cores()
    if recipe.data.world is not None:
        assemble(recipe_records(recipe.data), home, needs_source, count)
        return
    kept = looked_folder(home)
    assemble_seen(seen_records(recipe.data, kept, count), home, needs_source)
    forget_looked(kept)


def _is_built(place: _Place) -> bool:
    """Whether the dataset is there from these settings and inputs."""
    from danceopd.data.records import MANIFEST

    if not (place.home / MANIFEST).is_file():
        return False
    if place.note is None:
        return True
    return place.note.is_file() and read_json(place.note)["content"] == read_json(place.home / MANIFEST)["content"]


def _note_built(place: _Place) -> None:
    from danceopd.data.records import MANIFEST

    if place.note is not None:
        write_json(place.note, {"content": read_json(place.home / MANIFEST)["content"], "dataset": str(place.home)})


def _make_card(recipe: Recipe, workspace: Path, place: _Place, dataset: DatasetFolder) -> Product:
    from danceopd.data import versioning

    version = versioning.verify(place.used, place.used / "data") if place.used is not None else None
    facts = {
        "dataset": portable(place.home, workspace),
        "content": dataset.content,
        "counts": dataset.manifest["counts"],
        "dvc": version.dvc if version else None,
        "git": versioning.git_revision(place.repo) if place.repo else None,
    }

    def build(scratch: Path, checkpoints: Path) -> dict:
        settings = {"data": recipe.data.model_dump(mode="json")}
        recording.begin(recipe, workspace, checkpoints.name, f"data {recipe.name}", settings, facts, "data")
        write_json(scratch / "dataset.json", facts)
        return facts

    return make_product(workspace, "data", recipe.name, facts, build)


def _data_key(recipe: Recipe) -> str:
    return content_key(recipe.data.model_dump(mode="json"))


def _tracked_use(recipe: Recipe, repo: Path | None) -> tuple[bool, bool]:
    """What the repository's tracked `data/` is to a recipe: its generated dataset (`data.dvc` says so in its `meta`),
    and the place its inputs lie in."""
    from danceopd.data import versioning

    entry = None if repo is None else versioning.tracked(repo, repo / "data")
    if entry is None:
        return False, False
    inside = [at_home(location).resolve().is_relative_to(entry.path) for location in recipe.data.inputs]
    return entry.meta.get("recipe_data") == _data_key(recipe), any(inside)


def track_data(recipe: Recipe, repo: Path) -> str:
    """Build the recipe's dataset anew as the repository's `data/` and record it in `data.dvc`; returns DVC's hash."""
    from danceopd.data import versioning
    from danceopd.data.assemble import assemble, recipe_records

    assemble(recipe_records(recipe.data), repo / "data", _needs_source(recipe))
    return versioning.track(repo, repo / "data", recipe_data=_data_key(recipe)).md5


def data_revision(recipe: Recipe, repo: Path | None = None) -> str:
    """A name for the data a run would read, found without reading it: a cache key that never serves stale data."""
    from danceopd.data import versioning

    repo = versioning.find_repo(Path.cwd()) if repo is None else repo
    entry = versioning.tracked(repo, repo / "data") if repo is not None else None
    inputs = [_input_state(at_home(location)) for location in recipe.data.inputs]
    return content_key(recipe.data.model_dump(mode="json"), entry.md5 if entry else None, inputs)


def _input_state(path: Path) -> list:
    files = [path] if path.is_file() else sorted(p for p in path.glob("**/*") if p.is_file())
    return [(p.as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
