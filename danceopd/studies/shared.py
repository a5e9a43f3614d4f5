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

    wanted = sorted({spec.teacher for spec in recipe.tasks.values()} | (starts - {"base"}))
    specs = {name: recipe.teachers[name] for name in wanted}
    paths = given_weights(specs, workspace)
    served = {task: [spec.teacher, list(spec.metrics)] for task, spec in recipe.tasks.items()}
    fixed = {"data": data_revision(recipe), "steps": recipe.evaluate.steps, "served": served, "paths": paths}

    def decided(read: Callable) -> dict:
        return fixed | {"model": read(recipe.model), "teachers": {name: read(spec) for name, spec in specs.items()}}

    note = folder / f"products-{content_key(decided(given))}.json"
    kept = read_json(note) if note.is_file() else None
    if kept is not None and holds(kept["settings"], decided(full)):
        folders = [Path(kept["base"]), Path(kept["data"]), *map(Path, kept["teachers"].values())]
        if all((place / steps.STEP).is_file() for place in folders):
            base, data, *taught = map(steps.open_product, folders)
            return Shared(workspace, folder, base, data, dict(zip(kept["teachers"], taught, strict=True)), at_steps)
    run = steps.open_run(recipe, workspace)
    teachers = {name: steps.finetune_teacher(run, name) for name in wanted}
    places = {name: str(product.folder) for name, product in teachers.items()}
    write_json(
        note,
        {"base": str(run.base.folder), "data": str(run.data.folder), "teachers": places, "settings": decided(full)},
    )
    return Shared(workspace, folder, run.base, run.data, teachers, at_steps)
