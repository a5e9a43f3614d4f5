"""The step that distills the student and exports it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.config.recipe import Weight
from danceopd.config.sampling import write_sampling
from danceopd.errors import UserError
from danceopd.export.student import export_student, probe_condition
from danceopd.files import write_json
from danceopd.preflight.at_start import check_start
from danceopd.preflight.findings import settle
from danceopd.steps.encodings import Encoder, open_backbone
from danceopd.steps.run import Run
from danceopd.steps.teachers import load_teachers, stated_samplings
from danceopd.tracking import recording
from danceopd.tracking.recording import recorder
from danceopd.workspace import STUDENTS, Product, make_product, product_key

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from torch import Tensor

    from danceopd.backbones.base import Backbone
    from danceopd.data.encoded import EncodedRecords
    from danceopd.flow.fields import Field


def distill_student(run: Run, teachers: dict[str, Product]) -> Product:
    """Distill the recipe's teachers into one student, exported as a complete pipeline folder.

    Raises:
        UserError: if a teacher's product or a task's training records are missing.
    """
    used, inputs = _student_inputs(run, teachers)

    def build(scratch: Path, checkpoints: Path) -> dict:
        settle(check_start(run.recipe, run.data.facts["counts"], run.store))
        return _build_student(run, used, scratch, checkpoints)

    return make_product(run.workspace, STUDENTS, run.recipe.name, inputs, build, together=True)


def student_folder(run: Run, teachers: dict[str, Product]) -> Path:
    """Where `distill_student` writes, or wrote, the student: for whoever lets other processes or pods train it.

    Raises:
        UserError: if a teacher's product is missing.
    """
    _, inputs = _student_inputs(run, teachers)
    name = run.recipe.name
    return Path(run.workspace) / STUDENTS / f"{name}-{product_key(STUDENTS, name, inputs)}"


def _student_inputs(run: Run, teachers: dict[str, Product]) -> tuple[dict[str, Product], list]:
    """The teachers a student needs, and all that decides what it becomes."""
    recipe = run.recipe
    wanted = {task: spec.teacher for task, spec in recipe.tasks.items()}
    needed = set(wanted.values()) | ({recipe.distill.start} - {"base"})  # the start may teach no task
    missing = sorted(needed - set(teachers))
    if missing:
        raise UserError(f"distillation lacks the teacher(s) {', '.join(missing)}; finetune them first")
    used = {name: teachers[name] for name in sorted(needed)}
    tasks = {task: spec.model_dump(mode="json") for task, spec in recipe.tasks.items()}
    judged = {"tasks": tasks, **_judged_by(run)} if recipe.distill.select else {}
    inputs = [
        run.base.digest,
        run.data.facts["content"],
        {n: t.digest for n, t in used.items()},
        wanted,
        {task: spec["weight"] for task, spec in tasks.items()},
        judged,
        recipe.model.decisive(),
        recipe.distill.decisive(),
    ]
    return used, inputs


def _judged_by(run: Run) -> dict[str, Any]:
    """What decides the figures by which a state is selected, besides the fields and the records."""
    from danceopd.evaluation.conditions import tools_of

    spec, tasks = run.recipe.evaluate, run.recipe.tasks.values()
    tools = tools_of(spec, [name for task in tasks for name in task.metrics])
    drawn = {name: run.recipe.sampling(name).model_dump(mode="json") for name in ("student", *run.recipe.teachers)}
    return {"sampling": drawn, "seed": spec.seed, "tools": tools}


@dataclass(frozen=True)
class Training:
    """What a distillation needs, loaded.

    Attributes:
        encoder: of the run's records, with the base.
        encoded: training records of every task.
        fields: the teachers by name.
        teacher_of: task -> teacher's name.
        weights: task -> weight in the loss.
        empty: embedding of the empty prompt, (L, D).
    """

    encoder: Encoder
    encoded: EncodedRecords
    fields: dict[str, Field]
    teacher_of: dict[str, str]
    weights: dict[str, Weight]
    empty: Tensor

    @property
    def backbone(self) -> Backbone:
        """The base."""
        return self.encoder.backbone


def open_training(run: Run, teachers: dict[str, Product]) -> Training:
    """Load the base, the given teachers and the recipe's training records.

    Raises:
        UserError: if a task has no training records, or they lack the targets that the recipe's method trains on.
    """
    from danceopd.methods.table import needs_targets

    specs = run.recipe.tasks
    encoder = Encoder(run, open_backbone(run, run.recipe.distill))
    encoded = encoder.train(tuple(specs), needs_targets(run.recipe.distill))
    teacher_of = {task: spec.teacher for task, spec in specs.items()}
    weights = {task: spec.weight for task, spec in specs.items()}
    empty = encoder.empty_prompt()
    return Training(encoder, encoded, load_teachers(encoder, teachers), teacher_of, weights, empty)


def _build_student(run: Run, teachers: dict[str, Product], scratch: Path, checkpoints: Path) -> dict[str, Any]:
    from danceopd.devices import hardware
    from danceopd.distill import STUDENT, distill
    from danceopd.evaluation.plots import plot_history
    from danceopd.evaluation.previews import Previewer
    from danceopd.evaluation.samplings import Samplings
    from danceopd.evaluation.validate import GateValidator
    from danceopd.export.model_card import write_card
    from danceopd.export.sharded import export_sharded
    from danceopd.preflight.checks import preflight
    from danceopd.training.checkpoints import Checkpoints
    from danceopd.training.fsdp import share_out, shares
    from danceopd.training.processes import this_process

    recipe, base, data = run.recipe, run.base, run.data
    title, settings = f"distill {recipe.name}", recipe.model_dump(mode="json")
    journal = recording.begin(recipe, run.workspace, checkpoints.name, title, settings, data.facts)
    for product in teachers.values():
        journal.uses(product.digest)
    ready = open_training(run, teachers)
    backbone, fields = ready.backbone, ready.fields
    shown = ready.encoder.split("val", tuple(recipe.tasks), limit=3)
    # A resumed run does not draw the earlier ones again, so they lie beside the checkpoints until the end.
    processes = this_process()
    previews = checkpoints / "previews" if processes.main else scratch / "drawn"
    samplings = Samplings(recipe, lambda: ready.empty, stated_samplings(teachers))
    previewer = Previewer(*shown, fields, ready.teacher_of, recipe.evaluate, previews, samplings)

    def show(field: Field, step: int) -> None:
        previewer(field, step)
        journal.image("samples", step, previews / f"step-{step:06d}.png")

    saves = Checkpoints(checkpoints, recipe.distill.keep_checkpoints, checkpoints.name)
    validate = None
    if recipe.distill.select is not None:
        sets = ready.encoder.held_out("val", recipe.distill.select.per_task)
        validate = GateValidator(recipe, fields, sets, run.cache / "judge", samplings, processes)
    condition = probe_condition(backbone, recipe) if processes.main else None
    backbone.free_encoders()  # everything is encoded
    share_out(backbone, fields.values(), recipe.distill, STUDENT, processes)
    facts = {name: product.facts for name, product in teachers.items()}
    counts = data.facts["counts"]
    settle(preflight(recipe, backbone, base.pipeline, fields, facts, ready.encoded, counts, processes.count))
    student, history = distill(
        backbone,
        ready.encoded,
        fields,
        ready.teacher_of,
        ready.weights,
        recipe.distill,
        show,
        saves,
        validate,
        recorder(journal, "student"),
        ready.empty,
    )
    if shares(recipe.distill, processes):
        export_sharded(student, recipe, scratch, processes, condition)
    if not processes.main:
        return {}  # the main process writes the student
    shutil.copytree(previews, scratch / "previews")
    write_json(scratch / "history.json", history)
    plot_history(history, scratch / "previews" / "training.png")
    journal.file(scratch / "previews" / "training.png")
    if not shares(recipe.distill, processes):
        export_student(student, recipe, base, scratch, condition)
    origins = {"data": data.facts["content"], "dvc": data.facts["dvc"], "git": data.facts["git"], "base": base.digest}
    origins |= {f"teacher {name}": product.digest for name, product in teachers.items()}
    write_sampling(scratch / "pipeline", recipe.sampling("student"))
    write_card(recipe, scratch / "pipeline", student.adapter is not None, origins)
    forwards = sum(entry["forwards_per_sample"] for entry in history) / len(history)
    return {
        "pipeline": "pipeline",
        "steps": history[-1]["step"],
        "loss": history[-1]["loss"],
        "forwards_per_sample": forwards,
        "forwards": round(forwards * recipe.distill.batch * history[-1]["step"]),
        "hardware": hardware(next(backbone.transformer.parameters()).device, processes.count),
        "made_of": {"base": base.digest, "teachers": {n: t.digest for n, t in teachers.items()}},
        "window": recipe.distill.model_dump(mode="json")["window"],
        "samplings": {name: samplings.of(name).model_dump(mode="json") for name in ("base", "student", *teachers)},
    }
