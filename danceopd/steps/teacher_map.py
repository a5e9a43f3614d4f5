"""The step that looks at teachers and student before training: a table, a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from danceopd.errors import UserError
from danceopd.files import write_json
from danceopd.steps.run import Run
from danceopd.steps.student import open_training
from danceopd.workspace import Product, joined_processes, make_product


def map_teachers(run: Run, teachers: dict[str, Product], levels: int, records: int) -> Product:
    """Map where the recipe's teachers and its student, as it starts, disagree, and how its tasks pull.

    Raises:
        UserError: if the recipe trains nothing, several processes ask, or there are more levels than rollout steps.
    """
    from danceopd.methods.table import TRAINED

    recipe = run.recipe
    if recipe.distill.method not in TRAINED:
        raise UserError(f"distill.method {recipe.distill.method} trains nothing; a map is for methods that train")
    if joined_processes() is not None:
        raise UserError("a map is made by one process; run danceopd map without torchrun")
    if levels > recipe.distill.rollout_steps:
        raise UserError(f"--levels {levels}: the student's grid has {recipe.distill.rollout_steps} steps; take fewer")

    def build(scratch: Path, checkpoints: Path) -> dict:
        from danceopd.distill import STUDENT
        from danceopd.methods.table import setup_of
        from danceopd.preflight.teacher_map import map_teachers as look
        from danceopd.preflight.teacher_map import plot_map
        from danceopd.training.learner import new_learner

        ready, spec = open_training(run, teachers), recipe.distill
        setup = setup_of(spec, ready.backbone, ready.encoded, ready.fields, ready.teacher_of, ready.empty)
        learner = new_learner(ready.backbone, STUDENT, spec, ready.fields.get(spec.start))
        found = look(setup, learner, levels, records, spec.seed)
        facts = asdict(found)
        write_json(scratch / "map.json", facts)
        (scratch / "map.png").write_bytes(plot_map(found))
        return facts

    inputs = [run.base.digest, run.data.facts["content"], {n: t.digest for n, t in sorted(teachers.items())}]
    tasks = {task: spec.teacher for task, spec in recipe.tasks.items()}
    inputs += [tasks, recipe.model.decisive(), recipe.distill.decisive(), levels, records]
    return make_product(run.workspace, "maps", recipe.name, inputs, build)
