"""The memory a distillation takes on each GPU, and how much there is."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # quantized weights have no storage

from danceopd.backbones.base import Backbone, Condition, repeated_blocks
from danceopd.config.recipe import DistillRecipe, Recipe
from danceopd.data.encoded import EncodedRecords
from danceopd.flow.fields import VelocityField
from danceopd.preflight.findings import Finding

CGROUP = Path("/sys/fs/cgroup")


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


# Bytes of optimizer state per trained weight; Muon keeps one float32 for matrices and AdamW's two for the rest.
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


def samples_at_once(spec: DistillRecipe, processes: int) -> int:
    """Samples that one process passes through the student together."""
    return -(-spec.batch // (processes * spec.accumulate))


def training_memory(spec: DistillRecipe, parameters: int, activations: int, processes: int) -> MemoryEstimate:
    """What training adds on each process, whoever counted the activations: a measured pass or a configuration.

    Args:
        spec: the recipe's section.
        parameters: weights that train.
        activations: bytes that the largest forward pass keeps for its backward pass.
        processes: how many train together.
    """
    share = processes if spec.parallel == "shard" else 1
    held = parameters * 4 // share
    return MemoryEstimate(
        parameters=parameters,
        weights=held,
        gradients=held,
        optimizer=parameters * STATE_BYTES[spec.optimizer] // share,
        averages=held * ((spec.ema is not None) + (spec.select is not None)),
        activations=activations,
    )


def estimate_memory(
    recipe: Recipe, backbone: Backbone, student: VelocityField, encoded: EncodedRecords, processes: int
) -> MemoryEstimate:
    """Estimate what training adds, with measured forward passes of one and two samples of each sequence length."""
    spec = recipe.distill
    device = next(backbone.transformer.parameters()).device
    low = spec.precision == "bfloat16"
    # Two measurements: what grows with the samples, and what does not (weights that autocast turned to 16 bits).
    once, one = 0, 0
    for rows in _largest_groups(encoded):
        single, double = (activation_bytes(student, encoded.condition(rows[:1] * n, device), low) for n in (1, 2))
        once, one = max(once, 2 * single - double), max(one, double - single)
    if spec.activation_checkpointing:
        # Each block's input (2 of the about 34 bytes per number that a block keeps, Korthikanti et al. 2022, section 4)
        # and one block in full.
        blocks = max(len(repeated_blocks(student.network)), 1)
        once, one = once // blocks, one // blocks + one * 2 // 34
    parameters = trained_parameters(student.network, spec, backbone.lora_targets)
    return training_memory(spec, parameters, once + one * samples_at_once(spec, processes), processes)


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
