"""What can be known before the first step of a distillation: findings with figures, not a run that fails at night.

Every check returns findings; `settle` logs the notes and warnings and raises the errors together.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # quantized weights have no storage

from danceopd.backbones.base import Backbone, Condition, repeated_blocks
from danceopd.data.encoded import EncodedRecords
from danceopd.errors import UserError
from danceopd.fields import Field, VelocityField
from danceopd.files import hash_file, read_json
from danceopd.operators import GuidedField
from danceopd.recipe import MERGES, BaseTeacher, ChampionTeacher, DistillRecipe, Recipe

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
SAME = 1e-3  # two fields are one where their velocities differ by less, relative to the velocity (root mean square)
PROBES = 2  # training records a task
SIGMAS = (0.9, 0.6, 0.3)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, doubtful, or good to know.

    Attributes:
        level: `error` stops the run.
        check: which check found it.
        message: what, with figures, and how to mend it.
    """

    level: Literal["error", "warning", "note"]
    check: str
    message: str


def settle(findings: list[Finding]) -> None:
    """Log notes and warnings.

    Raises:
        UserError: with one line an error, if there are errors.
    """
    for finding in findings:
        if finding.level != "error":
            log.log(logging.WARNING if finding.level == "warning" else logging.INFO, "preflight: %s", finding.message)
    errors = [finding.message for finding in findings if finding.level == "error"]
    if errors:
        raise UserError("\n".join(errors))


# ------------------------------------------------------------------------------------------------------------- records


def check_records(recipe: Recipe, counts: Mapping[str, Mapping[str, int]], encoded: EncodedRecords) -> list[Finding]:
    """Tasks that nobody knows or that have no records, and records without the source image their task needs.

    Args:
        recipe: its tasks.
        counts: the dataset's records by task and split, of all tasks there are in it.
        encoded: the training records of the recipe's tasks.
    """
    found = []
    unknown = {task: sum(splits.values()) for task, splits in counts.items() if task not in recipe.tasks}
    if any(unknown.values()):
        text = ", ".join(f"{task} ({count})" for task, count in sorted(unknown.items()) if count)
        found.append(
            Finding(
                "error",
                "tasks",
                f"records of unknown task(s) {text}; the recipe's tasks are: {', '.join(recipe.tasks)}",
            )
        )
    total = Counter(encoded.tasks)
    lacking = sorted(set(recipe.tasks) - set(total))
    if lacking:
        text = f"no training records for task(s) {', '.join(lacking)}; the dataset has none in 'train'"
        found.append(Finding("error", "records", text))
    bare = Counter(task for task, row in zip(encoded.tasks, encoded.source_row.tolist(), strict=True) if row < 0)
    for task, spec in recipe.tasks.items():
        if spec.needs_source and bare[task]:
            text = (
                f"task {task!r} edits a source image, and {bare[task]} of its {total[task]} training records have "
                f"none; add the images, or set tasks.{task}.needs_source: false"
            )
            found.append(Finding("error", "sources", text))
    return found


# -------------------------------------------------------------------------------------------------------------- fields


@torch.no_grad()
def probe_states(field: Field, condition: Condition, seed: int = 0) -> tuple[Tensor, Tensor, Condition]:
    """States such as a student meets: noise, and one jump of a field from noise to a picture, noised again.

    Args:
        field: whose picture it is.
        condition: real training conditions, of B samples.
        seed: of the noise.

    Returns:
        States (S * B, N, C), their noise levels (S * B,), and the conditions repeated, S = len(SIGMAS) + 1.
    """
    count = len(condition)
    shape = field.backbone.latent_shape(condition.height, condition.width)
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(condition.prompt)
    clean = noise - field(noise, torch.ones(count).to(noise), condition).to(noise)
    states = [noise, *(torch.lerp(clean, noise, sigma) for sigma in SIGMAS)]
    levels = torch.tensor([1.0, *SIGMAS]).repeat_interleave(count).to(noise)
    index = torch.arange(count, device=noise.device).repeat(len(states))
    return torch.cat(states), levels, condition.rows(index)


@torch.no_grad()
def relative_difference(field: Field, other: Field, condition: Condition) -> float:
    """|v_field - v_other| / |v_other|, root mean squares over probe states of the other field."""
    state, sigma, repeated = probe_states(other, condition)
    theirs = other(state, sigma, repeated).float()
    ours = field(state, sigma, repeated).float()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def _on_purpose(recipe: Recipe, teacher: str) -> bool:
    """Whether the recipe itself says that a teacher is the student's start."""
    start, spec = recipe.distill.start, recipe.teachers[teacher]
    starts_as_base = start == "base" or isinstance(recipe.teachers[start], BaseTeacher)
    return spec.guidance is None and (teacher == start or (starts_as_base and isinstance(spec, BaseTeacher)))


