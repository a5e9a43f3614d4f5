"""What a recipe will load and take, told from configurations alone, before a weight is downloaded.

Sizes are exact where they are counts of weights; activations, operations and with them the time are estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from danceopd.backbones import open_outline
from danceopd.backbones.base import Backbone
from danceopd.backbones.bases import SHIPPED, fetch_configs
from danceopd.backbones.weights import file_shapes, weight_files
from danceopd.config.recipe import BaseTeacher, CheckpointTeacher, FinetunedTeacher, Recipe
from danceopd.data.encoded import EncodedRecords
from danceopd.files import at_home
from danceopd.flow.fields import Field, VelocityField
from danceopd.flow.guidance import GuidedField
from danceopd.preflight.fake_pass import Samples, forward_operations
from danceopd.preflight.findings import Finding
from danceopd.preflight.forwards import expected_forwards
from danceopd.preflight.memory import (
    BYTES,
    MemoryEstimate,
    estimate_memory,
    samples_at_once,
    sharing,
    trained_parameters,
)
from danceopd.preflight.phases import Phase, phases_of
from danceopd.preflight.sampling import check_sampling


@dataclass(frozen=True)
class Outlook:
    """What a recipe takes.

    Attributes:
        parameters: weights of the base's transformer.
        tokens: of the longest sample, as (picture and sources, prompt).
        forwards: passes of the transformer per sample, in the mean over training.
        operations: of one forward pass of the longest sample.
        held: bytes of frozen weights on each GPU while it trains: the base's and the teachers'.
        training: what training adds to them.
        other: bytes of both if the processes shared the weights where the recipe has whole ones in each, or the other
            way round; None: there is one process, or the recipe cannot be otherwise.
        phases: memory and disk of every phase of the run.
        findings: what is doubtful about how the student will be drawn.
    """

    parameters: int
    tokens: tuple[int, int]
    forwards: float
    operations: float
    held: int
    training: MemoryEstimate
    other: int | None
    phases: list[Phase]
    findings: list[Finding]


def look_ahead(recipe: Recipe, workspace: Path, processes: int = 1) -> Outlook:
    """Find out what a recipe takes from its base's configuration files, which are fetched if they are not here.

    Args:
        recipe: the run.
        workspace: where downloads go.
        processes: how many GPUs train together.

    Raises:
        UserError: if the base cannot be found, or is no pipeline of the recipe's back end.
    """
    model = recipe.model
    folder = fetch_configs(model.base, model.revision, Path(workspace))
    backbone = open_outline(folder, model)
    network = backbone.transformer
    parameters = sum(p.numel() for p in network.parameters())
    tokens = _tokens(recipe, backbone)
    count = samples_at_once(recipe.distill, processes)
    edits = {task.needs_source for task in recipe.tasks.values()}
    shapes = [Samples(count, model.height, model.width, one) for one in sorted(edits)]
    held = _held(recipe, backbone, processes)
    training = estimate_memory(recipe, backbone, shapes, processes)
    return Outlook(
        parameters=parameters,
        tokens=tokens,
        forwards=expected_forwards(recipe, backbone, _stand_ins(recipe), _fields(recipe, backbone)),
        operations=max(forward_operations(backbone, replace(shape, count=1)) for shape in shapes),
        held=held,
        training=training,
        other=_other_way(recipe, backbone, shapes, processes),
        phases=phases_of(recipe, backbone, folder, held, training, processes),
        findings=check_sampling(recipe, backbone),
    )


def _held(recipe: Recipe, backbone: Backbone, processes: int) -> int:
    """Bytes of the frozen weights, of the base and of the teachers, that lie on each GPU."""
    model, parameters = recipe.model, sum(p.numel() for p in backbone.transformer.parameters())
    whole = sum(_holds_all(teacher) for teacher in recipe.teachers.values())
    waiting = min(1, whole) if model.offload else whole
    frozen = parameters * (BYTES[model.quantize or model.dtype] + waiting * BYTES[model.dtype])
    return (frozen + _adapters(recipe, backbone)) // sharing(recipe.distill, processes)


def _other_way(recipe: Recipe, backbone: Backbone, shapes: list[Samples], processes: int) -> int | None:
    """Bytes on each GPU with the other `distill.parallel`."""
    spec, model = recipe.distill, recipe.model
    fits = spec.optimizer != "adamw8bit" and model.quantize is None and not model.offload
    if processes == 1 or not (fits or spec.parallel == "shard"):
        return None
    turned = spec.model_copy(update={"parallel": "replicate" if spec.parallel == "shard" else "shard"})
    other = recipe.model_copy(update={"distill": turned})
    return _held(other, backbone, processes) + estimate_memory(other, backbone, shapes, processes).total


def _holds_all(teacher: object) -> bool:
    """Whether a teacher is a transformer of its own, as far as the recipe tells."""
    if isinstance(teacher, CheckpointTeacher):
        return teacher.kind == "checkpoint"
    if isinstance(teacher, FinetunedTeacher):
        return teacher.train.trainable == "full"
    return not isinstance(teacher, BaseTeacher)


def _adapters(recipe: Recipe, backbone: Backbone) -> int:
    """Bytes of the teachers' LoRAs: counted in their files, or taken to be like the student's where none is here."""
    numbers = 0
    for teacher in recipe.teachers.values():
        if isinstance(teacher, FinetunedTeacher) and teacher.train.trainable == "lora":
            numbers += trained_parameters(backbone.transformer, teacher.train, backbone.lora_targets)
        elif isinstance(teacher, CheckpointTeacher) and teacher.kind == "lora":
            files = [] if "://" in teacher.path else weight_files(at_home(teacher.path))
            alike = recipe.distill.model_copy(update={"trainable": "lora"})
            numbers += (
                sum(math.prod(shape) for file in files for shape in file_shapes(file).values())
                if files
                else trained_parameters(backbone.transformer, alike, backbone.lora_targets)
            )
    return numbers * BYTES["float32"]


def _tokens(recipe: Recipe, backbone: Backbone) -> tuple[int, int]:
    picture, _ = backbone.latent_shape(recipe.model.height, recipe.model.width)
    edits = any(task.needs_source for task in recipe.tasks.values())
    return picture * (2 if edits else 1), recipe.model.max_sequence_length


def _stand_ins(recipe: Recipe) -> EncodedRecords:
    """Four records per task, of one number each."""
    tasks = [task for task in recipe.tasks for _ in range(4)]
    rows = torch.zeros(len(tasks), dtype=torch.int64)
    source = torch.tensor([0 if recipe.tasks[task].needs_source else -1 for task in tasks])
    one = torch.zeros(1, 1, 1)
    return EncodedRecords(tasks, one, rows, one, source, one, rows, recipe.model.height, recipe.model.width)


def _fields(recipe: Recipe, backbone: Backbone) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    way = recipe.distill.guidance
    for name, teacher in recipe.teachers.items():
        plain = VelocityField(name, backbone, backbone.transformer)
        known = teacher.guidance if way is None or teacher.guidance is not None else way.absorb
        fields[name] = plain if known is None else GuidedField(plain, known, torch.zeros(1, 1))
    return fields


def what_is_there(recipe: Recipe) -> list[tuple[str, str, str | None]]:
    """What a recipe will load: (what, where from, what is wrong with it or None)."""
    model = recipe.model
    place = (
        "ships with the package"
        if model.base in SHIPPED
        else f"{model.base}{f' at {model.revision}' * bool(model.revision)}"
    )
    rows: list[tuple[str, str, str | None]] = [("base", place, None)]
    if model.transformer is not None:
        rows.append(("its transformer", model.transformer, _lacking(model.transformer)))
    for name, teacher in recipe.teachers.items():
        guided = "" if teacher.guidance is None else f", guided at {teacher.guidance:g}"
        if isinstance(teacher, CheckpointTeacher):
            rows.append((f"teacher {name}", f"{teacher.kind} {teacher.path}{guided}", _lacking(teacher.path)))
        elif isinstance(teacher, FinetunedTeacher):
            rows.append((f"teacher {name}", f"fine-tuned on {teacher.task}, {teacher.train.steps} steps{guided}", None))
        else:
            place = "the base" if isinstance(teacher, BaseTeacher) else f"champion of {recipe.register_as.model}"
            rows.append((f"teacher {name}", f"{place}{guided}", None))
    rows += [("data", location, _lacking(location)) for location in recipe.data.inputs]
    return rows + ([("data", "the generated world", None)] if recipe.data.world else [])


def _lacking(location: str) -> str | None:
    return None if "://" in location or at_home(location).exists() else "no such file or folder"
