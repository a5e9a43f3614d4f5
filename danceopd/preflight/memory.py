"""The memory a distillation takes on each GPU, and how much there is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from danceopd.backbones.base import Backbone, repeated_blocks
from danceopd.config.recipe import DistillRecipe, Recipe, TrainRecipe
from danceopd.data.encoded import EncodedRecords
from danceopd.preflight.fake_pass import Samples, kept_bytes
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
        gathered: where processes share the weights, the blocks that are whole for a moment, and their gradients.
        merged: where rollouts follow a merged copy, the weights that it does not share with the base.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    gathered: int = 0
    merged: int = 0

    @property
    def sure(self) -> int:
        """What is needed whatever the activations turn out to be."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.gathered + self.merged

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
            "whole blocks": self.gathered,
            "merged copy": self.merged,
            "activations": self.activations,
        }
        text = ", ".join(f"{name} {say_size(value)}" for name, value in parts.items() if value)
        return f"{say_size(self.total)} ({text}) for {self.parameters:,} trained weights"


def say_size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "float8": 1}  # of a frozen weight


# Bytes of optimizer state per trained weight; Muon keeps one float32 for matrices and AdamW's two for the rest.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 4}


def trained_parameters(network: nn.Module, spec: TrainRecipe, default_targets: str) -> int:
    """How many weights a recipe trains: all of the network's own, or those of a LoRA that is not there yet."""
    if spec.trainable == "full":
        return sum(p.numel() for name, p in network.named_parameters() if ".lora_" not in name)
    return sum(_lora_sizes(network, spec, default_targets).values())


def _lora_sizes(network: nn.Module, spec: TrainRecipe, default_targets: str) -> dict[str, int]:
    """Weights of a LoRA by the module that it is added to."""
    targets = list(spec.lora.targets) if spec.lora.targets else default_targets
    found = {}
    for name, module in network.named_modules():
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(inner, nn.Linear) and _is_target(name, targets):
            found[name] = spec.lora.rank * (inner.in_features + inner.out_features)
    return found


def merged_bytes(network: nn.Module, spec: TrainRecipe, default_targets: str, frozen: int) -> int:
    """What a merged copy holds of its own: the weights that the LoRA changes, `frozen` bytes each."""
    if not isinstance(spec, DistillRecipe) or spec.rollout_weights == "own":
        return 0
    count = 0
    for name in _lora_sizes(network, spec, default_targets):
        module = network.get_submodule(name)
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        count += inner.get_parameter("weight").numel()
    return frozen * count


def gathered_bytes(network: nn.Module, spec: TrainRecipe, default_targets: str, frozen: int) -> int:
    """What is whole for a moment, of weights that processes share, in the backward pass; at most.

    The part of the network that is no block is whole all the while. Of the blocks one is computed with, one is fetched,
    and its message lies beside it. A trained block's gradients are whole until they are added up, in a message that
    lies beside them, too, in float32.

    Args:
        network: without weights, and without the adapter that will train.
        spec: what trains, and its precision.
        default_targets: of a LoRA.
        frozen: bytes of a frozen weight.
    """
    own, trained = _by_unit(network, spec, default_targets)
    rest, block = own.pop(""), max(own.values(), default=0)
    rest_trained, block_trained = trained.pop(""), max(trained.values(), default=0)
    if spec.trainable == "full":
        each = 2 if spec.precision == "bfloat16" else 4
        weights, gradients = each * (rest + 3 * block), each * (rest_trained + block_trained)
    else:
        weights = frozen * (rest + 3 * block) + 4 * (rest_trained + 3 * block_trained)
        gradients = 4 * (rest_trained + block_trained)
    return weights + gradients + 4 * max(rest_trained, block_trained)