def check_teachers_differ(
    recipe: Recipe, backbone: Backbone, fields: Mapping[str, Field], encoded: EncodedRecords
) -> list[Finding]:
    """Tasks whose teacher is what the student is before its first step."""
    device = next(backbone.transformer.parameters()).device
    start = recipe.distill.start
    student = _starting_field(recipe, backbone, fields)
    found = []
    rows_of = encoded.rows_by_task()
    for task, spec in recipe.tasks.items():
        teacher = fields[spec.teacher]
        rows = encoded.shape_groups(rows_of.get(task, []))
        if not rows:
            continue
        picked = [rows_of[task][position] for position in rows[-1][:PROBES]]
        with teacher.resident(), student.resident():
            difference = relative_difference(teacher, student, encoded.condition(picked, device))
        figures = f"relative velocity difference {difference:.2g} on {len(picked)} training conditions"
        if difference >= SAME:
            text = f"task {task!r}: teacher {spec.teacher!r} and the student differ, {figures}"
            found.append(Finding("note", "teacher equals student", text))
        elif _on_purpose(recipe, spec.teacher):
            text = (
                f"task {task!r}: the student starts as its teacher {spec.teacher!r} ({figures}); "
                "this task keeps what is there"
            )
            found.append(Finding("note", "teacher equals student", text))
        else:
            text = (
                f"task {task!r}: teacher {spec.teacher!r} is the same field as the student's start, {start!r} "
                f"({figures}): nothing to learn; check its weights, or let {start!r} teach this task"
            )
            found.append(Finding("error", "teacher equals student", text))
    return found


def _starting_field(recipe: Recipe, backbone: Backbone, fields: Mapping[str, Field]) -> VelocityField:
    """What the student is before its first step: the base, or a teacher's weights (without its guidance)."""
    field = fields.get(recipe.distill.start)
    if field is None:
        return VelocityField("base", backbone, backbone.transformer)
    return field.field if isinstance(field, GuidedField) else field


