"""A run's records as encodings: prompts and pictures through the base's encoders, kept for the next run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.config.recipe import FinetunedTeacher, Recipe
from danceopd.errors import UserError
from danceopd.files import content_key
from danceopd.workspace import Product, main_first

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from torch import Tensor

    from danceopd.backbones.base import Backbone
    from danceopd.data.encoded import EncodedRecords, Sizing


def open_backbone(recipe: Recipe, base: Product) -> Backbone:
    from danceopd.backbones import load_backbone
    from danceopd.training.processes import this_process

    return load_backbone(base.pipeline, recipe.model, this_process().device)


def encode_split(
    recipe: Recipe,
    backbone: Backbone,
    base: Product,
    data: Product,
    workspace: Path,
    split: str,
    targets: bool,
    tasks: tuple[str, ...],
    limit: int | None = None,
    own_sizes: bool = False,
) -> tuple[list, EncodedRecords]:
    from danceopd.data.assemble import open_dataset
    from danceopd.data.encoded import encode_records

    dataset = open_dataset(Path(data.facts["dataset"]))
    records = [record for task in tasks for record in dataset.records(split, task, limit)]
    cache = Path(workspace) / "cache"
    model, key = recipe.model, encoding_key(recipe, base)
    with main_first():
        encoded = encode_records(backbone, records, model.height, model.width, cache, key, targets, own_sizes)
    return records, encoded


def encode_train(
    recipe: Recipe,
    backbone: Backbone,
    base: Product,
    data: Product,
    workspace: Path,
    targets: bool,
    tasks: tuple[str, ...],
) -> EncodedRecords:
    """The training records of some tasks, encoded; through the recipe's cache if it names one."""
    if recipe.cache is None:
        own = recipe.model.sizes == "own"
        return encode_split(recipe, backbone, base, data, workspace, "train", targets, tasks, own_sizes=own)[1]
    from danceopd.data.assemble import open_dataset
    from danceopd.data.cache import EncodingCache, encode_cached, fetch_cache
    from danceopd.training.processes import this_process

    with main_first():
        cache = EncodingCache(fetch_cache(recipe.cache, workspace))
    dataset, processes = open_dataset(Path(data.facts["dataset"])), this_process()
    return encode_cached(
        backbone,
        lambda: dataset.stream("train", tasks),
        _sizing(recipe),
        cache,
        encoding_key(recipe, base),
        targets,
        (processes.rank, processes.count),
        processes.wait,
    )


def cache_encodings(
    recipe: Recipe, base: Product, data: Product, folder: Path, share: tuple[int, int] | None = None
) -> dict[str, int]:
    """Encode what a recipe's training reads into a cache; returns the rows there by group.

    Args:
        recipe: whose training records, tasks and picture size.
        base: whose encoders.
        data: the dataset.
        folder: the cache; what is there is kept and used.
        share: this worker's number and how many there are; default: those of the processes started together.
    """
    from danceopd.data.assemble import open_dataset
    from danceopd.data.cache import EncodingCache, fill_cache, wanted_by
    from danceopd.methods.table import needs_targets
    from danceopd.training.processes import this_process

    backbone, processes, sizing = open_backbone(recipe, base), this_process(), _sizing(recipe)
    dataset, cache = open_dataset(Path(data.facts["dataset"])), EncodingCache(folder)
    taught = {t.task for t in recipe.teachers.values() if isinstance(t, FinetunedTeacher)}
    with_targets = tuple(recipe.tasks) if needs_targets(recipe.distill) else tuple(sorted(taught))
    for tasks, targets in ((tuple(recipe.tasks), False), (with_targets, True)):
        stream = functools.partial(dataset.stream, "train", tasks)
        wanted = wanted_by(backbone, stream(), targets, sizing)
        fill_cache(
            backbone,
            wanted,
            stream,
            sizing,
            cache,
            encoding_key(recipe, base),
            targets,
            share or (processes.rank, processes.count),
        )
    processes.wait()
    return cache.write_index()


def _sizing(recipe: Recipe) -> Sizing:
    from danceopd.data.encoded import Sizing

    return Sizing(recipe.model.height, recipe.model.width, recipe.model.sizes == "own")


def encoding_key(recipe: Recipe, base: Product) -> str:
    model = recipe.model
    return content_key(base.digest, model.max_sequence_length, model.text_encoder_out_layers)


def encode_empty_prompt(recipe: Recipe, backbone: Backbone, base: Product, workspace: Path) -> Tensor:
    from danceopd.data.encoded import encode_empty

    with main_first():
        return encode_empty(backbone, Path(workspace) / "cache", encoding_key(recipe, base))


def require_targets(encoded: EncodedRecords, task: str) -> None:
    lacking = sum(row < 0 for row, of in zip(encoded.target_row.tolist(), encoded.tasks, strict=True) if of == task)
    if lacking:
        raise UserError(
            f"task {task!r}: {lacking} training records have no target image; training on data needs one each"
        )


def open_held_out(
    recipe: Recipe, backbone: Backbone, base: Product, data: Product, workspace: Path, split: str, limit: int
) -> dict[str, tuple[list, EncodedRecords]]:
    """At most `limit` held-out records of each of the recipe's tasks, plain and encoded."""
    return {t: encode_split(recipe, backbone, base, data, workspace, split, False, (t,), limit) for t in recipe.tasks}