def _by_unit(network: nn.Module, spec: TrainRecipe, default_targets: str) -> tuple[dict[str, int], dict[str, int]]:
    """Weights of each block, and of the rest (under no name): its own, and those of them or of a LoRA that train."""
    blocks = {id(block) for block in repeated_blocks(network)}
    paths = [path for path, module in network.named_modules() if id(module) in blocks]
    own, adapters = dict.fromkeys(["", *paths], 0), dict.fromkeys(["", *paths], 0)

    def unit(name: str) -> str:
        return next((path for path in paths if name.startswith(f"{path}.")), "")

    for name, weight in network.named_parameters():
        if ".lora_" not in name:
            own[unit(name)] += weight.numel()
    if spec.trainable == "full":
        return own, dict(own)
    for name, count in _lora_sizes(network, spec, default_targets).items():
        adapters[unit(name)] += count
    return own, adapters


def _is_target(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a regular expression over the whole name, or suffixes."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def samples_at_once(spec: TrainRecipe, processes: int) -> int:
    """Samples that one process passes through what it trains together."""
    return -(-spec.batch // (processes * spec.accumulate))


def estimate_memory(recipe: Recipe, outline: Backbone, shapes: Iterable[Samples], processes: int) -> MemoryEstimate:
    """What distilling adds on each process, told from shapes alone (see `estimate_training`)."""
    return estimate_training(recipe.distill, outline, shapes, processes, recipe.model.dtype)


def estimate_training(
    spec: TrainRecipe, outline: Backbone, shapes: Iterable[Samples], processes: int, dtype: str
) -> MemoryEstimate:
    """What training adds on each process, told from shapes alone.

    Args:
        spec: the recipe's section that decides.
        outline: the base's back end without weights.
        shapes: of what passes the network together, each as many as one process takes at once.
        processes: how many train together.
        dtype: of the frozen base.
    """
    parameters = trained_parameters(outline.transformer, spec, outline.lora_targets)
    share = sharing(spec, processes)
    held = parameters * 4 // share
    targets = outline.lora_targets
    return MemoryEstimate(
        parameters=parameters,
        weights=held,
        gradients=held,
        optimizer=parameters * STATE_BYTES[spec.optimizer] // share,
        averages=held * averages_of(spec),
        activations=max(kept_bytes(outline, spec, samples) for samples in shapes),
        gathered=0 if share == 1 else gathered_bytes(outline.transformer, spec, targets, BYTES[dtype]),
        merged=merged_bytes(outline.transformer, spec, targets, BYTES[dtype]),
    )


def averages_of(spec: TrainRecipe) -> int:
    """How many more copies of what trains are kept: the moving average, and the best state if one is selected."""
    return (spec.ema is not None) + (isinstance(spec, DistillRecipe) and spec.select is not None)


def sharing(spec: TrainRecipe, processes: int) -> int:
    """How many processes share one copy of what a section trains and asks."""
    return processes if spec.parallel == "shard" else 1


def largest_shapes(encoded: EncodedRecords, count: int) -> list[Samples]:
    """`count` samples of the largest pictures that have no source, and of those that have one."""
    largest: dict[bool, tuple[int, int]] = {}
    for rows in encoded.shape_groups(list(range(len(encoded.tasks)))):
        edits, size = int(encoded.source_row[rows[0]]) >= 0, encoded.size(rows[0])
        if edits not in largest or math.prod(size) > math.prod(largest[edits]):
            largest[edits] = size
    return [Samples(count, *size, edits) for edits, size in largest.items()]


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
        "train a LoRA, set activation_checkpointing: true, a larger accumulate, optimizer: adamw8bit, "
        "model.offload and model.dtype: bfloat16, or parallel: shard on more GPUs"
    )
    if estimate.sure > available:
        return [Finding("error", "memory", f"not enough memory: {figures}; {mend}")]
    if estimate.total > 0.9 * available:
        return [Finding("warning", "memory", f"memory may not suffice: {figures}; {mend}")]
    return [Finding("note", "memory", f"memory: {figures}")]
