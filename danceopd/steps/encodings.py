"""A run's records as encodings: prompts and pictures through the base's encoders, kept for the next run."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.backbones.bases import SHIPPED
from danceopd.config.recipe import FinetunedTeacher, Recipe, TrainRecipe
from danceopd.devices import spare_threads
from danceopd.errors import UserError
from danceopd.files import content_key
from danceopd.steps.run import Run
from danceopd.workspace import main_first

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from torch import Tensor

    from danceopd.backbones.base import Backbone
    from danceopd.data.assemble import DatasetFolder
    from danceopd.data.cache import EncodingCache
    from danceopd.data.encoded import EncodedRecords, Sizing
    from danceopd.data.records import Record


LIBRARIES = ("torch", "transformers", "diffusers")  # on which an encoding depends


def open_backbone(run: Run, spec: TrainRecipe | None = None) -> Backbone:
    """The run's base, loaded onto this process's device; its transformer only if nobody will share it out.

    Args:
        run: its base and model.
        spec: the section by which something trains on it.
    """
    from danceopd.backbones import load_backbone
    from danceopd.training.fsdp import shares
    from danceopd.training.processes import this_process

    if run.recipe.model.base in SHIPPED:
        spare_threads()
    processes = this_process()
    whole = spec is None or not shares(spec, processes)
    return load_backbone(run.base.pipeline, run.recipe.model, processes.device, transformer=whole)


@dataclass(frozen=True)
class Encoder:
    """Encodes a run's records with a backbone; training records by all processes, held-out ones by the main one.

    Attributes:
        run: whose records and cache.
        backbone: its base, loaded.
    """

    run: Run
    backbone: Backbone

    @property
    def key(self) -> str:
        """A name for all that decides an encoding besides the record.

        The encoders' own weights, tokenizers and configurations, how prompts are encoded, and the libraries; a base
        with another transformer finds what another encoded. A build's local label (`+cpu`) is left out, so that what
        GPU nodes encoded serves a laptop.
        """
        model = self.run.recipe.model
        libraries = {name: version(name).split("+")[0] for name in LIBRARIES}
        how = (model.max_sequence_length, model.text_encoder_out_layers, model.dtype)
        return content_key(self.run.base.facts["encoders"], *how, libraries)

    def dataset(self) -> DatasetFolder:
        """The run's dataset."""
        from danceopd.data.assemble import open_dataset

        return open_dataset(self.run.data.dataset)

    def split(
        self, split: str, tasks: tuple[str, ...], limit: int | None = None
    ) -> tuple[list[Record], EncodedRecords]:
        """A split's records of some tasks, at most `limit` of each, plain and encoded without targets."""
        from danceopd.data.encode import encode_records

        dataset = self.dataset()
        records = [record for task in tasks for record in dataset.records(split, task, limit)]
        model = self.run.recipe.model
        with main_first():
            encoded = encode_records(
                self.backbone, records, model.height, model.width, self.run.cache, self.key, targets=False
            )
        return records, encoded

    def held_out(self, split: str, limit: int) -> dict[str, tuple[list[Record], EncodedRecords]]:
        """At most `limit` held-out records of each of the recipe's tasks, plain and encoded."""
        return {task: self.split(split, (task,), limit) for task in self.run.recipe.tasks}

    def train(self, tasks: tuple[str, ...], targets: bool) -> EncodedRecords:
        """The training records of some tasks, encoded; they stay on disk, in the recipe's cache or the workspace's.

        Raises:
            UserError: if targets are wanted and a record has none.
        """
        from danceopd.data.cache import fetch_cache
        from danceopd.data.encode import KEPT, encode_cached
        from danceopd.training.processes import this_process

        location, processes = self.run.recipe.cache, this_process()
        with main_first():
            folder = self.run.cache / KEPT if location is None else fetch_cache(location, self.run.workspace)
        table, share = self.dataset().table("train", tasks), (processes.rank, processes.count)
        cache, sizing = open_cache(self.run.recipe, folder), sizing_of(self.run.recipe)
        encoded = encode_cached(self.backbone, table, sizing, cache, self.key, targets, share, processes.wait)
        if targets:
            for task in tasks:
                _require_targets(encoded, task)
        return replace(encoded, ids=functools.partial(table.texts, "id"))

    def empty_prompt(self) -> Tensor:
        """The empty prompt's embedding, (L, D)."""
        from danceopd.data.encode import encode_empty

        with main_first():
            return encode_empty(self.backbone, self.run.cache, self.key)


def cache_encodings(run: Run, folder: Path, share: tuple[int, int] | None = None) -> dict[str, int]:
    """Encode what a recipe's training reads into a cache; returns the rows there by group.

    Args:
        run: whose training records, tasks, picture size and encoders.
        folder: the cache; what is there is kept and used.
        share: this worker's number and how many there are; default: those of the processes started together.
    """
    from danceopd.backbones import load_backbone
    from danceopd.data.encode import fill_cache, wanted_by
    from danceopd.methods.table import needs_targets
    from danceopd.training.processes import this_process

    recipe, processes = run.recipe, this_process()
    reader = load_backbone(run.base.pipeline, recipe.model, processes.device, encodes_only=True)
    encoder, sizing, cache = Encoder(run, reader), sizing_of(recipe), open_cache(recipe, folder)
    backbone, dataset = encoder.backbone, encoder.dataset()
    taught = {t.task for t in recipe.teachers.values() if isinstance(t, FinetunedTeacher)}
    with_targets = tuple(recipe.tasks) if needs_targets(recipe.distill) else tuple(sorted(taught))
    mine = share or (processes.rank, processes.count)
    for tasks, targets in ((tuple(recipe.tasks), False), *([(with_targets, True)] if with_targets else [])):
        wanted = wanted_by(backbone, dataset.table("train", tasks), targets, sizing)
        fill_cache(backbone, wanted, sizing, cache, encoder.key, mine)
    processes.wait()
    return cache.write_index()


def open_cache(recipe: Recipe, folder: Path) -> EncodingCache:
    """A cache that keeps encodings in the dtype in which the recipe's base computes."""
    import torch

    from danceopd.data.cache import EncodingCache

    return EncodingCache(folder, getattr(torch, recipe.model.dtype))


def sizing_of(recipe: Recipe) -> Sizing:
    """The picture sizes a recipe trains at."""
    from danceopd.data.encoded import Sizing

    return Sizing(recipe.model.height, recipe.model.width, recipe.model.sizes == "own")


def _require_targets(encoded: EncodedRecords, task: str) -> None:
    lacking = sum(row < 0 for row, of in zip(encoded.target_row.tolist(), encoded.tasks, strict=True) if of == task)
    if lacking:
        raise UserError(
            f"task {task!r}: {lacking} training records have no target image; training on data needs one each"
        )
