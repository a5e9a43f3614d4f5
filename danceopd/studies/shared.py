"""What the cells of a study share: base, data and teachers, kept as they were when the study began."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from danceopd.config.recipe import CheckpointTeacher, Recipe, Teacher
from danceopd.files import content_key, read_json, write_json
from danceopd.steps.data import data_revision
from danceopd.steps.run import Run
from danceopd.studies.identity import full, given, holds
from danceopd.workspace import Product


@dataclass(frozen=True)
class Shared:
    """What all cells of a study share, or all of one seed where every seed has teachers of its own.

    Attributes:
        workspace: where products and caches lie.
        folder: the study's own.
        base: product of `danceopd.steps`.
        data: product.
        teachers: products by name, those that teach a task.
        at_steps: numbers of sampling steps at which fields are scored besides the recipe's.
    """

    workspace: Path
    folder: Path
    base: Product
    data: Product
    teachers: dict[str, Product]
    at_steps: tuple[int, ...] = ()

    def run(self, recipe: Recipe) -> Run:
        """A cell's run over what all share."""
        return Run(recipe, self.workspace, self.base, self.data)

    def digests(self) -> list:
        """What tells these from others."""
        taught = {name: product.digest for name, product in sorted(self.teachers.items())}
        return [self.base.digest, self.data.facts["content"], taught]


def given_weights(teachers: Mapping[str, Teacher], workspace: Path) -> dict[str, str]:
    """Hashes of the weights that checkpoint teachers name, by teacher.

    Raises:
        UserError: if there are no such weights.
    """
    from danceopd.backbones.bases import fetch_weights
    from danceopd.backbones.hashes import hash_weights

    return {
        name: hash_weights(fetch_weights(spec.path, workspace, f"teachers.{name}.path"), workspace)
        for name, spec in teachers.items()
        if isinstance(spec, CheckpointTeacher)
    }


@dataclass(frozen=True)
class _Wanted:
    """What a study's cells share, before it is there.

    Attributes:
        names: of the teachers.
        note: the file that says which products an earlier call began with, under the settings that were given.
        settings: all that decides them, defaults too.
    """

    names: list[str]
    note: Path
    settings: dict


def _wanted(recipe: Recipe, starts: set[str], workspace: Path, folder: Path) -> _Wanted:
    names = sorted({spec.teacher for spec in recipe.tasks.values()} | (starts - {"base"}))
    specs = {name: recipe.teachers[name] for name in names}
    paths = given_weights(specs, workspace)
    served = {task: [spec.teacher, list(spec.metrics)] for task, spec in recipe.tasks.items()}
    fixed = {"data": data_revision(recipe), "steps": recipe.evaluate.steps, "served": served, "paths": paths}

    def decided(read: Callable) -> dict:
        return fixed | {"model": read(recipe.model), "teachers": {name: read(spec) for name, spec in specs.items()}}

    return _Wanted(names, folder / f"products-{content_key(decided(given))}.json", decided(full))


def find_shared(
    recipe: Recipe, starts: set[str], workspace: Path, folder: Path, at_steps: tuple[int, ...] = ()
) -> Shared | None:
    """What an earlier call of a study began with, if all of it is there still; see `open_shared`."""
    from danceopd import steps

    wanted = _wanted(recipe, starts, workspace, folder)
    kept = read_json(wanted.note) if wanted.note.is_file() else None
    if kept is None or not holds(kept["settings"], wanted.settings):
        return None
    folders = [Path(kept["base"]), Path(kept["data"]), *map(Path, kept["teachers"].values())]
    if not all((place / steps.STEP).is_file() for place in folders):
        return None
    base, data, *taught = map(steps.open_product, folders)
    return Shared(workspace, folder, base, data, dict(zip(kept["teachers"], taught, strict=True)), at_steps)


def open_shared(
    recipe: Recipe, starts: set[str], workspace: Path, folder: Path, at_steps: tuple[int, ...] = ()
) -> Shared:
    """Base, data and teachers: the study's own of an earlier call, else the pipeline's, made if need be.

    The pipeline makes a product anew when the code changes. A study keeps those it began with: all its cells
    have the same teachers.

    Args:
        recipe: of any cell.
        starts: where the cells' students start from.
        workspace: where the pipeline's products lie.
        folder: the study's.
        at_steps: see `Shared`.
    """
    from danceopd import steps

    if found := find_shared(recipe, starts, workspace, folder, at_steps):
        return found
    wanted = _wanted(recipe, starts, workspace, folder)
    run = steps.open_run(recipe, workspace)
    teachers = {name: steps.finetune_teacher(run, name) for name in wanted.names}
    places = {name: str(product.folder) for name, product in teachers.items()}
    made = {"base": str(run.base.folder), "data": str(run.data.folder), "teachers": places}
    write_json(wanted.note, made | {"settings": wanted.settings})
    return Shared(workspace, folder, run.base, run.data, teachers, at_steps)
