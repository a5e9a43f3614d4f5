"""The step that makes the task-tagged dataset, or finds it under DVC or in the workspace."""

from __future__ import annotations

import logging
from pathlib import Path

from danceopd.config.recipe import Recipe
from danceopd.devices import usable_cores
from danceopd.files import at_home, content_key, hold, write_json
from danceopd.tracking import recording
from danceopd.workspace import Product, joined_processes, main_first, make_product, portable

log = logging.getLogger(__name__)


def build_data(
    recipe: Recipe, workspace: Path, folder: Path | None = None, repo: Path | None = None, workers: int | None = None
) -> Product:
    """Make the task-tagged dataset, or find it: under DVC in the repository, in the workspace, or at `folder`.

    Args:
        recipe: its data section says what.
        workspace: where the product's card lies, and the dataset itself if it is not tracked.
        folder: write the dataset here instead.
        repo: the repository whose `data.dvc` may track the dataset; default: the one around the working directory.
        workers: threads that decode and hash pictures; None: one a core.

    Raises:
        UserError: for invalid records, or data that is not what `data.dvc` names.
    """
    from danceopd.data import versioning
    from danceopd.data.assemble import assemble, open_dataset, recipe_records
    from danceopd.data.records import MANIFEST

    repo = versioning.find_repo(Path.cwd()) if repo is None else repo
    generated, read = _tracked_use(recipe, repo)
    tracked = generated and folder is None
    own = Path(workspace) / "datasets" / f"{recipe.name}-{data_revision(recipe, repo)}"
    home = Path(folder or (repo / "data" if repo is not None and tracked else own)).resolve()
    used = repo if tracked or read else None
    with main_first():
        if used is not None and not (used / "data").is_dir():
            versioning.pull(used)
        processes = joined_processes()
        rebuild = folder is not None and (processes is None or processes.main)
        if rebuild or not (home / MANIFEST).is_file():
            lock = Path(workspace) / ".locks" / f"datasets-{content_key(str(home))}"
            with hold(home, lock, wait=processes is None):
                if rebuild or not (home / MANIFEST).is_file():  # another command may have made it meanwhile
                    log.info("assembling the dataset at %s", home)
                    needs_source = {task: spec.needs_source for task, spec in recipe.tasks.items()}
                    assemble(recipe_records(recipe.data), home, needs_source, workers or usable_cores())
        dataset = open_dataset(home)
        dataset.columns()  # made here, once, where an earlier version left none
    version = versioning.verify(used, used / "data") if used is not None else None
    facts = {
        "dataset": portable(home, workspace),
        "content": dataset.content,
        "counts": dataset.manifest["counts"],
        "dvc": version.dvc if version else None,
        "git": versioning.git_revision(repo) if repo else None,
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

    needs_source = {task: spec.needs_source for task, spec in recipe.tasks.items()}
    assemble(recipe_records(recipe.data), repo / "data", needs_source)
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
