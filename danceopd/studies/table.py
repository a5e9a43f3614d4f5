"""A study's results as tables: means over seeds with intervals, by how much of its teachers a variant retains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
from rich.table import Table
from scipy import stats

from danceopd.config.recipe import Recipe
from danceopd.evaluation.metrics import metric
from danceopd.studies.plan import Study

LEVEL = 0.95
Scores = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: of the values; None if one is missing.
        half: half the width of the 95 % interval of the mean, Student's t; None for fewer than two values.
        values: one per seed.
    """

    mean: float | None
    half: float | None
    values: tuple[float | None, ...]

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.mean is not None and self.half is not None and self.mean - self.half > 0


def estimate(values: list[float | None]) -> Estimate:
    """Mean and t interval of values that are taken as independent and normal."""
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return Estimate(None, None, tuple(values))
    mean, count = math.fsum(known) / len(known), len(known)
    if count < 2:
        return Estimate(mean, None, tuple(values))
    half = stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(known, ddof=1) / math.sqrt(count)
    return Estimate(mean, float(half), tuple(values))


def counted_metrics(recipe: Recipe) -> list[tuple[str, str]]:
    """(task, metric) of every metric that has a gate; of every task's first one, if none has."""
    gated = [(task, gate.metric) for task, spec in recipe.tasks.items() for gate in spec.gates]
    return list(dict.fromkeys(gated)) or [(task, spec.metrics[0]) for task, spec in recipe.tasks.items()]


def retention(scores: Scores, teachers: Scores, counted: list[tuple[str, str]]) -> float | None:
    """Mean of student / teacher over the counted metrics; None where a ratio is undefined."""
    pairs = [(scores[task].get(name), teachers[task].get(name)) for task, name in counted]
    ratios = [student / teacher for student, teacher in pairs if student is not None and teacher]
    return math.fsum(ratios) / len(pairs) if len(ratios) == len(pairs) else None


def summarise(study: Study, recipe: Recipe, results: list[dict], references: dict[int, dict]) -> dict:
    """The whole study as plain data; variants by retention, the best first.

    Args:
        study: what was asked for.
        recipe: of any of its cells, for tasks, metrics and gates.
        results: of the cells there are.
        references: by seed, scores of base and teachers; one and the same where the teachers were made once.
    """
    counted, shown = counted_metrics(recipe), [(t, m) for t, spec in recipe.tasks.items() for m in spec.metrics]
    rows = []
    for variant in study.variants:
        cells = sorted((r for r in results if r["variant"] == variant), key=lambda r: r["seed"])
        if cells:
            kept = {c["seed"]: retention(c["scores"], references[c["seed"]]["teachers"], counted) for c in cells}
            few = _by_steps(study, {c["seed"]: c.get("by_steps", {}) for c in cells}, references, shown)
            rows.append(_row(variant, list(study.variants[variant].set), cells, kept, shown) | {"by_steps": few})
    rows.sort(key=lambda row: -math.inf if row["retention"]["mean"] is None else row["retention"]["mean"], reverse=True)
    for row in rows:
        row["behind"] = asdict(_difference(rows[0], row))
    return {
        "name": study.name,
        "recipe": recipe.name,
        "budget": study.budget.model_dump(mode="json"),
        "seeds": list(study.seeds),
        "split": study.split,
        "records": {task: next(iter(references.values()))["records"][task] for task in recipe.tasks},
        "sampling_steps": recipe.evaluate.steps,
        "at_steps": list(study.at_steps),
        "confidence": LEVEL,
        "counted": counted,
        "metrics": shown,
        "units": {name: metric(name).unit for _, name in shown},
        "teacher_of": {task: spec.teacher for task, spec in recipe.tasks.items()},
        "teachers_made": study.teachers,
        "teachers": _side("teachers", study, references, counted, shown),
        "base": _side("base", study, references, counted, shown),
        "variants": rows,
        "verdict": verdict(rows),
        "cells": len(results),
        "cells_wanted": len(study.variants) * len(study.seeds),
        "code": sorted({cell["code"] for cell in results}),
    }


def _side(side: str, study: Study, references: dict[int, dict], counted: list, shown: list) -> dict:
    """Base or teachers: means over the seeds' own, with intervals; those made once have no scatter."""
    own = list(references.values())[: None if study.teachers == "each_seed" else 1]
    found = {f"{t}/{m}": estimate([one[side][t].get(m) for one in own]) for t, m in shown}
    kept = estimate([retention(one[side], one["teachers"], counted) for one in own])
    scores: Scores = {}
    for task, name in shown:
        scores.setdefault(task, {})[name] = found[f"{task}/{name}"].mean
    few = {seed: one.get("by_steps", {}).get(side, {}) for seed, one in references.items()}
    if study.teachers == "once":
        few = dict(list(few.items())[:1])
    return {
        "scores": scores,
        "halves": {name: one.half for name, one in found.items()},
        "retention": kept.mean,
        "by_steps": _by_steps(study, few, references, shown),
    }


