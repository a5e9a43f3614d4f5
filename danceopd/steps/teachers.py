"""The step that makes one teacher, or takes it from where it lies, and proves it better than the base."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.backbones.hashes import hash_weights
from danceopd.config.recipe import BaseTeacher, ChampionTeacher, CheckpointTeacher, FinetunedTeacher, Recipe
from danceopd.config.sampling import Sampling, read_sampling
from danceopd.errors import UserError
from danceopd.export.student import probe_condition
from danceopd.files import FIELD, write_json
from danceopd.preflight.at_start import check_start
from danceopd.preflight.findings import settle
from danceopd.steps.encodings import Encoder, open_backbone
from danceopd.steps.run import Run
from danceopd.steps.tuned import link_weights, tune
from danceopd.tracking import recording
from danceopd.tracking.recording import recorder
from danceopd.workspace import Product, main_first, make_product

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from danceopd.backbones.base import Condition
    from danceopd.flow.fields import Field

log = logging.getLogger(__name__)

NOTHING = 1e-5  # of the velocity: two fields that differ by less differ by rounding


def load_teachers(encoder: Encoder, teachers: dict[str, Product]) -> dict[str, Field]:
    """Teachers' fields by name, all on the encoder's backbone; guided where the student absorbs their guidance."""
    from danceopd.flow.field_io import load_fields
    from danceopd.flow.guidance import guide_all
    from danceopd.training.processes import this_process

    folders = {name: product.folder for name, product in teachers.items()}
    offload = this_process().device if encoder.run.recipe.model.offload else None
    fields = load_fields(encoder.backbone, folders, encoder.empty_prompt, offload)
    way = encoder.run.recipe.distill.guidance
    if way is None or way.absorb is None:
        return fields
    return guide_all(fields, way.absorb, encoder.empty_prompt(), way.batched)


def stated_samplings(teachers: dict[str, Product]) -> dict[str, Sampling]:
    """How those teachers are drawn that were students once, by their own word."""
    known = {name: product.facts.get("sampling") for name, product in teachers.items()}
    return {name: Sampling.model_validate(found) for name, found in known.items() if found is not None}


def finetune_teacher(run: Run, teacher: str) -> Product:
    """Make one teacher's field folder: fine-tuned, or taken from where it lies, and proved better than the base.

    The champion is taken as it is: it was judged when it was registered, and here it only holds what it can do.

    Args:
        run: its recipe says what the teacher is; its store may hold a champion.
        teacher: its name there.

    Raises:
        UserError: if the teacher is unknown, has no training records, is no better than the base on its task, or is
            the champion and there is none.
    """
    recipe, base, data, workspace = run.recipe, run.base, run.data, run.workspace
    if teacher not in recipe.teachers:
        raise UserError(f"teacher {teacher!r} is not in the recipe; teachers are: {', '.join(recipe.teachers)}")
    spec, champion, weights = recipe.teachers[teacher], None, None
    drawn = [recipe.sampling(name).model_dump(mode="json") for name in ("base", teacher)]
    inputs = [base.digest, recipe.model.decisive(), spec.decisive(), drawn, recipe.evaluate.per_task]
    if isinstance(spec, CheckpointTeacher):
        from danceopd.backbones.bases import fetch_weights

        with main_first():
            weights = fetch_weights(spec.path, Path(workspace), f"teachers.{teacher}.path")
            inputs.append(hash_weights(weights, Path(workspace)))
    elif isinstance(spec, ChampionTeacher):
        from danceopd.registry.champion_teacher import fetch_champion, find_champion

        champion = find_champion(recipe, run.store)
        inputs.append(asdict(champion))
    plain_base = isinstance(spec, BaseTeacher) and spec.guidance is None
    if not plain_base:
        inputs.append(data.facts["content"])
        inputs.append([(t, s.metrics) for t, s in recipe.tasks.items() if s.teacher == teacher])

    def build(scratch: Path, checkpoints: Path) -> dict:
        if isinstance(spec, FinetunedTeacher):
            settle(check_start(recipe, data.facts["counts"], run.store))
        if champion is None:
            return _build_teacher(run, teacher, scratch, checkpoints, weights)
        with tempfile.TemporaryDirectory(dir=workspace) as fetched:
            folder = fetch_champion(champion, run.store, Path(fetched))
            stated = read_sampling(folder) or Sampling(steps=recipe.evaluate.steps)  # it was drawn as all were
            facts = _build_teacher(run, teacher, scratch, checkpoints, folder)
        write_json(scratch / "champion.json", asdict(champion))  # the same weights as another version: another product
        registered = {"model": champion.model, "version": champion.version}
        return facts | {"registered": registered, "sampling": stated.model_dump(mode="json")}

    return make_product(workspace, "teachers", teacher, inputs, build, together=not plain_base)


def _build_teacher(
    run: Run, teacher: str, scratch: Path, checkpoints: Path, fetched: Path | None = None
) -> dict[str, Any]:
    """Write a teacher's field folder; `fetched` is where the weights lie of one that exists already."""
    recipe, base, data = run.recipe, run.base, run.data
    spec = recipe.teachers[teacher]
    settings = {"model": recipe.model.model_dump(mode="json"), "teacher": spec.model_dump(mode="json")}
    plain_base = isinstance(spec, BaseTeacher) and spec.guidance is None
    read = None if plain_base else data.facts
    journal = recording.begin(recipe, run.workspace, checkpoints.name, f"teacher {teacher}", settings, read)
    if plain_base:
        write_json(scratch / FIELD, {"kind": "base", "name": teacher})
        return {"kind": "base", "scores": {}}

    from danceopd.devices import hardware
    from danceopd.flow.field_io import save_about, save_field
    from danceopd.flow.guidance import GuidedField
    from danceopd.training.processes import this_process

    proved = not isinstance(spec, ChampionTeacher)
    if proved:
        _require_held_out(recipe, data, teacher)

    def ready(encoder: Encoder) -> Condition:
        """Everything that is asked for below, encoded."""
        if proved:
            encoder.empty_prompt()
            for task in _taught(recipe, teacher):
                encoder.split("val", (task,), recipe.evaluate.per_task)
        return probe_condition(encoder.backbone, recipe)

    processes = this_process()
    facts: dict[str, Any] = {"kind": spec.kind, "hardware": hardware(processes.device, processes.count)}
    tuned = None
    if isinstance(spec, FinetunedTeacher):
        tuned = tune(run, teacher, recorder(journal, teacher), ready)
        encoder, condition, field = tuned.encoder, tuned.condition, tuned.field
        facts |= tuned.facts
    else:
        encoder = Encoder(run, open_backbone(run))
        condition, field = ready(encoder), _field_there(encoder, teacher, fetched)
        encoder.backbone.free_encoders()
    plain = field.field if isinstance(field, GuidedField) else field
    if spec.guidance is not None:  # the recipe's scale goes before the folder's
        field = GuidedField(plain, spec.guidance, encoder.empty_prompt(), spec.guidance_batched)
    # Guidance would make another field of the base's own weights, too: where there are others, they are looked at.
    _prove_other_than_base(recipe, field if isinstance(spec, BaseTeacher) else plain, base, condition)
    if tuned is None:
        save_field(field, scratch)
    elif processes.main:
        link_weights(tuned.product, scratch)
        save_about(field, scratch)
    if proved:
        facts["scores"] = _prove_teacher(encoder, field)
    return facts


