"""The memory and the disk that each phase of a run takes, told from configurations alone.

Weights are counted once in the dtype they lie in, what trains with its gradients and optimizer, and what the backward
pass is kept for; not the interpreter and its libraries, which take some hundred MiB of a CPU's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from danceopd.backbones.base import Backbone
from danceopd.backbones.bases import INDEX, components
from danceopd.config.recipe import FinetunedTeacher, FinetuneRecipe, Recipe, TrainRecipe
from danceopd.preflight.fake_pass import Samples
from danceopd.preflight.memory import BYTES, STATE_BYTES, MemoryEstimate, averages_of, estimate_training, sharing
from danceopd.text import read_object


@dataclass(frozen=True)
class Phase:
    """What one phase takes.

    Attributes:
        name: of the phase.
        memory: bytes on each GPU, or in each process on a CPU.
        disk: bytes that it leaves in the workspace, or needs there until it ends; of encodings, which grow with the
            data, None.
    """

    name: str
    memory: int
    disk: int | None


@dataclass(frozen=True)
class Parts:
    """Bytes of a base's parts in memory: its transformer's, its text encoders', its autoencoder's."""

    transformer: int
    encoders: int
    autoencoder: int

    @property
    def coding(self) -> int:
        """What encodes prompts and pictures."""
        return self.encoders + self.autoencoder


def parts_of(recipe: Recipe, outline: Backbone, folder: Path) -> Parts:
    """A base's parts.

    Args:
        recipe: names the dtype of the frozen base.
        outline: the base without weights.
        folder: of its configurations.
    """
    count = sum(p.numel() for p in outline.transformer.parameters())
    vae = outline.pipeline.vae
    index = read_object(folder / INDEX)
    names = [name for name in components(folder / INDEX) if name.startswith("text_encoder")]
    encoders = sum(_encoder_bytes(folder / name, str(index[name][1])) for name in names)
    return Parts(count * BYTES[recipe.model.dtype], encoders, sum(4 * p.numel() for p in vae.parameters()))


def _encoder_bytes(folder: Path, kind: str) -> int:
    """Bytes of a text encoder's weights in the dtype of its files, by its configuration; 0 if that tells nothing."""
    of: Any = getattr(transformers, kind, None)
    if of is None or not (folder / "config.json").is_file():
        return 0
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with init_empty_weights():
        network: nn.Module = of(config)
    network.tie_weights()  # type: ignore[operator]
    dtype = config.dtype or torch.float32
    each = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    return sum(p.numel() for p in network.parameters()) * each


def phases_of(
    recipe: Recipe, outline: Backbone, folder: Path, held: int, training: MemoryEstimate, processes: int
) -> list[Phase]:
    """Every phase of a run, in order; `load` is the start of fine-tuning and of distilling, before encoders go.

    Args:
        recipe: the run.
        outline: its base without weights.
        folder: of the base's configurations.
        held: bytes of frozen weights on each GPU while it is distilled: the base's and the teachers'.
        training: what distilling adds to them.
        processes: how many distill together.
    """
    base, spec = parts_of(recipe, outline, folder), recipe.distill
    exported = base.transformer + base.coding
    found = [Phase("encode", base.coding, None), Phase("load", base.transformer + base.coding, 0)]
    counted: dict[Any, MemoryEstimate] = {}
    for name, teacher in recipe.teachers.items():
        if isinstance(teacher, FinetunedTeacher):
            passes = _passes(name, teacher.train, recipe)
            decides = teacher.train.model_copy(update={"lr": 1.0, "steps": 1, "seed": 0}), passes
            if (key := repr(decides)) not in counted:  # a pass on shapes takes seconds
                counted[key] = estimate_training(teacher.train, outline, [passes], 1, recipe.model.dtype)
            found += _taught(name, teacher.train, counted[key], base)
    share, lora = sharing(spec, processes), spec.trainable == "lora"
    student = 4 * training.parameters
    saves = spec.keep_checkpoints * saved(spec, training.parameters)
    found.append(Phase("distill", held + training.total, saves))
    # Layer by layer in float32, and of a LoRA its files once more for diffusers and for ComfyUI.
    written = exported + (3 * student if lora else 0)
    found.append(Phase("export", held + student // share + _raised(outline) + _copied(outline, share), written))
    beside = student if lora and recipe.model.quantize is None else base.transformer
    found.append(Phase("evaluate", held * share + beside + base.coding, 0))
    found.append(Phase("register", 0, 2 * exported))  # MLflow's copy, and that of its scratch folder
    return [*found, Phase("generate", exported, 0)]


def _passes(name: str, spec: FinetuneRecipe, recipe: Recipe) -> Samples:
    """What passes a teacher together while it is fine-tuned, which is one process's work."""
    edits = any(task.needs_source for task in recipe.tasks.values() if task.teacher == name)
    return Samples(-(-spec.batch // spec.accumulate), recipe.model.height, recipe.model.width, edits)


def _taught(name: str, spec: FinetuneRecipe, training: MemoryEstimate, base: Parts) -> list[Phase]:
    """The fine-tuning of a teacher, and its proof."""
    weights = base.transformer + base.autoencoder
    saves = spec.keep_checkpoints * saved(spec, training.parameters)
    own = 4 * training.parameters
    return [
        Phase(f"fine-tune {name}", weights + training.total, saves),
        Phase(f"prove {name}", weights + own, own),
    ]


def saved(spec: TrainRecipe, parameters: int) -> int:
    """Bytes of one save: what trains, its averages and the optimizer's state."""
    return parameters * (4 + STATE_BYTES[spec.optimizer] + 4 * averages_of(spec))


def _copied(outline: Backbone, share: int) -> int:
    """Bytes on each process of a shared student's copy in float32, by which its export is proved."""
    return 4 * sum(p.numel() for p in outline.transformer.parameters()) // share if share > 1 else 0


def _raised(outline: Backbone) -> int:
    """Bytes in float32 of what an export raises at once: the largest layer, its change by the LoRA and their sum."""
    return 3 * 4 * max(p.numel() for p in outline.transformer.parameters())