def _by_steps(study: Study, few: dict[int, dict], references: dict[int, dict], shown: list) -> dict[str, dict]:
    """By number of sampling steps and metric: the scores, and how far they lie from the task's teacher's own.

    Args:
        study: names the numbers of steps.
        few: by seed, then number of steps (as text), scores of one field.
        references: by seed; the teachers' scores at the recipe's steps are what is compared with, seed by seed.
        shown: (task, metric).
    """
    found: dict[str, dict] = {}
    for steps in map(str, study.at_steps):
        for task, name in shown:
            values = {seed: scores[steps][task].get(name) for seed, scores in few.items() if steps in scores}
            taught = {seed: references[seed]["teachers"][task].get(name) for seed in values}
            apart = [None if v is None or (t := taught[s]) is None else v - t for s, v in values.items()]
            entry = {"score": asdict(estimate(list(values.values()))), "less_teacher": asdict(estimate(apart))}
            found.setdefault(steps, {})[f"{task}/{name}"] = entry
    return found


def _row(variant: str, settings: list[str], cells: list[dict], kept: dict, shown: list[tuple[str, str]]) -> dict:
    def mean(name: str) -> float | None:
        return estimate([cell[name] for cell in cells]).mean

    return {
        "variant": variant,
        "set": settings,
        "seeds": [cell["seed"] for cell in cells],
        "retention": asdict(estimate(list(kept.values()))),
        "scores": {f"{t}/{m}": asdict(estimate([c["scores"][t].get(m) for c in cells])) for t, m in shown},
        "steps": mean("steps"),
        "forwards_per_sample": mean("forwards_per_sample"),
        "forwards": mean("forwards"),
        "train_seconds": mean("train_seconds"),
    }


def _difference(first: dict, other: dict) -> Estimate:
    """Retention of one variant less another's, paired by seed."""
    left, right = (dict(zip(row["seeds"], row["retention"]["values"], strict=True)) for row in (first, other))
    pairs = [(left[seed], right[seed]) for seed in sorted(set(left) & set(right))]
    return estimate([None if a is None or b is None else a - b for a, b in pairs])


def verdict(rows: list[dict]) -> str:
    """Who wins, and whether the next one can be told apart; rows come sorted, with `behind`."""
    if not rows or rows[0]["retention"]["mean"] is None:
        return "no variant has a result yet"
    first = f"{rows[0]['variant']} retains most: {_retained(rows[0]['retention'])}"
    if len(rows) < 2 or rows[1]["behind"]["mean"] is None:
        return f"{first}."
    gap = Estimate(**rows[1]["behind"])
    mean = rows[1]["behind"]["mean"]
    lead = f"{first}, {100 * mean:.2f} points more than {rows[1]['variant']}"
    if gap.half is None:
        return f"{lead}; one seed in common gives no interval."
    ends = f"{100 * (mean - gap.half):+.2f} to {100 * (mean + gap.half):+.2f}"
    told = "so it leads beyond the seeds' scatter" if gap.above_zero else "so the seeds do not tell the two apart"
    near = [row["variant"] for row in rows[2:] if row["behind"]["half"] and not Estimate(**row["behind"]).above_zero]
    more = f" Nor do they tell it from {', '.join(near)}." if near else ""
    return f"{lead} (paired by seed, 95 % interval {ends}), {told}.{more}"


# ---------------------------------------------------------------------------------------------------------------- text

DIGITS = {"rate": 1, "dB": 2, "index": 4}


def _number(value: float | None, half: float | None, unit: str) -> str:
    if value is None:
        return "n/a"
    scale, sign = (100, " %") if unit == "rate" else (1, "")
    digits = DIGITS.get(unit, 2)
    spread = "" if half is None else f" ± {scale * half:.{digits}f}"
    return f"{scale * value:.{digits}f}{spread}{sign}"


def _retained(kept: dict) -> str:
    if kept["mean"] is None:
        return "n/a"
    spread = "" if kept["half"] is None else f" ± {100 * kept['half']:.2f}"
    return f"{100 * kept['mean']:.2f}{spread} %"


def _plain(value: float | None, digits: int = 0) -> str:
    return "n/a" if value is None else f"{value:,.{digits}f}"


def columns(summary: dict) -> list[str]:
    """Heads of the table; units stand in them or in the cells."""
    units = {name: f" {unit}" if unit == "dB" else "" for name, unit in summary["units"].items()}
    figures = [f"{task} {name}{units[name]}" for task, name in summary["metrics"]]
    return ["variant", "retention", *figures, "forwards per sample", "steps", "training s", "seeds"]


