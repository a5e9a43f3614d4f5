"""The step that scores base, teachers and student on held-out records, and says where the student comes from."""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.config.recipe import Recipe
from danceopd.evaluation.names import STUDENT
from danceopd.files import read_json
from danceopd.steps.cost import Spent, cost_table, spent_on
from danceopd.steps.encodings import Encoder, open_backbone
from danceopd.steps.run import Run
from danceopd.steps.teachers import load_teachers, stated_samplings
from danceopd.tracking import recording
from danceopd.workspace import Product, code_revision, joined_processes, make_product

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from danceopd.backbones.base import Backbone
    from danceopd.flow.fields import Field
    from danceopd.training.processes import Processes


def evaluate_student(run: Run, teachers: dict[str, Product], student: Product) -> Product:
    """Score base, every teacher and the student on every task's held-out records; write figures and the report.

    Several processes share the records that are drawn; the main one scores the pictures, and asks a judge, alone.
    """
    recipe, base, data, workspace = run.recipe, run.base, run.data, run.workspace
    inputs = [
        base.digest,
        data.facts["content"],
        {n: t.digest for n, t in sorted(teachers.items())},
        student.digest,
        recipe.model.decisive(),
        recipe.evaluate.model_dump(mode="json"),
        {name: recipe.sampling(name).model_dump(mode="json") for name in ("base", "student", *recipe.teachers)},
        {t: s.model_dump(mode="json") for t, s in recipe.tasks.items()},
        *looks_with(recipe),
    ]

    def build(scratch: Path, checkpoints: Path) -> dict:
        processes = joined_processes()
        if processes is not None and not processes.main:
            _draw_along(run, teachers, student, processes)
            return {}
        sections = recipe.model_dump(mode="json")
        settings = {name: sections[name] for name in ("model", "tasks", "evaluate")}
        title, read = f"evaluate {recipe.name}", data.facts
        journal = recording.begin(recipe, workspace, checkpoints.name, title, settings, read, recording.EVALUATION)
        facts = _build_evaluation(run, teachers, student, scratch, processes)
        recording.evaluated(journal, read_json(scratch / "metrics.json"), scratch, student.digest)
        return facts

    return make_product(workspace, "evaluations", recipe.name, inputs, build, together=True)


def looks_with(recipe: Recipe) -> list:
    """What decides figures besides fields and records: benchmarks' records, and which networks are on this machine.

    An evaluation that skipped a metric is made anew once the metric can be measured.
    """
    from danceopd.data.assemble import open_dataset
    from danceopd.evaluation.metrics import metric
    from danceopd.evaluation.metrics.tools import lacks, weights_of

    names = {name for task in recipe.with_benchmarks().tasks.values() for name in task.metrics}
    states = {}
    for tool in sorted({tool for name in names for tool in metric(name).tools}):
        lacking = lacks(tool, recipe.evaluate)
        states[tool] = [lacking, None if lacking else weights_of(tool, recipe.evaluate)]
    benchmarks = {name: open_dataset(Path(b.input)).content for name, b in recipe.evaluate.benchmarks.items()}
    return [part for part in (states, benchmarks) if part]


def _open_fields(run: Run, teachers: dict[str, Product], student: Product) -> tuple[Encoder, dict[str, Field]]:
    """The base with its encoder, and every field that is drawn."""
    from danceopd.flow.fields import VelocityField

    backbone = open_backbone(run)
    encoder = Encoder(run, backbone)
    fields: dict[str, Field] = {"base": VelocityField("base", backbone, backbone.transformer)}
    fields |= load_teachers(encoder, teachers)
    fields[STUDENT] = _load_student(backbone, student)
    return encoder, fields


def _draw_along(run: Run, teachers: dict[str, Product], student: Product, processes: Processes) -> None:
    from danceopd.evaluation.evaluate import draw_along
    from danceopd.evaluation.samplings import Samplings

    encoder, fields = _open_fields(run, teachers, student)
    backbone = encoder.backbone
    samplings = Samplings(run.recipe, encoder.empty_prompt, stated_samplings(teachers))
    place = (encoder.dataset(), run.cache, encoder.key)
    draw_along(run.recipe, backbone, fields, *place, samplings, processes, backbone.free_encoders)


