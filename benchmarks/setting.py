"""The contest's setting: one small-world base at several transformer sizes, three LoRA teachers, encoded records."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from danceopd.backbones import load_backbone
from danceopd.backbones.bases import shipped_folder
from danceopd.backbones.flux2_klein import Flux2Klein
from danceopd.backbones.lora import adapter_parameters, add_lora, save_lora
from danceopd.config.recipe import DistillRecipe, LoraRecipe
from danceopd.data import world
from danceopd.data.encode import encode_records
from danceopd.data.encoded import EncodedRecords
from danceopd.data.records import Record
from danceopd.data.sampler import TaskSampler
from danceopd.flow.fields import VelocityField
from danceopd.methods.base import Distillation, Group
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.groups import draw_groups
from danceopd.methods.queries import query_window
from danceopd.methods.routing import task_counts
from danceopd.pretraining.world_base import SHAPE, new_transformer
from danceopd.training.learner import Learner, new_learner

STEPS = 16
STUDENT = "student"
TEACHER_OF = {task: f"{task}_teacher" for task in world.TASKS}
WEIGHTS = dict.fromkeys(world.TASKS, 1.0)
RECORDS = 48  # a task


@dataclass(frozen=True)
class Size:
    """A transformer and how much of it is measured.

    Attributes:
        shape: heads, width of a head, double blocks, single blocks; None: the shipped base as it is.
        batch: samples per update.
        rounds: in which every side takes part.
        ladder: rounds in which the plain loop's variants take part.
    """

    shape: tuple[int, int, int, int] | None
    batch: int
    rounds: int
    ladder: int


SIZES = {
    "nano": Size((2, 16, 1, 1), 6, 1, 1),  # seconds: to try a script out
    "tiny": Size(None, 24, 3, 3),
    "mid": Size((5, 64, 2, 4), 24, 3, 1),
    "large": Size((11, 64, 3, 5), 12, 2, 0),
}


@dataclass(frozen=True)
class Setting:
    """One base with the student and the teachers as adapters on it, ready to train.

    Attributes:
        backbone: the engine's.
        records: training records, in the order of the encoded ones.
        distillation: what stays the same from update to update.
        learner: the engine's student.
        bare: the same transformer without any adapter, for the plain loop to copy.
        rank: of every LoRA.
    """

    backbone: Flux2Klein
    records: list[Record]
    distillation: Distillation
    learner: Learner
    bare: nn.Module
    rank: int

    @property
    def encoded(self) -> EncodedRecords:
        return self.distillation.encoded

    @property
    def grid(self) -> Tensor:
        """The sampling grid of its pictures, (STEPS + 1,)."""
        return self.distillation.grid(SHAPE.height, SHAPE.width)

    def groups(self, window: str, batch: int, seed: int) -> list[Group]:
        """The groups of one mixed batch: the same for the same arguments."""
        sampler = TaskSampler(self.encoded.rows_by_task(), seed)
        rows, tags = sampler.draw(task_counts(WEIGHTS, batch))
        generator = torch.Generator().manual_seed(seed)
        method = DanceOPD()
        return draw_groups(
            self.distillation, method, self.learner, rows, tags, WEIGHTS, query_window(window), generator
        )

    def export_teachers(self, folder: Path) -> None:
        """Write each teacher's LoRA as a PEFT folder of its name."""
        for name in self.distillation.teachers:
            save_lora(self.backbone.transformer, name, folder / name)


def recipe(rank: int, batch: int) -> DistillRecipe:
    """A LoRA student on a 16-step grid."""
    lora = LoraRecipe(rank=rank, alpha=rank)
    return DistillRecipe(
        trainable="lora", lora=lora, lr=1e-5, steps=1000, batch=batch, rollout_steps=STEPS, checkpoint_every=0
    )


def load_base(size: Size) -> Flux2Klein:
    """The shipped world base, with a random transformer of another size if `size` says so."""
    backbone = load_backbone(shipped_folder("world"), SHAPE, "cpu")
    if size.shape is not None:
        config = backbone.transformer.config
        network = new_transformer(config.joint_attention_dim, config.in_channels, *size.shape)
        backbone.pipeline.transformer = network.requires_grad_(False).eval()
    return backbone


def make_setting(size: Size) -> Setting:
    """Load the base, add three LoRA teachers and a LoRA student, encode records of all tasks."""
    backbone = load_base(size)
    network = backbone.transformer
    bare = copy.deepcopy(network)
    # As 96 is to FLUX.2-klein's width of 3072: small beside the base, as LoRAs are.
    rank = max(2, network.inner_dim // 32)
    for seed, name in enumerate(TEACHER_OF.values()):
        add_lora(network, name, LoraRecipe(rank=rank, alpha=rank), backbone.lora_targets, seed)
        wake(network, name, seed)
    records = list(world.world_records({task: {"train": RECORDS} for task in world.TASKS}))
    encoded = encode_records(backbone, records, SHAPE.height, SHAPE.width, None, "", targets=False)
    learner = new_learner(backbone, STUDENT, recipe(rank, size.batch))
    wake(network, STUDENT, len(TEACHER_OF))
    teachers = {name: VelocityField(name, backbone, network, adapter=name) for name in TEACHER_OF.values()}
    distillation = Distillation(backbone, encoded, teachers, TEACHER_OF, STEPS)
    return Setting(backbone, records, distillation, learner, bare, rank)


@torch.no_grad()
def wake(network: nn.Module, name: str, seed: int) -> None:
    """Give a fresh adapter, which is no change at all, random weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(network, name):
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.02 * draw.to(parameter))