def _field_there(encoder: Encoder, teacher: str, fetched: Path | None) -> Field:
    """A teacher's field that exists already: the base's own, or of weights that were fetched.

    Raises:
        UserError: if they do not fit the base, or are not what the recipe calls them.
    """
    from danceopd.flow.field_io import load_field
    from danceopd.flow.fields import VelocityField
    from danceopd.preflight.compatibility import check_pipeline

    spec, backbone = encoder.run.recipe.teachers[teacher], encoder.backbone
    if isinstance(spec, BaseTeacher):
        return VelocityField(teacher, backbone, backbone.transformer)
    assert fetched is not None
    settle(check_pipeline(teacher, fetched, encoder.run.base.pipeline))
    field = load_field(backbone, teacher, fetched, encoder.empty_prompt)
    if isinstance(spec, CheckpointTeacher):
        _check_kind(teacher, spec, field)
    return field


def _taught(recipe: Recipe, teacher: str) -> list[str]:
    """The tasks that a teacher serves."""
    return [task for task, spec in recipe.tasks.items() if spec.teacher == teacher]


def _require_held_out(recipe: Recipe, data: Product, teacher: str) -> None:
    """Before hours of training: is there anything to prove the teacher on afterwards?"""
    for task, spec in recipe.tasks.items():
        if spec.teacher == teacher and not data.facts["counts"].get(task, {}).get("val"):
            raise UserError(
                f"task {task!r}: no records in split 'val', on which teacher {teacher!r} is "
                "measured against the base; move some there (a record's 'split')"
            )


