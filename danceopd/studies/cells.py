"""One cell of a study: one variant trained with one seed and scored, kept as one JSON file.

A file is named by all that decides what it holds, and by no revision of the code: a study outlives an unrelated commit.
The revision is written into it instead.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danceopd.config.recipe import Recipe
from danceopd.files import content_key, read_json, write_json
from danceopd.steps.student import open_training
from danceopd.studies.identity import full, given, holds
from danceopd.studies.shared import Shared
from danceopd.workspace import code_revision

if TYPE_CHECKING:
    from torch import Tensor

    from danceopd.data.encoded import EncodedRecords
    from danceopd.flow.fields import Field

log = logging.getLogger(__name__)
OFF = 0.02  # share by which what a cell spent may differ from its plan before it is said


@dataclass(frozen=True)
class Cell:
    """One variant with one seed.

    Attributes:
        variant: its label.
        recipe: with the cell's seed and steps.
        forwards_per_sample: what it is expected to take.
    """

    variant: str
    recipe: Recipe
    forwards_per_sample: float

    @property
    def seed(self) -> int:
        return self.recipe.distill.seed

    @property
    def forwards(self) -> float:
        """Transformer forwards its training is expected to take."""
        return self.forwards_per_sample * self.recipe.distill.batch * self.recipe.distill.steps


def _judged(recipe: Recipe, shared: Shared, read: Callable) -> dict:
    """What decides a field's scores besides the field."""
    more = {"at_steps": list(shared.at_steps)} if shared.at_steps else {}
    metrics = {task: list(spec.metrics) for task, spec in recipe.tasks.items()}
    evaluation = {name: value for name, value in read(recipe.evaluate).items() if name != "pictures"}
    return {"model": read(recipe.model), "evaluate": evaluation, "metrics": metrics} | more


def _decided_by(cell: Cell, shared: Shared, read: Callable) -> dict:
    """All that decides a cell's result but for the code, each section read by `full` or `given`."""
    tasks = {t: [s.teacher, s.model_dump(mode="json")["weight"]] for t, s in cell.recipe.tasks.items()}
    judged = _judged(cell.recipe, shared, read)
    return {"shared": shared.digests(), "judged": judged, "tasks": tasks, "distill": read(cell.recipe.distill)}


def cell_key(cell: Cell, shared: Shared) -> str:
    """A name for all that decides a cell's result, but for the code."""
    return content_key("cell", _decided_by(cell, shared, given))


def find_result(cell: Cell, shared: Shared) -> dict | None:
    """A cell's result if it is there, under whatever label it was made."""
    now = _decided_by(cell, shared, full)
    for path in sorted((shared.folder / "cells").glob(f"*-{cell_key(cell, shared)}.json")):
        result = read_json(path)
        if holds(result["settings"], now):
            return result | {"variant": cell.variant}
        log.info("study: %s was made with other defaults; it is made anew", path.name)
    return None


def _scores(
    recipe: Recipe,
    sets: dict[str, tuple[list, EncodedRecords]],
    fields: Mapping[str, tuple[str, Field]],
    empty: Tensor,
    steps: int | None = None,
    own: dict | None = None,
) -> dict:
    """Each task's metrics, of the field (with its name) given for it, drawn as the recipe says.

    Or in `steps`; `own` then are the metrics as the recipe says, taken where that is as many.
    """
    from danceopd.evaluation.samplings import Samplings
    from danceopd.evaluation.scoring import score_records

    means, samplings = {}, Samplings(recipe, lambda: empty)
    for task, (records, encoded) in sets.items():
        drawn, spec = samplings.drawn(*fields[task])
        if own is not None and spec.steps == steps:
            means[task] = own[task]
            continue
        spec = spec.model_copy(update={"steps": steps or spec.steps})
        scored = score_records(drawn, encoded, records, recipe.tasks[task].metrics, spec).means
        means[task] = {name: value if math.isfinite(value) else None for name, value in scored.items()}
    return means


def _by_steps(
    at_steps: tuple[int, ...],
    recipe: Recipe,
    sets: dict[str, tuple[list, EncodedRecords]],
    fields: Mapping[str, tuple[str, Field]],
    empty: Tensor,
    own: dict,
) -> dict[str, dict]:
    """`_scores` at other numbers of sampling steps, by number, as text (these are the keys of a JSON file)."""
    return {str(steps): _scores(recipe, sets, fields, empty, steps, own) for steps in at_steps}