def lines(summary: dict) -> list[list[str]]:
    """The table's rows as text: each variant, then the teachers and the base."""

    def figures(values: Iterable[tuple[float | None, float | None]]) -> list[str]:
        units = [summary["units"][name] for _, name in summary["metrics"]]
        return [_number(*value, unit) for value, unit in zip(values, units, strict=True)]

    rows = []
    for row in summary["variants"]:
        estimates = [row["scores"][f"{task}/{name}"] for task, name in summary["metrics"]]
        found = figures((estimate["mean"], estimate["half"]) for estimate in estimates)
        cost = [_plain(row["forwards_per_sample"], 2), _plain(row["steps"]), _plain(row["train_seconds"])]
        rows.append([row["variant"], _retained(row["retention"]), *found, *cost, str(len(row["seeds"]))])
    for name, label in (("teachers", "(each task's teacher)"), ("base", "(base)")):
        kept = _retained({"mean": summary[name]["retention"], "half": None})
        scores, halves = summary[name]["scores"], summary[name]["halves"]
        found = figures((scores[task].get(metric), halves[f"{task}/{metric}"]) for task, metric in summary["metrics"])
        rows.append([label, kept, *found, *[""] * 4])
    return rows


def steps_lines(summary: dict, task: str, name: str) -> list[list[str]]:
    """One metric by sampling steps: the variants, the teacher and the base, each with its distance from the teacher."""
    unit = summary["units"][name]
    fields = [(row["variant"], row) for row in summary["variants"]]
    fields += [(f"({summary['teacher_of'][task]}, the teacher)", summary["teachers"]), ("(base)", summary["base"])]
    rows = []
    for label, field in fields:
        cells = []
        for steps in summary["at_steps"]:
            entry = field["by_steps"][str(steps)][f"{task}/{name}"]
            score, apart = entry["score"], entry["less_teacher"]
            far = _number(apart["mean"], apart["half"], unit)
            sign = "+" if (apart["mean"] or 0) > 0 else ""
            cells.append(f"{_number(score['mean'], score['half'], unit)} ({sign}{far})")
        rows.append([label, *cells])
    return rows


def _steps_section(summary: dict) -> list[str]:
    steps = summary["at_steps"]
    page = [
        "",
        "## By sampling steps",
        "",
        f"In brackets: less the task's own teacher in {summary['sampling_steps']} steps, paired by seed.",
    ]
    for task, name in summary["metrics"]:
        page += ["", f"| {task} {name} | " + " | ".join(map(str, steps)) + " |", "|---" * (1 + len(steps)) + "|"]
        page += ["| " + " | ".join(line) + " |" for line in steps_lines(summary, task, name)]
    return [*page, "", f"![by sampling steps]({STEPS_PLOT})"]


def definition(summary: dict) -> str:
    """What the table's figures are, in words."""
    counted = ", ".join(f"{task} {name}" for task, name in summary["counted"])
    records = ", ".join(f"{task} {count}" for task, count in summary["records"].items())
    level = f"{100 * summary['confidence']:.0f} %"
    anew = summary["teachers_made"] == "each_seed"
    scatter = "that of teachers and training" if anew else "the scatter of training"
    return (
        f"Retention is the mean of student / teacher over the metrics that have a gate: {counted}. Means over seeds "
        f"{', '.join(map(str, summary['seeds']))} ± half of the {level} interval (Student's t over seeds; the same "
        f"records and the same noise for all, so it holds {scatter} and none of the records). "
        f"{'Every seed has teachers of its own. ' if anew else ''}Scored on "
        f"{summary['split']} records ({records}) at {summary['sampling_steps']} sampling steps."
    )


def markdown(summary: dict) -> str:
    """The study as a Markdown page."""
    head, rows = columns(summary), lines(summary)
    budget = next(f"{count:,} {kind}" for kind, count in summary["budget"].items() if count is not None)
    page = [
        f"# Study {summary['name']}",
        "",
        f"Recipe `{summary['recipe']}`; every cell may spend {budget} on training.",
        "",
        f"**{summary['verdict']}**",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        definition(summary),
        "",
        f"![points with intervals]({PLOT})",
        *(_steps_section(summary) if summary["at_steps"] else []),
        "",
        "Variants:",
        "",
        *(
            f"- {row['variant']}: {'; '.join(f'`{s}`' for s in row['set']) or 'as the recipe'}"
            for row in summary["variants"]
        ),
    ]
    if any(row["forwards"] == 0 for row in summary["variants"]):
        page += [
            "",
            "Without training nothing is drawn at random: the seeds of a merge are equal, and their interval 0.",
        ]
    if summary["cells"] < summary["cells_wanted"]:
        page += ["", f"Not finished: {summary['cells']} of {summary['cells_wanted']} cells."]
    if len(summary["code"]) > 1:
        page += ["", f"The cells were made by {len(summary['code'])} revisions of the code: {summary['code']}."]
    return "\n".join(page) + "\n"


PLOT, STEPS_PLOT = "study.png", "study-steps.png"


def terminal_table(summary: dict) -> Table:
    """The table for a terminal."""
    table = Table(title=f"study {summary['name']}", caption=summary["verdict"])
    for head in columns(summary):
        table.add_column(head.replace(" ", "\n"), justify="left" if head == "variant" else "right", no_wrap=True)
    for row in lines(summary):
        table.add_row(*row)
    return table