def check_proofs(recipe: Recipe, facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Teachers that are no better than the base on a task they serve, by the figures of their own products.

    Args:
        recipe: tasks, their teachers and metrics.
        facts: of each teacher's product, by name.
    """
    found = []
    for task, spec in recipe.tasks.items():
        teacher = recipe.teachers[spec.teacher]
        if isinstance(teacher, BaseTeacher) and teacher.guidance is None:
            continue
        if isinstance(teacher, ChampionTeacher):  # it holds the task as it is, and was judged when it was registered
            continue
        scores = facts[spec.teacher].get("scores", {}).get(task, {})
        metric = next((name for name in spec.metrics if name in scores.get("teacher", {})), spec.metrics[0])
        mine, base = (scores.get(who, {}).get(metric) for who in ("teacher", "base"))
        if mine is None or base is None:
            text = f"task {task!r}: teacher {spec.teacher!r} has no figures of {metric}; finetune it again to prove it"
            found.append(Finding("warning", "teacher no better", text))
            continue
        figures = f"{metric} {mine:.4g}, the base {base:.4g}"
        if mine > base:
            found.append(Finding("note", "teacher no better", f"task {task!r}: teacher {spec.teacher!r}: {figures}"))
        else:
            text = f"task {task!r}: teacher {spec.teacher!r} is no better than the base ({figures}); train it longer"
            level = "error" if spec.gates else "warning"  # without gates the metric is there to be looked at
            found.append(Finding(level, "teacher no better", text))
    return found


# ----------------------------------------------------------------------------------------------------------- pipelines

# Keys that say who wrote a file and how, not what is in it.
_ASIDE = {
    "_name_or_path",
    "_diffusers_version",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "force_upcast",
    "sample_size",
}
# A teacher's transformer may be larger or smaller than the base's; these say how it is called.
_INTERFACE = ("_class_name", "in_channels", "out_channels", "patch_size", "joint_attention_dim", "guidance_embeds")
_SMALL = 2**16  # numbers: tensors up to this size are compared in full


def check_pipeline(teacher: str, folder: Path, base: Path) -> list[Finding]:
    """Whether a teacher given as a whole pipeline speaks the base's language: latents, noise levels, prompts.

    Any other folder (a transformer alone, a LoRA, a field folder) has nothing to compare and gives no finding.

    Args:
        teacher: its name.
        folder: the teacher's, as the recipe names it.
        base: the base's pipeline folder.
    """
    folder, base = Path(folder), Path(base)
    if not (folder / "model_index.json").is_file():
        return []
    parts = {
        "vae": ("latent space", "config.json", None),
        "scheduler": ("scheduler", "scheduler_config.json", None),
        "text_encoder": ("text encoder", "config.json", None),
        "transformer": ("latent space", "config.json", _INTERFACE),
    }
    found = []
    for part, (what, file, keys) in parts.items():
        theirs, ours = folder / part / file, base / part / file
        if theirs.is_file() and ours.is_file():
            found += _differing_keys(teacher, what, f"{part}/{file}", read_json(theirs), read_json(ours), keys)
    for part, what, largest in (("vae", "latent space", None), ("text_encoder", "text encoder", _SMALL)):
        name = _differing_tensor(folder / part, base / part, largest)
        if name is not None:
            text = f"teacher {teacher!r}: another {what} than the base: the weights of {part} differ, first {name}"
            found.append(Finding("error", what, text))
    return found


def _differing_keys(
    teacher: str, what: str, file: str, theirs: dict, ours: dict, keys: tuple[str, ...] | None
) -> list[Finding]:
    compared = sorted((set(theirs) | set(ours)) - _ASIDE) if keys is None else keys

    return [
        Finding(
            "error",
            what,
            f"teacher {teacher!r}: another {what} than the base: {file}, {key} is "
            f"{theirs.get(key)!r}, the base has {ours.get(key)!r}",
        )
        for key in compared
        if theirs.get(key) != ours.get(key)
    ]


def _tensors(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor of a component folder."""
    place: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            place |= dict.fromkeys(file.keys(), path)
    return place


def _hashes(place: dict[str, Path]) -> list[str]:
    return [hash_file(path) for path in sorted(set(place.values()))]


def _differing_tensor(theirs: Path, ours: Path, largest: int | None) -> str | None:
    """The first tensor two component folders do not share, up to the rounding of another dtype; None if none."""
    left, right = _tensors(theirs), _tensors(ours)
    if not left or not right:
        return None
    if set(left) != set(right):
        return min(set(left) ^ set(right))
    if largest is None and _hashes(left) == _hashes(right):
        return None
    for name in sorted(left):
        with safe_open(left[name], framework="pt") as a, safe_open(right[name], framework="pt") as b:
            shape = a.get_slice(name).get_shape()
            if shape != b.get_slice(name).get_shape():
                return name
            if largest is not None and torch.Size(shape).numel() > largest:
                continue
            if not torch.allclose(a.get_tensor(name).float(), b.get_tensor(name).float(), rtol=1e-2, atol=1e-5):
                return name
    return None


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class MemoryEstimate:
    """What one process will need besides what it holds already, in bytes.

    Attributes:
        parameters: how many weights train (a number, not bytes).
        weights: the copy of them that trains, in float32.
        gradients: of them.
        optimizer: its state.
        averages: the moving average, and the best state if the recipe selects one.
        activations: what the largest forward pass keeps for its backward pass; roughly.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int

    @property
    def sure(self) -> int:
        """What is needed whatever the activations turn out to be."""
        return self.weights + self.gradients + self.optimizer + self.averages

    @property
    def total(self) -> int:
        """All of it."""
        return self.sure + self.activations

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "averages": self.averages,
            "activations": self.activations,
        }
        text = ", ".join(f"{name} {say_size(value)}" for name, value in parts.items() if value)
        return f"{say_size(self.total)} ({text}) for {self.parameters:,} trained weights"


def say_size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


# Bytes of optimizer state a trained weight; Muon keeps one float32 for matrices and AdamW's two for the rest.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 4}


def trained_parameters(network: nn.Module, spec: DistillRecipe, default_targets: str) -> int:
    """How many weights a recipe trains: all of the network's own, or those of a LoRA that is not there yet."""
    if spec.trainable == "full":
        return sum(p.numel() for name, p in network.named_parameters() if ".lora_" not in name)
    targets = list(spec.lora.targets) if spec.lora.targets else default_targets
    count = 0
    for name, module in network.named_modules():
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(inner, nn.Linear) and _is_target(name, targets):
            count += spec.lora.rank * (inner.in_features + inner.out_features)
    return count


def _is_target(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a regular expression over the whole name, or suffixes."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def activation_bytes(field: VelocityField, condition: Condition, autocast: bool) -> int:
    """What a forward pass of these samples keeps for a backward pass through all weights: counted, and not kept."""
    network, own = field.network, set()
    seen: dict[int, StorageWeakRef] = {}
    sizes: list[int] = []

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        # A place that was freed and taken again is another tensor, which training would keep beside the first.
        if place not in own and (place not in seen or seen[place].expired()):
            seen[place] = StorageWeakRef(storage)
            sizes.append(storage.nbytes())

    shape = field.backbone.latent_shape(condition.height, condition.width)
    state = torch.zeros(len(condition), *shape).to(condition.prompt)
    sigma = torch.full((len(condition),), 0.5).to(state)
    flags = [p.requires_grad for p in network.parameters()]
    with ExitStack() as stack:
        stack.enter_context(field.resident())
        held = [t for t in [*network.parameters(), *network.buffers()] if not is_traceable_wrapper_subclass(t)]
        own |= {t.untyped_storage().data_ptr() for t in held}
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda _: None))
        stack.enter_context(torch.autocast(state.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False))
        try:
            network.requires_grad_(True)
            field(state, sigma, condition)
        finally:
            for parameter, flag in zip(network.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)
    return sum(sizes)


