"""Every field on every task, on held-out records from the same noise: scores, retention, gates.

A sample's noise depends on the recipe's seed and the record's id alone, so any two fields answer the same question from
the same start, and their values can be compared pair by pair.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from dataclasses import field as attribute
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from danceopd.backbones.base import Backbone
from danceopd.config.recipe import EvaluateRecipe, Recipe
from danceopd.config.sampling import Sampling
from danceopd.data.assemble import DatasetFolder, open_dataset
from danceopd.data.encode import encode_records
from danceopd.data.encoded import EncodedRecords
from danceopd.data.records import Record, spread
from danceopd.errors import UserError
from danceopd.evaluation.canaries import judge_canaries
from danceopd.evaluation.conditions import groups_of, note_conditions
from danceopd.evaluation.drift import path_drift
from danceopd.evaluation.gates import Scores, gate_allowance, judge, retention, score_of
from danceopd.evaluation.metrics import metric, read_picture
from danceopd.evaluation.metrics.editing import edit_mask
from danceopd.evaluation.metrics.tools import Tools
from danceopd.evaluation.names import BASE, STUDENT
from danceopd.evaluation.samplings import Samplings
from danceopd.evaluation.scoring import (
    Scored,
    Values,
    draw_field,
    finite,
    mean,
    paid,
    record_seed,
    score_ceiling,
    score_pictures,
    score_records,
    skipped_metrics,
)
from danceopd.evaluation.statistics import bootstrap_interval, compare
from danceopd.flow.fields import Field
from danceopd.flow.guidance import guided_at
from danceopd.training.processes import ALONE, Processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One record as the report shows it.

    Attributes:
        record: the held-out record.
        source: its source image, (H, W, 3) uint8, or None.
        target: its target image, or None.
        drawn: what each field drew.
        scores: each field's value of each metric on this record.
    """

    record: Record
    source: np.ndarray | None
    target: np.ndarray | None
    drawn: dict[str, np.ndarray]
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        metrics: what `metrics.json` holds; a figure that is not finite is None.
        values: what `values.json` holds: {field: {task: {metric: [..]}}, "ids": {task: [..]}, "groups": {task: [..]}}.
        examples: the records to show, per task.
        worst: those that fall furthest below the teacher's, per task; none where none does.
    """

    metrics: dict
    values: dict
    examples: dict[str, list[Example]]
    worst: dict[str, list[Example]] = attribute(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the student holds every gate of the recipe."""
        return self.metrics["passed"]


@dataclass(frozen=True)
class _TaskResult:
    records: list[Record]
    ceiling: dict[str, float]
    values: dict[str, Values]
    examples: list[Example]
    worst: list[Example] = attribute(default_factory=list)
    drift: dict | None = None
    forwards: int = 0
    whole: dict[str, dict[str, float]] = attribute(default_factory=dict)

    @cached_property
    def groups(self) -> list[str]:
        return groups_of(self.records)

    def means(self, field: str) -> dict[str, float]:
        return Scored(np.empty(0), self.values[field], self.whole.get(field, {})).means


def _held_out(recipe: Recipe, dataset: DatasetFolder, skipped: Mapping[str, str]) -> dict[str, list[Record]]:
    """The records of each task and benchmark, checked before the first picture is drawn."""
    found = {}
    for task, spec in recipe.tasks.items():
        found[task] = records = _records_of(recipe, task, dataset)
        for name in spec.metrics:
            if name not in skipped:
                metric(name).check(records)
        if any("mask" in metric(name).needs for name in spec.metrics):
            for record in records:
                edit_mask(record, recipe.model.height, recipe.model.width)
    return found


