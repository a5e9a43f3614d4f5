"""A run's records as encodings: prompts and pictures through the base's encoders, kept for the next run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.config.recipe import FinetunedTeacher, Recipe, TrainRecipe
from danceopd.errors import UserError
from danceopd.files import content_key
from danceopd.steps.run import Run
from danceopd.workspace import main_first

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from torch import Tensor

    from danceopd.backbones.base import Backbone
    from danceopd.data.assemble import DatasetFolder
    from danceopd.data.encoded import EncodedRecords, Sizing
    from danceopd.data.records import Record


def open_backbone(run: Run, spec: TrainRecipe | None = None) -> Backbone:
    """The run's base, loaded onto this process's device; its transformer only if nobody will share it out.

    Args:
        run: its base and model.
        spec: the section by which something trains on it.
    """
    from danceopd.backbones import load_backbone
    from danceopd.training.fsdp import shares
    from danceopd.training.processes import this_process

    processes = this_process()
    whole = spec is None or not shares(spec, processes)
    return load_backbone(run.base.pipeline, run.recipe.model, processes.device, transformer=whole)


@dataclass(frozen=True)
class Encoder:
    """Encodes a run's records with a backbone; of several processes the main one encodes, the others read.

    Attributes:
        run: whose records and cache.
        backbone: its base, loaded.
    """

    run: Run
    backbone: Backbone

    @property
    def key(self) -> str:
        """A name for all that decides an encoding besides the record."""
        model = self.run.recipe.model
        return content_key(self.run.base.digest, model.max_sequence_length, model.text_encoder_out_layers)

    def dataset(self) -> DatasetFolder:
        """The run's dataset."""
        from danceopd.data.assemble import open_dataset

        return open_dataset(self.run.data.dataset)

    def split(
        self, split: str, tasks: tuple[str, ...], limit: int | None = None
    ) -> tuple[list[Record], EncodedRecords]:
        """A split's records of some tasks, at most `limit` of each, plain and encoded without targets."""
        dataset = self.dataset()
        records = [record for task in tasks for record in dataset.records(split, task, limit)]
        return records, self._encoded(records, targets=False, own_sizes=False)

    def held_out(self, split: str, limit: int) -> dict[str, tuple[list[Record], EncodedRecords]]:
        """At most `limit` held-out records of each of the recipe's tasks, plain and encoded."""
        return {task: self.split(split, (task,), limit) for task in self.run.recipe.tasks}

    def train(self, tasks: tuple[str, ...], targets: bool) -> EncodedRecords:
        """The training records of some tasks, encoded; through the recipe's cache if it names one.

        Raises:
            UserError: if targets are wanted and a record has none.
        """
        encoded = self._train(tasks, targets) if self.run.recipe.cache is None else self._cached(tasks, targets)
        if targets:
            for task in tasks:
                _require_targets(encoded, task)
        return replace(encoded, ids=functools.partial(self._train_ids, tasks))

    def _train_ids(self, tasks: tuple[str, ...], rows: Sequence[int]) -> list[str]:
        """Ids of training records by their rows; the dataset is read for it."""
        wanted = max(rows, default=-1) + 1
        ids = [record.id for record in itertools.islice(self.dataset().stream("train", tasks), wanted)]
        return [ids[row] for row in rows]

    def empty_prompt(self) -> Tensor:
        """The empty prompt's embedding, (L, D)."""
        from danceopd.data.encoded import encode_empty

        with main_first():
            return encode_empty(self.backbone, self.run.cache, self.key)

    def _train(self, tasks: tuple[str, ...], targets: bool) -> EncodedRecords:
        dataset = self.dataset()
        records = [record for task in tasks for record in dataset.records("train", task)]
        return self._encoded(records, targets, own_sizes=self.run.recipe.model.sizes == "own")

    def _encoded(self, records: list[Record], targets: bool, own_sizes: bool) -> EncodedRecords:
        from danceopd.data.encoded import encode_records

        model = self.run.recipe.model
        with main_first():
            return encode_records(
                self.backbone, records, model.height, model.width, self.run.cache, self.key, targets, own_sizes
            )

    def _cached(self, tasks: tuple[str, ...], targets: bool) -> EncodedRecords:
        from danceopd.data.cache import EncodingCache, encode_cached, fetch_cache
        from danceopd.training.processes import this_process

        location = self.run.recipe.cache
        assert location is not None  # else nothing is read from one
        with main_first():
            cache = EncodingCache(fetch_cache(location, self.run.workspace))
        dataset, processes = self.dataset(), this_process()
        stream = functools.partial(dataset.stream, "train", tasks)
        share = (processes.rank, processes.count)
        sizing = sizing_of(self.run.recipe)
        return encode_cached(self.backbone, stream, sizing, cache, self.key, targets, share, processes.wait)


def cache_encodings(run: Run, folder: Path, share: tuple[int, int] | None = None) -> dict[str, int]:
    """Encode what a recipe's training reads into a cache; returns the rows there by group.

    Args:
        run: whose training records, tasks, picture size and encoders.
        folder: the cache; what is there is kept and used.
        share: this worker's number and how many there are; default: those of the processes started together.
    """
    from danceopd.data.cache import EncodingCache, fill_cache, wanted_by
    from danceopd.methods.table import needs_targets
    from danceopd.training.processes import this_process

    recipe, processes = run.recipe, this_process()
    encoder, sizing, cache = Encoder(run, open_backbone(run)), sizing_of(recipe), EncodingCache(folder)
    backbone, dataset = encoder.backbone, encoder.dataset()
    taught = {t.task for t in recipe.teachers.values() if isinstance(t, FinetunedTeacher)}
    with_targets = tuple(recipe.tasks) if needs_targets(recipe.distill) else tuple(sorted(taught))
    mine = share or (processes.rank, processes.count)
    for tasks, targets in ((tuple(recipe.tasks), False), (with_targets, True)):
        stream = functools.partial(dataset.stream, "train", tasks)
        wanted = wanted_by(backbone, stream(), targets, sizing)
        fill_cache(backbone, wanted, stream, sizing, cache, encoder.key, targets, mine)
    processes.wait()
    return cache.write_index()


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