def estimate_memory(
    recipe: Recipe, backbone: Backbone, student: VelocityField, encoded: EncodedRecords, processes: int
) -> MemoryEstimate:
    """Estimate what training adds, with measured forward passes of one and two samples of each sequence length."""
    spec = recipe.distill
    parameters = trained_parameters(student.network, spec, backbone.lora_targets)
    share = processes if spec.parallel == "shard" else 1
    held = parameters * 4 // share
    copies = (spec.ema is not None) + (spec.select is not None)
    samples = -(-spec.batch // (processes * spec.accumulate))
    device = next(backbone.transformer.parameters()).device
    low = spec.precision == "bfloat16"
    # Two measurements: what grows with the samples, and what does not (weights that autocast turned to 16 bits).
    once, one = 0, 0
    for rows in _largest_groups(encoded):
        single, double = (activation_bytes(student, encoded.condition(rows[:1] * n, device), low) for n in (1, 2))
        once, one = max(once, 2 * single - double), max(one, double - single)
    if spec.activation_checkpointing:
        # Each block's input (2 of the about 34 bytes a number that a block keeps, Korthikanti et al. 2022, section 4)
        # and one block in full.
        blocks = max(len(repeated_blocks(student.network)), 1)
        once, one = once // blocks, one // blocks + one * 2 // 34
    return MemoryEstimate(
        parameters=parameters,
        weights=held,
        gradients=held,
        optimizer=parameters * STATE_BYTES[spec.optimizer] // share,
        averages=held * copies,
        activations=once + one * samples,
    )


def _largest_groups(encoded: EncodedRecords) -> list[list[int]]:
    """Rows of the largest pictures that have no source, and of those that have one."""
    largest: dict[bool, list[int]] = {}
    for rows in encoded.shape_groups(list(range(len(encoded.tasks)))):
        edits = int(encoded.source_row[rows[0]]) >= 0
        if edits not in largest or math.prod(encoded.size(rows[0])) > math.prod(encoded.size(largest[edits][0])):
            largest[edits] = rows
    return list(largest.values())


def available_memory(device: torch.device) -> int:
    """Bytes this process can still take on its device; in a container, within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def check_memory(estimate: MemoryEstimate, available: int) -> list[Finding]:
    """The estimate against what there is; activations are an estimate, so only what is sure can be an error."""
    figures = f"training needs about {estimate} more, {say_size(available)} are available"
    mend = (
        "train a LoRA, set activation_checkpointing: true, a larger accumulate, optimizer: adamw8bit, or "
        "model.offload and model.dtype: bfloat16"
    )
    if estimate.sure > available:
        return [Finding("error", "memory", f"not enough memory: {figures}; {mend}")]
    if estimate.total > 0.9 * available:
        return [Finding("warning", "memory", f"memory may not suffice: {figures}; {mend}")]
    return [Finding("note", "memory", f"memory: {figures}")]


def preflight(
    recipe: Recipe,
    backbone: Backbone,
    base: Path,
    fields: Mapping[str, Field],
    facts: Mapping[str, Mapping[str, Any]],
    encoded: EncodedRecords,
    counts: Mapping[str, Mapping[str, int]],
    processes: int = 1,
) -> list[Finding]:
    """Every check, before the first step of a distillation. A merge trains nothing and needs no memory for it.

    Args:
        recipe: the run.
        backbone: the base, loaded.
        base: its pipeline folder.
        fields: the teachers, loaded, by name.
        facts: of the teachers' products, by name.
        encoded: training records of the recipe's tasks.
        counts: the dataset's records by task and split.
        processes: how many train together.
    """
    found = check_records(recipe, counts, encoded) + check_proofs(recipe, facts)
    for name in fields:
        path = getattr(recipe.teachers[name], "path", None)
        if path is not None:
            found += check_pipeline(name, Path(path), base)
    found += check_teachers_differ(recipe, backbone, fields, encoded)
    if recipe.distill.method in MERGES:
        return found
    student = _starting_field(recipe, backbone, fields)
    estimate = estimate_memory(recipe, backbone, student, encoded, processes)
    return found + check_memory(estimate, available_memory(next(backbone.transformer.parameters()).device))