def _records_of(recipe: Recipe, task: str, dataset: DatasetFolder) -> list[Record]:
    spec, benchmark = recipe.evaluate, recipe.evaluate.benchmarks.get(task)
    if benchmark is None:
        records = dataset.records(spec.split, task, spec.per_task)
        if not records:
            raise UserError(
                f"dataset {dataset.folder}: no '{spec.split}' records of task {task!r}; "
                f"add some, or choose another evaluate.split"
            )
        return records
    records = open_dataset(Path(benchmark.input)).records("test")
    if not records:
        raise UserError(f"evaluate.benchmarks.{task}: {benchmark.input} has no 'test' records; import it again")
    for record in records:
        if (record.source is not None) != recipe.tasks[task].needs_source:
            has, wants = ("has a", "draws") if record.source is not None else ("has no", "edits a source")
            raise UserError(
                f"evaluate.benchmarks.{task}: record {record.id!r} {has} source, and task "
                f"{benchmark.task!r} {wants}; name another task"
            )
    return [records[row] for row in _spread(len(records), benchmark.limit or len(records))]


@dataclass(frozen=True)
class _Drawn:
    """A field as it is drawn, and the `evaluate` section with its number of steps."""

    field: Field
    spec: EvaluateRecipe

    @property
    def identity(self) -> Hashable:
        """Equal where the pictures are."""
        return self.field.identity, self.spec.steps