def reference_scores(recipe: Recipe, shared: Shared) -> dict:
    """What a study's students are held against: base, and each task's own teacher, on the same records."""
    taught = {task: spec.teacher for task, spec in recipe.tasks.items()}
    path = shared.folder / f"reference-{content_key(shared.digests(), _judged(recipe, shared, given), taught)}.json"
    settings = _judged(recipe, shared, full)
    if not path.is_file() or not holds(read_json(path)["settings"], settings):
        from danceopd.flow.fields import VelocityField

        ready = open_training(shared.run(recipe), shared.teachers)
        bare = VelocityField("base", ready.backbone, ready.backbone.transformer)
        sets = ready.encoder.held_out(recipe.evaluate.split, recipe.evaluate.per_task)
        sides: dict[str, Mapping[str, tuple[str, Field]]] = {
            "base": dict.fromkeys(taught, ("base", bare)),
            "teachers": {task: (name, ready.fields[name]) for task, name in taught.items()},
        }
        scores = {side: _scores(recipe, sets, fields, ready.empty) for side, fields in sides.items()}
        few = {
            side: _by_steps(shared.at_steps, recipe, sets, fields, ready.empty, scores[side])
            for side, fields in sides.items()
        }
        records = {task: len(found) for task, (found, _) in sets.items()}
        write_json(path, scores | {"by_steps": few, "records": records, "settings": settings})
    return read_json(path)


def run_cell(cell: Cell, shared: Shared) -> dict:
    """Train and score a cell and write its file, or read it back.

    Raises:
        Interrupted: after a save, if SIGTERM came and the recipe saves checkpoints.
    """
    there = find_result(cell, shared)
    if there is not None:
        return there
    from danceopd.distill import distill
    from danceopd.training.checkpoints import Checkpoints

    recipe, spec, key = cell.recipe, cell.recipe.distill, cell_key(cell, shared)
    saves = Checkpoints(shared.folder / "checkpoints" / key, spec.keep_checkpoints, key)
    resumed = saves.folder.is_dir()
    ready = open_training(shared.run(recipe), shared.teachers)
    sets = ready.encoder.held_out(recipe.evaluate.split, recipe.evaluate.per_task)
    ready.backbone.free_encoders()  # everything is encoded
    started = time.monotonic()
    student, history = distill(
        ready.backbone,
        ready.encoded,
        ready.fields,
        ready.teacher_of,
        ready.weights,
        spec,
        None,
        saves,
        empty=ready.empty,
    )
    trained = time.monotonic()
    fields = dict.fromkeys(recipe.tasks, ("student", student))
    scores = _scores(recipe, sets, fields, ready.empty)
    few = _by_steps(shared.at_steps, recipe, sets, fields, ready.empty, scores)
    steps, spent = history[-1]["step"], _spent(history, spec.batch)
    if abs(spent - cell.forwards) > OFF * cell.forwards:
        log.warning(
            "study: %s seed %d took %.0f forwards, %.0f were planned", cell.variant, cell.seed, spent, cell.forwards
        )
    result = {
        "variant": cell.variant,
        "seed": cell.seed,
        "key": key,
        "settings": _decided_by(cell, shared, full),
        "steps": steps,
        "forwards": spent,
        "forwards_planned": cell.forwards,
        "forwards_per_sample": spent / (spec.batch * steps) if steps else 0.0,
        "train_seconds": None if resumed else round(trained - started, 2),
        "evaluate_seconds": round(time.monotonic() - trained, 2),
        "loss": history[-1]["loss"],
        "scores": scores,
        "by_steps": few,
        "code": code_revision(),
    }
    write_json(shared.folder / "cells" / f"{cell.variant}-seed{cell.seed}-{key}.json", result)
    shutil.rmtree(saves.folder, ignore_errors=True)
    return result


def _spent(history: list[dict], batch: int) -> float:
    """Transformer forwards of a whole training."""
    ends = [entry["step"] for entry in history]
    updates = [end - before for before, end in zip([0, *ends], ends, strict=False)]
    return sum(n * batch * entry["forwards_per_sample"] for n, entry in zip(updates, history, strict=True))