def _check_kind(teacher: str, spec: CheckpointTeacher, field: Field) -> None:
    found = "checkpoint" if field.adapter is None else "lora"
    if spec.kind != found:
        raise UserError(f"teachers.{teacher}.kind is {spec.kind}, and {spec.path} holds a {found}; write kind: {found}")


def _prove_other_than_base(recipe: Recipe, field: Field, base: Product, condition: Condition) -> None:
    """Hold a teacher against the base.

    Raises:
        UserError: if it changes nothing.
    """
    from danceopd.backbones.weights import same_weights
    from danceopd.flow.field_io import probe
    from danceopd.flow.fields import VelocityField

    spec, backbone = recipe.teachers[field.name], field.backbone
    mine, bare = (probe(f, condition) for f in (field, VelocityField("base", backbone, backbone.transformer)))
    change = float((mine - bare).square().mean().sqrt() / bare.square().mean().sqrt())
    if field.network is not backbone.transformer and same_weights(field.network, base.pipeline / "transformer"):
        change = 0.0  # what differs is how the base's weights are rounded
    log.info("teacher %s changes the base's velocity by %.3g of its size", field.name, change)
    if not change > NOTHING:  # NaN is refused, too
        if isinstance(spec, CheckpointTeacher):
            why = f"{spec.path}: an untrained LoRA, or this base's own weights? For the base itself write kind: base"
        elif isinstance(spec, FinetunedTeacher):
            why = f"train it longer, or at a higher rate (teachers.{field.name}.train)"
        elif isinstance(spec, ChampionTeacher):
            why = "the registered champion has this base's own weights; promote another version"
        else:
            why = "guidance finds no difference between a prompt and none; write kind: base without guidance"
        raise UserError(
            f"teachers.{field.name} changes the base's velocity by {change:.1g} of its size, which is nothing; {why}"
        )


def _prove_teacher(encoder: Encoder, field: Field) -> dict[str, dict]:
    """Score base and teacher on the validation records of every task the teacher serves.

    Several processes share the records that are drawn; the main one scores them.

    Raises:
        UserError: with the figures, if the teacher is no better than the base on the first metric that can be
            measured here of a task with gates, or if none can.
    """
    from danceopd.evaluation.metrics.tools import Tools
    from danceopd.evaluation.samplings import Samplings
    from danceopd.evaluation.scoring import score_means, skipped_metrics
    from danceopd.flow.fields import VelocityField
    from danceopd.training.processes import this_process

    recipe, backbone = encoder.run.recipe, field.backbone
    bare = VelocityField("base", backbone, backbone.transformer)
    tools = Tools(recipe.evaluate, cache=encoder.run.cache / "judge")
    samplings = Samplings(recipe, encoder.empty_prompt)
    scores: dict[str, dict] = {}
    for task in _taught(recipe, field.name):
        records, encoded = encoder.split("val", (task,), recipe.evaluate.per_task)
        skipped = skipped_metrics(recipe.tasks[task].metrics, tools)
        metrics = tuple(name for name in recipe.tasks[task].metrics if name not in skipped)
        if not metrics:
            told = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            raise UserError(
                f"task {task!r}: none of its metrics can be measured here ({told}), so teacher "
                f"{field.name!r} cannot be held against the base"
            )
        means = {}
        for one in (bare, field):
            drawn, spec = samplings.drawn(one.name, one)
            means[one.name] = score_means(drawn, encoded, records, metrics, spec, tools, this_process())
        scores[task] = {"base": means["base"], "teacher": means[field.name]}
        first = metrics[0]
        figures = f"{first} {means[field.name][first]:.4g}, the base {means['base'][first]:.4g}"
        log.info("teacher %s on %s: %s", field.name, task, figures)
        if means[field.name][first] > means["base"][first]:
            continue
        if not recipe.tasks[task].gates:  # then the metric is there to be looked at
            log.warning("teacher %s is no better than the base on %s, which has no gates", field.name, task)
        else:
            raise UserError(
                f"teacher {field.name!r} is no better than the base on its task {task!r} ({figures}); train it longer "
                f"(teachers.{field.name}.train.steps), or let the base teach this task"
            )
    return scores
