"""Pictures drawn from a field and scored record by record."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field as attribute

import numpy as np

from danceopd.backbones.base import Backbone
from danceopd.config.recipe import EvaluateRecipe
from danceopd.data.encoded import EncodedRecords
from danceopd.data.records import Record
from danceopd.evaluation.metrics import metric
from danceopd.evaluation.metrics.tools import Tools
from danceopd.flow.fields import Field
from danceopd.flow.sampling import sample_pixels, to_uint8
from danceopd.training.processes import ALONE, Processes

Values = dict[str, list[float]]


@dataclass(frozen=True)
class Scored:
    """What one field drew for some records, and how good it is.

    Attributes:
        pictures: (N, H, W, 3) uint8, in the records' order.
        values: per metric one value per record; NaN where there is none: of a metric that was skipped, or of a set.
        whole: the value of each metric of a set.
    """

    pictures: np.ndarray
    values: Values
    whole: dict[str, float] = attribute(default_factory=dict)

    @property
    def means(self) -> dict[str, float]:
        """The mean of each metric, or its value over the set; NaN if any value is, or if there are no records."""
        return {name: mean(values) for name, values in self.values.items()} | self.whole


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def record_seed(seed: int, record_id: str) -> int:
    """The noise seed of one record under one recipe seed: 63 bits of a stable hash."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{record_id}".encode()).digest()[:8], "big") >> 1


def draw_field(
    field: Field, encoded: EncodedRecords, ids: list[str], spec: EvaluateRecipe, processes: Processes = ALONE
) -> np.ndarray:
    """Draw one picture per record: (N, H, W, 3) uint8, in the records' order.

    Args:
        field: any velocity field.
        encoded: the N records; tasks with and without a source image may be mixed.
        ids: the N records' ids, which decide their noise.
        spec: steps, batch size and seed.
        processes: those that draw together, every one with the same arguments; only the main one has all pictures then,
            and the others an array of which just their own are drawn.
    """
    device = next(field.backbone.transformer.parameters()).device  # an offloaded field's own weights lie elsewhere
    pictures = np.empty((len(ids), encoded.height, encoded.width, 3), dtype=np.uint8)
    mine: list[int] = []
    for group in encoded.shape_groups(list(range(len(ids)))):
        own = group[processes.rank :: processes.count]
        for start in range(0, len(own), spec.batch):
            rows = own[start : start + spec.batch]
            seeds = [record_seed(spec.seed, ids[row]) for row in rows]
            pictures[rows] = to_uint8(sample_pixels(field, encoded.condition(rows, device), seeds, spec.steps))
        mine += own
    if processes.count > 1:
        _make_passes_of_others(field)
        for rows, drawn in processes.collect((mine, pictures[mine])):
            pictures[rows] = drawn
    return pictures


def _make_passes_of_others(field: Field) -> None:
    """Where processes share the weights, one that has drawn its share passes through them with those that have not."""
    from danceopd.training.fsdp import shares_of

    if (shares := shares_of(field.backbone.transformer)) is not None:
        shares.lockstep.end()


def skipped_metrics(names: Iterable[str], tools: Tools) -> dict[str, str]:
    """The metrics that cannot be measured on this machine, each with the reason.

    Raises:
        UserError: if a metric is unknown.
    """
    return {name: reason for name in names if (reason := tools.lacks(metric(name).tools)) is not None}


def paid(name: str) -> bool:
    return "judge" in metric(name).tools


def score_pictures(
    pictures: np.ndarray, records: list[Record], metrics: tuple[str, ...], tools: Tools | None = None
) -> Scored:
    """Score pictures (N, H, W, 3) uint8 by metrics; those whose tools are not there get NaN.

    Raises:
        UserError: if a metric is unknown, or a record lacks what it needs.
    """
    tools = tools or Tools(EvaluateRecipe())
    skipped = skipped_metrics(metrics, tools)
    values: Values = {name: [math.nan] * len(records) for name in metrics}
    whole = {}
    for name in metrics:
        if name in skipped:
            continue
        found = metric(name).score(pictures, records, tools)
        if metric(name).of_set:
            whole[name] = found[0] if found else math.nan
        else:
            values[name] = found
    return Scored(pictures, values, whole)


def score_records(
    field: Field,
    encoded: EncodedRecords,
    records: list[Record],
    metrics: tuple[str, ...],
    spec: EvaluateRecipe,
    tools: Tools | None = None,
    processes: Processes = ALONE,
) -> Scored:
    """Draw records with a field and score the pictures.

    Args:
        field: any velocity field.
        encoded: `records`, encoded in the same order.
        records: what to draw.
        metrics: names from `danceopd.evaluation.metrics.METRICS`.
        spec: steps, batch size and seed; networks and judge.
        tools: opened by an earlier call; default: opened now, from `spec`.
        processes: those that draw together (`draw_field`), of which this is the main one.

    Raises:
        UserError: if a metric is unknown, or a record lacks what it needs.
    """
    pictures = draw_field(field, encoded, [r.id for r in records], spec, processes)
    return score_pictures(pictures, records, metrics, tools or Tools(spec))


def score_means(
    field: Field,
    encoded: EncodedRecords,
    records: list[Record],
    metrics: tuple[str, ...],
    spec: EvaluateRecipe,
    tools: Tools,
    processes: Processes,
) -> dict[str, float]:
    """The means of `score_records`, in every process: each draws its share, and the main one scores and asks a judge.

    The arguments are those of `score_records`.
    """
    if processes.main:
        return processes.from_main(score_records(field, encoded, records, metrics, spec, tools, processes).means)
    draw_field(field, encoded, [record.id for record in records], spec, processes)
    return processes.from_main(None)


def score_ceiling(
    backbone: Backbone,
    encoded: EncodedRecords,
    records: list[Record],
    metrics: tuple[str, ...],
    batch: int,
    tools: Tools | None = None,
) -> dict[str, float]:
    """The means that the autoencoder's own reconstruction of the targets reaches: no field can draw better.

    Records without a target are left out; with none at all the answer is empty. The judge is not asked: it is paid.
    """
    rows = [row for row in range(len(records)) if encoded.target_row[row] >= 0]
    metrics = tuple(name for name in metrics if not paid(name) and not (metric(name).of_set and len(rows) == 1))
    if not rows:
        return {}
    device = next(backbone.transformer.parameters()).device
    parts = []
    for start in range(0, len(rows), batch):
        latents = encoded.target(rows[start : start + batch], device)
        parts.append(to_uint8(backbone.decode(latents, encoded.height, encoded.width).float()))
    return score_pictures(np.concatenate(parts), [records[row] for row in rows], metrics, tools).means