def _score_fields(
    fields: dict[str, _Drawn],
    task: str,
    encoded: EncodedRecords,
    records: list[Record],
    recipe: Recipe,
    tools: Tools,
    processes: Processes = ALONE,
) -> dict[str, Scored]:
    scored: dict[str, Scored] = {}
    first: dict[Hashable, str] = {}
    for name, drawn in fields.items():
        same = first.setdefault(drawn.identity, name)
        if same != name:
            scored[name] = scored[same]
            log.info("evaluate: %s on %s: the same field as %s", name, task, same)
            continue
        started = time.monotonic()
        scored[name] = score_records(
            drawn.field, encoded, records, recipe.tasks[task].metrics, drawn.spec, tools, processes
        )
        figures = ", ".join(f"{key} {value:.4g}" for key, value in scored[name].means.items())
        log.info(
            "evaluate: %s on %s: %s (%d records, %.1f s)", name, task, figures, len(records), time.monotonic() - started
        )
    return scored


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` places spread evenly over `count`: chosen by where they lie, not by how well they came out."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(wanted, count))})


def measured_of(metrics: Iterable[str], skipped: Iterable[str]) -> list[str]:
    """The metrics that have one value per record: neither skipped nor of a set; if that leaves none, the first."""
    metrics, skipped = list(metrics), set(skipped)
    return [n for n in metrics if n not in skipped and not metric(n).of_set] or metrics[:1]


def judged_by(metrics: Iterable[str], skipped: Iterable[str] = ()) -> str:
    """The metric a single sample is judged by: a task's first that is right or wrong, else its first."""
    known = measured_of(metrics, skipped)
    return next((name for name in known if metric(name).unit == "rate"), known[0])


def _worst(
    scored: dict[str, Scored], teacher: str, metrics: tuple[str, ...], wanted: int, skipped: Iterable[str] = ()
) -> list[int]:
    """Up to `wanted` places where the student falls furthest below its teacher; ties go by the task's first metric."""

    def below(name: str) -> np.ndarray:
        ours, theirs = (np.asarray(scored[who].values[name], dtype=np.float64) for who in (STUDENT, teacher))
        return np.nan_to_num(theirs - ours, nan=np.inf)

    mark, known = judged_by(metrics, skipped), measured_of(metrics, skipped)
    if mark in skipped or metric(mark).of_set:
        return []
    lost, first = below(mark), below(known[0])
    order = np.lexsort((-first, -lost))
    return [int(row) for row in order[:wanted] if lost[row] > 0]


def _examples(
    records: list[Record], scored: dict[str, Scored], size: tuple[int, int], rows: list[int]
) -> list[Example]:
    def image(record: Record, field: str) -> np.ndarray | None:
        data = getattr(record, field)
        return None if data is None else read_picture(data, *size, f"record {record.id!r}, field '{field}'")

    return [
        Example(
            records[row],
            image(records[row], "source"),
            image(records[row], "target"),
            {name: part.pictures[row] for name, part in scored.items()},
            {name: {key: values[row] for key, values in part.values.items()} for name, part in scored.items()},
        )
        for row in rows
    ]


def _distinct(fields: Mapping[str, _Drawn]) -> list[_Drawn]:
    """Each different field once, in the order in which they are scored."""
    first: dict[Hashable, _Drawn] = {}
    for drawn in fields.values():
        first.setdefault(drawn.identity, drawn)
    return list(first.values())


def _forwards(fields: dict[str, _Drawn], records: int) -> int:
    """Samples that go through a network when each different field draws the records."""
    return records * sum(drawn.spec.steps * drawn.field.forwards for drawn in _distinct(fields))


def _drift(
    recipe: Recipe,
    task: str,
    fields: dict[str, _Drawn],
    encoded: EncodedRecords,
    records: list[Record],
    scored: dict[str, Scored],
    tools: Tools,
    processes: Processes,
) -> tuple[dict, int]:
    """The task's drift section of the metrics over a few of the records, and the forwards it took.

    Pictures of fewer steps are scored by the task's first metric that has one value per record and costs nothing.
    """
    spec, taught = recipe.evaluate, recipe.tasks[task].teacher
    assert spec.drift is not None  # only a recipe with this section comes here
    known = measured_of(recipe.tasks[task].metrics, skipped_metrics(recipe.tasks[task].metrics, tools))
    first = next((name for name in known if not paid(name)), known[0])
    rows = _drift_rows(recipe, records)
    records, encoded = [records[row] for row in rows], encoded.subset(rows)
    ids = [record.id for record in records]
    seeds = [record_seed(spec.seed, name) for name in ids]
    student, teacher = fields[STUDENT], fields[taught]
    small = max(1, round(teacher.spec.steps / student.spec.steps))
    found = path_drift(student.field, teacher.field, encoded, seeds, student.spec.steps, spec.batch, small)
    forwards, by_steps = found.forwards, {}
    sides = _drift_sides(fields, taught)
    for steps in sorted(set(spec.drift.steps)):
        figures = {}
        for side, name in sides.items():
            drawn = fields[name]
            if steps == drawn.spec.steps:  # these were drawn to be scored
                values = [scored[name].values[first][row] for row in rows]
            else:
                pictures = draw_field(drawn.field, encoded, ids, _in_steps(spec, steps), processes)
                free = not paid(first)
                values = score_pictures(pictures, records, (first,), tools).values[first] if free else []
                forwards += len(ids) * steps * drawn.field.forwards
            figures[side] = finite(mean(values))
        by_steps[str(steps)] = figures
    facts = {
        "records": len(records),
        "metric": first,
        "unit": metric(first).unit,
        "small_steps": small,
        "sigmas": found.sigmas,
        "drift": [finite(v) for v in found.drift],
        "velocity_error": [finite(v) for v in found.velocity_error],
        "by_steps": by_steps,
    }
    log.info(
        "evaluate: the student's path on %s ends %.3g from its teacher's (%d records)",
        task,
        found.drift[-1],
        len(records),
    )
    return facts, forwards


def _drift_rows(recipe: Recipe, records: list[Record]) -> list[int]:
    assert recipe.evaluate.drift is not None
    return spread([record.id for record in records], recipe.evaluate.drift.records)


def _drift_sides(fields: Mapping[str, _Drawn], taught: str) -> dict[str, str]:
    """Whose pictures of fewer steps are compared, by what each is to the task."""
    sides = {"student": STUDENT, "teacher": taught}
    if fields[BASE].field.identity != fields[taught].field.identity:
        sides["base"] = BASE
    return sides


def _in_steps(spec: EvaluateRecipe, steps: int) -> EvaluateRecipe:
    return spec.model_copy(update={"steps": steps})


def _encode(
    recipe: Recipe,
    backbone: Backbone,
    held_out: Mapping[str, list[Record]],
    cache: Path | None,
    base_key: str,
    processes: Processes,
) -> dict[str, EncodedRecords]:
    """The held-out records of every task, encoded by the main process; the others find them in the cache."""
    size = (recipe.model.height, recipe.model.width)
    with processes.main_first():
        return {
            task: encode_records(backbone, records, *size, cache, base_key, targets=True)
            for task, records in held_out.items()
        }


def draw_along(
    recipe: Recipe,
    backbone: Backbone,
    fields: dict[str, Field],
    dataset: DatasetFolder,
    cache: Path | None,
    base_key: str,
    samplings: Samplings,
    processes: Processes,
    when_encoded: Callable[[], object] = lambda: None,
) -> None:
    """What every process but the main one does while that one runs `evaluate`: draw its share of the pictures.

    The arguments are those of `evaluate`; the same fields draw the same records in the same order.
    """
    recipe = recipe.with_benchmarks()
    spec = recipe.evaluate
    drawn = {name: _Drawn(*samplings.drawn(name, field)) for name, field in fields.items()}
    held_out = {task: _records_of(recipe, task, dataset) for task in recipe.tasks}
    encodings = _encode(recipe, backbone, held_out, cache, base_key, processes)
    when_encoded()
    for task, records in held_out.items():
        encoded, ids = encodings.pop(task), [record.id for record in records]
        for one in _distinct(drawn):
            draw_field(one.field, encoded, ids, one.spec, processes)
        if spec.drift is None or task in spec.benchmarks:
            continue
        rows = _drift_rows(recipe, records)
        few, of = encoded.subset(rows), [ids[row] for row in rows]
        for steps in sorted(set(spec.drift.steps)):
            for name in _drift_sides(drawn, recipe.tasks[task].teacher).values():
                if steps != drawn[name].spec.steps:
                    draw_field(drawn[name].field, few, of, _in_steps(spec, steps), processes)


def evaluate(
    recipe: Recipe,
    backbone: Backbone,
    fields: dict[str, Field],
    dataset: DatasetFolder,
    cache: Path | None,
    base_key: str,
    judged: str = "",
    samplings: Samplings | None = None,
    when_encoded: Callable[[], object] = lambda: None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Score every field on every task of the recipe.

    Args:
        recipe: its `evaluate` section says which records are drawn and how; its tasks bring metrics and gates.
        backbone: the base, whose autoencoder sets the ceiling.
        fields: "base", every teacher by its name, and "student". Two names of one field are drawn once.
        dataset: where the held-out records lie.
        cache: folder for encoded records, or None.
        base_key: identity of the base, part of the cache's key.
        judged: name of a folder of the cache in which the judge's answers of this evaluation are kept, so that none
            from another day is held against one from today.
        samplings: how each field is drawn; default: as the recipe says.
        when_encoded: called before the first picture is drawn, when the text encoders are not needed any more.
        processes: of which this is the main one; the others call `draw_along`.

    Raises:
        UserError: if a task has no held-out records, a metric is unknown, or a record lacks what a metric needs.
    """
    missing = {BASE, STUDENT, *(task.teacher for task in recipe.tasks.values())} - set(fields)
    if missing:
        raise ValueError(f"evaluate needs the field(s) {', '.join(sorted(missing))}")
    recipe = recipe.with_benchmarks()
    spec, size = recipe.evaluate, (recipe.model.height, recipe.model.width)
    device = next(backbone.transformer.parameters()).device
    tools = open_tools(recipe, device, cache, judged)
    skipped = skipped_metrics({n: None for task in recipe.tasks.values() for n in task.metrics}, tools)
    for name, reason in skipped.items():
        log.warning("evaluate: %s is not measured: %s", name, reason)
    results: dict[str, _TaskResult] = {}
    known = samplings or Samplings(recipe, lambda: backbone.encode_prompts([""])[0])
    drawn = {name: _Drawn(*known.drawn(name, field)) for name, field in fields.items()}
    held_out = _held_out(recipe, dataset, skipped)
    canaries = judge_canaries(tools, recipe, held_out, skipped)
    encodings = _encode(recipe, backbone, held_out, cache, base_key, processes)
    when_encoded()
    for task, records in held_out.items():
        metrics, encoded = recipe.tasks[task].metrics, encodings.pop(task)
        ceiling = score_ceiling(backbone, encoded, records, metrics, spec.batch, tools)
        scored = _score_fields(drawn, task, encoded, records, recipe, tools, processes)
        worst = _worst(scored, recipe.tasks[task].teacher, metrics, spec.worst, skipped)
        drift, forwards = None, _forwards(drawn, len(records))
        if spec.drift is not None and task not in spec.benchmarks:
            drift, more = _drift(recipe, task, drawn, encoded, records, scored, tools, processes)
            forwards += more
        results[task] = _TaskResult(
            records,
            ceiling,
            {name: part.values for name, part in scored.items()},
            _examples(records, scored, size, _spread(len(records), spec.pictures)),
            _examples(records, scored, size, worst),
            drift,
            forwards,
            {name: part.whole for name, part in scored.items()},
        )
    return Evaluation(
        _metrics(recipe, list(fields), results, skipped, tools.judge_usage)
        | {"canaries": canaries, "sampling": {name: known.of(name).model_dump(mode="json") for name in fields}},
        _values(list(fields), results),
        {task: result.examples for task, result in results.items()},
        {task: result.worst for task, result in results.items()},
    )


def open_tools(recipe: Recipe, device: torch.device, cache: Path | None, judged: str) -> Tools:
    """The tools of an evaluation; see `evaluate`."""
    return Tools(recipe.evaluate, device, None if cache is None else Path(cache) / "judge" / judged)


def measure_field(
    recipe: Recipe,
    field: Field,
    dataset: DatasetFolder,
    cache: Path | None,
    base_key: str,
    judged: str = "",
    stated: Sampling | None = None,
) -> tuple[dict, dict]:
    """One field's figures on the held-out records, as `evaluate` gives a student's: (metrics, values).

    There are no gates, intervals and comparisons among them. The arguments are those of `evaluate`; `stated` is how the
    field says that it is drawn, default: in the recipe's steps, without guidance.

    Raises:
        UserError: if a task has no held-out records, a metric is unknown, or a record lacks what a metric needs.
    """
    recipe = recipe.with_benchmarks()
    size = (recipe.model.height, recipe.model.width)
    tools = open_tools(recipe, next(field.backbone.transformer.parameters()).device, cache, judged)
    skipped = skipped_metrics({n: None for task in recipe.tasks.values() for n in task.metrics}, tools)
    held_out = _held_out(recipe, dataset, skipped)
    canaries = judge_canaries(tools, recipe, held_out, skipped)
    scored = {}
    stated = stated or Sampling(steps=recipe.evaluate.steps)
    guided = guided_at(field, stated.guidance, lambda: field.backbone.encode_prompts([""])[0])
    drawn = _Drawn(guided, recipe.evaluate.model_copy(update={"steps": stated.steps}))
    for task, records in held_out.items():
        encoded = encode_records(field.backbone, records, *size, cache, base_key, targets=True)
        scored[task] = _score_fields({STUDENT: drawn}, task, encoded, records, recipe, tools)[STUDENT]
    metrics = note_conditions(recipe, held_out, skipped) | {
        "scores": {STUDENT: {t: {n: finite(v) for n, v in found.means.items()} for t, found in scored.items()}},
        "records": {task: len(records) for task, records in held_out.items()},
        "judge": tools.judge_usage,
        "canaries": canaries,
        "sampling": {STUDENT: stated.model_dump(mode="json")},
    }
    values: dict = {STUDENT: {t: {n: _row(part) for n, part in found.values.items()} for t, found in scored.items()}}
    return metrics, values | {"ids": {task: [r.id for r in records] for task, records in held_out.items()}}


def _metrics(
    recipe: Recipe,
    fields: list[str],
    results: dict[str, _TaskResult],
    skipped: Mapping[str, str] = MappingProxyType({}),
    usage: dict | None = None,
) -> dict:
    scores: Scores = {
        field: {
            task: {name: finite(value) for name, value in result.means(field).items()}
            for task, result in results.items()
        }
        for field in fields
    }
    intervals = _intervals(recipe, fields, results)
    verdicts = [g | {"interval": intervals[STUDENT][g["task"]][g["metric"]]} for g in judge(recipe, scores, skipped)]
    return note_conditions(recipe, {task: result.records for task, result in results.items()}, skipped) | {
        "recipe": recipe.name,
        "split": recipe.evaluate.split,
        "records": {task: len(result.records) for task, result in results.items()},
        "units": {name: metric(name).unit for task in recipe.tasks.values() for name in task.metrics},
        "skipped": dict(skipped),
        "judge": usage,
        "benchmarks": {
            name: {"task": b.task, "content": open_dataset(Path(b.input)).content}
            for name, b in recipe.evaluate.benchmarks.items()
        },
        "primary": {task: measured_of(spec.metrics, skipped)[0] for task, spec in recipe.tasks.items()},
        "teacher_of": {task: spec.teacher for task, spec in recipe.tasks.items()},
        "ceiling": {
            task: {name: finite(value) for name, value in result.ceiling.items()} for task, result in results.items()
        },
        "scores": scores,
        "intervals": intervals,
        "statistics": {"confidence": recipe.evaluate.confidence, "resamples": recipe.evaluate.resamples},
        "comparisons": {"teacher": _against_teachers(recipe, results, scores)},
        "retention": retention(recipe, scores),
        "gates": verdicts,
        "passed": all(verdict["passed"] for verdict in verdicts),
        "drift": {task: result.drift for task, result in results.items() if result.drift is not None},
        "forwards": sum(result.forwards for result in results.values()),
        "by_novelty": {task: part for task, result in results.items() if (part := _by_novelty(result))},
    }


def _intervals(
    recipe: Recipe, fields: list[str], results: dict[str, _TaskResult]
) -> dict[str, dict[str, dict[str, list[float] | None]]]:
    """The interval [low, high] of every mean; None where it is undefined."""
    spec = recipe.evaluate

    def interval(values: list[float], groups: list[str]) -> list[float] | None:
        found = bootstrap_interval(values, spec.resamples, spec.confidence, np.random.default_rng(spec.seed), groups)
        return None if found is None else list(found)

    return {
        name: {
            task: {key: interval(values, result.groups) for key, values in result.values[name].items()}
            for task, result in results.items()
        }
        for name in fields
    }


def _against_teachers(recipe: Recipe, results: dict[str, _TaskResult], scores: Scores) -> dict:
    """The student beside each task's teacher, paired by record; the margin is what the gate allows."""
    spec = recipe.evaluate
    table: dict[str, dict] = {}
    for task, result in results.items():
        teacher = recipe.tasks[task].teacher
        gates = {gate.metric: gate for gate in recipe.tasks[task].gates}
        for name, values in result.values[STUDENT].items():
            bar = score_of(scores, teacher, task, name)
            margin = gate_allowance(gates[name], bar) if name in gates and bar is not None else None
            found = compare(
                values,
                result.values[teacher][name],
                teacher,
                margin,
                spec.resamples,
                spec.confidence,
                np.random.default_rng(spec.seed),
                result.groups,
            )
            table.setdefault(task, {})[name] = None if found is None else asdict(found)
    return table


def _row(values: list[float]) -> list[float | None]:
    return [None if finite(v) is None else round(v, 4) for v in values]


def _values(fields: list[str], results: dict[str, _TaskResult]) -> dict:
    values: dict = {
        field: {
            task: {name: _row(part) for name, part in result.values[field].items()} for task, result in results.items()
        }
        for field in fields
    }
    ids = {task: [r.id for r in result.records] for task, result in results.items()}
    return values | {"ids": ids, "groups": {task: result.groups for task, result in results.items()}}


def _by_novelty(result: _TaskResult) -> dict[str, dict[str, float | None]]:
    """The student's means over each kind of novelty, or of a benchmark's task, for records that name theirs."""
    rows: dict[str, list[int]] = {}
    for number, record in enumerate(result.records):
        facts = record.facts()
        novelty = facts.get("novelty", facts.get("kind"))
        if novelty is not None:
            rows.setdefault(str(novelty), []).append(number)
    return {
        novelty: {name: finite(mean([values[i] for i in part])) for name, values in result.values[STUDENT].items()}
        for novelty, part in sorted(rows.items())
    }