def _build_evaluation(
    run: Run, teachers: dict[str, Product], student: Product, scratch: Path, processes: Processes | None
) -> dict[str, Any]:
    from danceopd.devices import hardware
    from danceopd.evaluation.evaluate import evaluate
    from danceopd.evaluation.report import write_report
    from danceopd.evaluation.samplings import Samplings
    from danceopd.training.processes import ALONE

    recipe = run.recipe
    encoder, fields = _open_fields(run, teachers, student)
    backbone, processes = encoder.backbone, processes or ALONE
    started = time.monotonic()
    place = (run.cache, encoder.key, judged_in(student))
    samplings = Samplings(recipe, encoder.empty_prompt, stated_samplings(teachers))
    dataset, let_go = encoder.dataset(), backbone.free_encoders
    evaluation = evaluate(recipe, backbone, fields, dataset, *place, samplings, let_go, processes)
    training = {name: fact for name, fact in student.facts.items() if name != "made_of"}  # the lineage says it
    spent = spent_on(teachers, student)
    machine = hardware(next(backbone.transformer.parameters()).device, processes.count)
    spent.append(Spent("evaluation", time.monotonic() - started, machine, evaluation.metrics["forwards"]))
    provenance = lineage(run, teachers, student) | {
        "cost": cost_table(spent),
        "software": _software(),
        "training": training,
        "the whole recipe": recipe.model_dump(mode="json"),
    }
    evaluation = replace(evaluation, metrics=evaluation.metrics | {"versions": _versions(teachers)})
    write_report(evaluation, scratch, provenance)
    metrics = read_json(scratch / "metrics.json")
    return {"passed": metrics["passed"], "scores": metrics["scores"]["student"], "report": "report.html"}


def _load_student(backbone: Backbone, student: Product) -> Field:
    """The student's field: a LoRA as one more adapter on the base, which then need not lie in memory twice.

    Into a base in 8 bits nothing was merged: what is measured there is the exported transformer.
    """
    from danceopd.flow.field_io import field_kind, load_field
    from danceopd.flow.fields import VelocityField

    if field_kind(student.folder) == "lora" and backbone.settings.quantize is None:
        return load_field(backbone, STUDENT, student.folder)
    network = backbone.new_transformer(student.pipeline)
    return VelocityField(STUDENT, backbone, network)


def judged_in(student: Product) -> str:
    """The folder of the cache that keeps the judge's answers of a student's evaluation."""
    return student.digest[:16]


def _software() -> dict[str, str]:
    """The versions that figures depend on."""
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    return {"python": platform.python_version()} | packages


def _versions(teachers: dict[str, Product]) -> dict[str, dict]:
    """The teachers that are registered versions: {name: {"model", "version"}}."""
    return {name: product.facts["registered"] for name, product in teachers.items() if "registered" in product.facts}


def lineage(run: Run, teachers: dict[str, Product], student: Product) -> dict[str, Any]:
    """Where a student comes from: revisions and digests of everything that made it; `added_to`, if to a champion."""
    champions = {f"{of['model']} version {of['version']}" for of in _versions(teachers).values()}
    added = {"added_to": ", ".join(sorted(champions))} if champions else {}
    return added | {
        "recipe": run.recipe.digest(),
        "code": code_revision(),
        "git": run.data.facts["git"],
        "dvc": run.data.facts["dvc"],
        "data": run.data.facts["content"],
        "base": run.base.digest,
        "teachers": {name: product.digest for name, product in sorted(teachers.items())},
        "student": student.digest,
    }


def shortfalls(recipe: Recipe, evaluation: Product) -> list[str]:
    """In words: which gates the student fails by how much, and what to try; empty if it holds all."""
    from danceopd.evaluation.shortfalls import say_shortfalls

    return say_shortfalls(read_json(evaluation.folder / "metrics.json"), recipe)
