"""An evaluation as files a person opens: a self-contained HTML page, Markdown, picture grids, and figures as JSON.

Everything shown comes from recipes and prompts, which are user input: the page is rendered with autoescape, loads
nothing from anywhere, and its file names are made safe.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from PIL import Image

from danceopd.evaluation.drift import plot_paths
from danceopd.evaluation.evaluate import Evaluation, Example, judged_by
from danceopd.evaluation.grids import fit_scale, picture_grid, resize
from danceopd.evaluation.metrics import metric
from danceopd.evaluation.names import BASE, STUDENT
from danceopd.files import content_key, write_atomic, write_json

_TEMPLATE, _CHAMPION = "report.html.j2", "champion.html.j2"
_MARK = "<!-- beside the champion -->"  # in the page, where a registration tells of it
_PATHS = ("drift", "velocity_error")
_PAGE_SIDE, _GRID_SIDE = 256, 128  # longer side of an embedded picture and of one in a grid file, in pixels
_NONE, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def write_report(evaluation: Evaluation, folder: Path, provenance: dict) -> None:
    """Write `metrics.json`, `values.json`, `grids/<task>.png`, `plots/*.png`, `report.md`, `report.html` into a folder.

    Args:
        evaluation: what to tell.
        folder: made if it is missing; other files in it stay. Each file appears whole.
        provenance: JSON-like facts about the run (recipe, data revision, hashes, code, hardware, seconds). Mappings
            become sections, texts of several lines and deeper trees are folded away.
    """
    folder = Path(folder)
    write_json(folder / "metrics.json", evaluation.metrics)
    write_atomic(folder / "values.json", json.dumps(evaluation.values, separators=(",", ":")) + "\n")
    for task in evaluation.examples:
        write_atomic(folder / grid_path(task), _png(task_grid(evaluation, task)))
    plots = plot_paths(evaluation.metrics["drift"]) if evaluation.metrics.get("drift") else {}
    for name, data in plots.items():
        write_atomic(folder / plot_path(name), data)
    view = _view(evaluation, provenance, plots)
    write_atomic(folder / "report.md", _markdown(view, evaluation))
    write_atomic(folder / "report.html", render_html(view))


def grid_path(task: str) -> str:
    """Where a task's picture grid lies in the report's folder, whatever characters the task's name has."""
    return f"grids/{_safe(task)}.png"


def plot_path(name: str) -> str:
    """Where a plot lies in the report's folder."""
    return f"plots/{_safe(name)}.png"


def _safe(name: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return safe if safe == name else f"{safe}-{content_key(name)[:6]}"


def task_grid(evaluation: Evaluation, task: str) -> Image.Image:
    """The task's examples as one image; wrong samples are outlined."""
    shown = _shown(evaluation, task)
    examples = evaluation.examples[task]
    rows = [[_picture(e, key) for key, _ in shown] for e in examples]
    scale = fit_scale(examples[0].drawn[STUDENT], _GRID_SIDE)
    wrong = {
        (r, c)
        for r, example in enumerate(examples)
        for c, (key, _) in enumerate(shown)
        if _is_wrong(evaluation, task, example, key)
    }
    return picture_grid(rows, [title for _, title in shown], [e.record.prompt for e in examples], scale, wrong)


def render_html(view: dict) -> str:
    """The page of a view, as one text that needs nothing else."""
    return _render(_TEMPLATE, view)


def _render(template: str, view: dict) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files(__package__).joinpath(template).read_text()).render(view)


def add_champion(page: str, champion: Mapping, metrics: Mapping) -> str:
    """A report's page that also tells how the student compares with the champion; another page stays as it is.

    Args:
        page: `report.html`.
        champion: `version`, `scores` {task: {metric: value}} and `table` {task: {metric: comparison}}.
        metrics: the student's `metrics.json`.
    """
    rows = [
        {
            "task": task,
            "metric": name,
            "champion": _figure(champion["scores"].get(task, {}).get(name), metrics["units"][name]),
            "student": _figure(metrics["scores"][STUDENT][task][name], metrics["units"][name]),
            **_against(found, metrics["units"][name]),
        }
        for task, part in champion["table"].items()
        for name, found in part.items()
    ]
    verdicts = [row["verdict"] for row in rows if row["verdict"]]
    view = {"version": champion["version"], "rows": rows, "said": _count(verdicts), "confidence": _confidence(metrics)}
    return page.replace(_MARK, _render(_CHAMPION, view), 1)


# --- figures as text ---


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return _NONE
    if unit == "rate":
        return f"{100 * value:.1f} %"
    text = f"{value:.1f} dB" if unit == "dB" else f"{value:.2f}" if unit == "score" else f"{value:.3f}"
    return text.replace("-", _MINUS)


def _kept(entry: dict, unit: str) -> str:
    """Retention in the form that suits the unit: a share, or (decibels being logarithms) a difference."""
    if unit in ("dB", "distance"):
        return _NONE if entry["difference"] is None else _difference(entry["difference"], unit)
    return _NONE if entry["ratio"] is None else f"{100 * entry['ratio']:.1f} %"


def _difference(value: float, unit: str, bare: bool = False) -> str:
    """A signed difference: of rates in points, which are not a share of anything."""
    text = f"{100 * value:+.1f}" if unit == "rate" else f"{value:+.1f}" if unit == "dB" else f"{value:+.3f}"
    text = text.replace("-", _MINUS)
    return text if bare else text + {"rate": " points", "dB": " dB"}.get(unit, "")


def _span(interval: list[float] | None, unit: str) -> str:
    """An interval of values; empty if there is none."""
    if interval is None:
        return ""
    low, high = (_figure(v, unit) for v in interval)
    suffix = {"rate": " %", "dB": " dB"}.get(unit, "")
    return f"{low.removesuffix(suffix)} to {high}"


def _against(found: Mapping | None, unit: str) -> dict:
    """A comparison in words: `verdict`, `difference`, `span_of_difference`, `sure`; empty texts if there is none."""
    if found is None:
        return {"verdict": "", "difference": "", "span_of_difference": "", "sure": True}
    return {
        "verdict": found["verdict"],
        "difference": _difference(found["difference"], unit),
        "span_of_difference": f"{_difference(found['low'], unit, bare=True)} to {_difference(found['high'], unit)}",
        "sure": found["sure"],
    }


def _count(verdicts: list[str]) -> str:
    """How many verdicts of each kind, in one phrase."""
    named = [("better", "better on {}"), ("equal", "equal on {}"), ("worse", "worse on {}")]
    parts = [text.format(verdicts.count(kind)) for kind, text in named if kind in verdicts]
    return f"{', '.join(parts)} of {len(verdicts)} figures" if parts else "nothing to compare"


def _confidence(metrics: Mapping) -> str:
    return f"{100 * metrics['statistics']['confidence']:g} %"


def _rule(gate: dict, unit: str) -> str:
    """A gate's rule in words."""
    kind, amount = gate["rule"].split()
    if kind == "retain":
        return f"at least {100 * float(amount):g} % of its teacher"
    drop = {"rate": f"{100 * float(amount):g} points", "dB": f"{amount} dB"}.get(unit, amount)
    return f"at most {drop} below its teacher"


# --- pictures ---


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(picture: np.ndarray) -> str:
    longer = max(picture.shape[:2])
    image = resize(picture, _PAGE_SIDE / longer) if longer > _PAGE_SIDE else Image.fromarray(picture)
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()


def _picture(example: Example, key: str) -> np.ndarray | None:
    return getattr(example, key) if key in ("source", "target") else example.drawn[key.removeprefix("field ")]


def _shown(evaluation: Evaluation, task: str) -> list[tuple[str, str]]:
    """The columns of a task's pictures, as (key, title); a task that draws from nothing has no source."""
    teacher, examples = evaluation.metrics["teacher_of"][task], evaluation.examples[task]
    columns = [("source", "source"), (f"field {teacher}", f"teacher: {teacher}"), (f"field {STUDENT}", "student")]
    columns.append(("target", "target"))
    return [(key, title) for key, title in columns if any(_picture(e, key) is not None for e in examples)]


def _mark(evaluation: Evaluation, task: str) -> str:
    """The metric a sample is judged by."""
    return judged_by(evaluation.metrics["retention"][task], evaluation.metrics["skipped"])


def _is_wrong(evaluation: Evaluation, task: str, example: Example, key: str) -> bool:
    name = _mark(evaluation, task)
    field = key.removeprefix("field ")
    return field != key and metric(name).unit == "rate" and example.scores[field][name] == 0


# --- the page's contents ---


def _drawn_in(metrics: dict) -> str:
    """The sampling steps of all fields, and what single ones are drawn with instead."""
    usual = metrics["steps"]
    others = []
    for name, of in metrics.get("sampling", {}).items():
        words = [f"in {of['steps']}"] if of["steps"] != usual else []
        words += [f"guided at {of['guidance']:g}"] if of["guidance"] != 1 else []
        others += [f"{name} {', '.join(words)}"] if words else []
    return f"{usual} sampling steps" + (f" ({'; '.join(others)})" if others else "")


def _view(evaluation: Evaluation, provenance: dict, plots: dict[str, bytes]) -> dict:
    metrics = evaluation.metrics
    failed = [g for g in metrics["gates"] if not g["passed"]]
    return {
        "recipe": metrics["recipe"],
        "split": metrics["split"],
        "records": sum(metrics["records"].values()),
        "steps": _drawn_in(metrics),
        "seed": metrics["seed"],
        "banner": "failed" if failed else "held" if metrics["gates"] else "none",
        "verdict": _verdict(metrics["gates"], failed),
        "beside": _beside_teachers(metrics),
        "confidence": _confidence(metrics),
        "failures": [_failure(g, metrics) for g in failed],
        "tiles": [_tile(metrics, task) for task in metrics["retention"]],
        "rows": [row for task in metrics["retention"] for row in _rows(metrics, task)],
        "meanings": [(name, metric(name).meaning) for name in metrics["units"]],
        "skipped": list(metrics["skipped"].items()),
        "matrix": _matrix(metrics),
        "novelty": _novelty(metrics),
        "plots": _plots(metrics, plots),
        "galleries": [_gallery(evaluation, task, evaluation.examples[task]) for task in evaluation.examples],
        "worst": [_gallery(evaluation, task, shown) for task, shown in evaluation.worst.items() if shown],
        "provenance": _sections(
            provenance | {name: metrics[name] for name in ("judge", "canaries") if metrics.get(name)}
        ),
    }


def _verdict(gates: list[dict], failed: list[dict]) -> str:
    if not gates:
        return "The recipe sets no gates"
    if not failed:
        return f"The student holds all {len(gates)} gates" if len(gates) > 1 else "The student holds its gate"
    return f"The student fails {len(failed)} of {len(gates)} gate{'s' if len(gates) > 1 else ''}"


def _failure(gate: dict, metrics: dict) -> str:
    unit = metrics["units"][gate["metric"]]
    if gate.get("reason"):
        return f"{gate['task']}: {gate['metric']} could not be judged: {gate['reason']}"
    got = "has no value" if gate["value"] is None else f"is {_figure(gate['value'], unit)}"
    need = "its teacher has none" if gate["limit"] is None else f"needs at least {_figure(gate['limit'], unit)}"
    span = _span(gate.get("interval"), unit) if gate["value"] is not None else ""
    sure = f"; {_confidence(metrics)} interval {span}" if span else ""
    return f"{gate['task']}: {gate['metric']} {got}, {need} ({_rule(gate, unit)}){sure}"


def _beside_teachers(metrics: dict) -> str:
    """The verdicts over all figures in one sentence."""
    found = [part for row in metrics["comparisons"]["teacher"].values() for part in row.values() if part is not None]
    doubt = [
        f"{task} {name}"
        for task, row in metrics["comparisons"]["teacher"].items()
        for name, part in row.items()
        if part is not None and part["margin"] is not None and not part["sure"]
    ]
    said = f"Beside its teachers, record by record: {_count([part['verdict'] for part in found])}"
    said += f"; the interval crosses the gate on {', '.join(doubt)}" if doubt else ""
    return said + (f"; not measured: {', '.join(metrics['skipped'])}" if metrics["skipped"] else "")


def _plots(metrics: dict, plots: dict[str, bytes]) -> dict:
    """The plots as pictures with their meanings, the paths' first."""
    meaning = {
        "drift": "How far the student's path lies from its teacher's at each noise level, from the same noise "
        "(latent units; the noise itself has 1).",
        "velocity_error": "The student's velocity error at its own states, as a share of the teacher's velocity.",
    }

    def shown(name: str) -> dict:
        title = {"drift": "Path drift", "velocity_error": "Velocity error"}.get(name, name)
        uri = f"data:image/png;base64,{base64.b64encode(plots[name]).decode()}"
        return {"title": title, "uri": uri, "note": meaning.get(name, "")}

    drift = metrics.get("drift", {})
    counts = sorted({facts["records"] for facts in drift.values()})
    ends = [
        f"{task}: {facts['drift'][-1]:.3g} from its teacher at the end, velocity error {max(known):.2g} at most"
        for task, facts in drift.items()
        if (known := [v for v in facts["velocity_error"] if v is not None]) and facts["drift"][-1] is not None
    ]
    return {
        "paths": [shown(name) for name in plots if name in meaning],
        "steps": [shown(name) for name in plots if name not in meaning],
        "records": " or ".join(map(str, counts)),
        "ends": ends,
    }


def _status(metrics: dict, task: str, name: str | None = None) -> str:
    """`held`, `failed`, or `none` where no gate is set, over one metric of a task or all."""
    gates = [g for g in metrics["gates"] if g["task"] == task and name in (None, g["metric"])]
    return "none" if not gates else "held" if all(g["passed"] for g in gates) else "failed"


def _tile(metrics: dict, task: str) -> dict:
    name = metrics["primary"][task]
    entry, unit = metrics["retention"][task][name], metrics["units"][name]
    against = "to" if unit in ("dB", "distance") else "of"
    gates = [g for g in metrics["gates"] if g["task"] == task]
    failed = [g["metric"] for g in gates if not g["passed"]]
    held = f"{len(gates)} gate{'s' if len(gates) > 1 else ''} held" if gates else "no gate"
    return {
        "task": task,
        "metric": name,
        "value": _figure(entry["student"], unit),
        "interval": _span(_interval(metrics, task, name), unit),
        "kept": f"{_kept(entry, unit)} {against} its teacher",
        **_against(metrics["comparisons"]["teacher"][task][name], unit),
        "status": _status(metrics, task),
        "gates": f"fails: {', '.join(failed)}" if failed else held,
    }


def _interval(metrics: dict, task: str, name: str) -> list[float] | None:
    return None if metrics["scores"][STUDENT][task][name] is None else metrics["intervals"][STUDENT][task][name]


def _rows(metrics: dict, task: str) -> list[dict]:
    rows: list[dict] = []
    for name, entry in metrics["retention"][task].items():
        unit = metrics["units"][name]
        gates = [g for g in metrics["gates"] if g["task"] == task and g["metric"] == name]
        ceiling = metrics["ceiling"][task].get(name)
        base = metrics["scores"][BASE][task].get(name)
        limits = [g["limit"] for g in gates if g["limit"] is not None]
        rows.append(
            {
                "task": task,
                "span": len(metrics["retention"][task]) if not rows else 0,
                "teacher_name": metrics["teacher_of"][task],
                "metric": name,
                "base": _figure(base, unit),
                "teacher": _figure(entry["teacher"], unit),
                "student": _figure(entry["student"], unit),
                "interval": _span(_interval(metrics, task, name), unit),
                **_against(metrics["comparisons"]["teacher"][task][name], unit),
                "kept": _kept(entry, unit),
                "kept_how": f"student {_MINUS} teacher" if unit in ("dB", "distance") else "student / teacher",
                "skipped": name in metrics["skipped"],
                "limits": [f"≥ {_figure(g['limit'], unit)}" for g in gates],
                "rules": [_rule(g, unit) for g in gates],
                "ceiling": _figure(ceiling, unit),
                "status": _status(metrics, task, name),
                "bar": _bar(unit, entry, base, ceiling, max(limits, default=None)),
            }
        )
    return rows


def _bar(unit: str, entry: dict, base: float | None, ceiling: float | None, limit: float | None) -> dict:
    """Positions in percent of a bar from 0 to the best there is (1, 10, or the highest of the decibel figures); of a
    distance, which has no other end, an empty one."""
    known = [v for v in (entry["teacher"], entry["student"], base, ceiling) if v is not None]
    top = max([1.0, *known]) if unit == "dB" else 10.0 if unit == "score" else 1.0

    def place(value: float | None) -> float | None:
        return None if value is None or unit == "distance" else round(100 * min(max(value / top, 0), 1), 1)

    return {
        "student": place(entry["student"]) or 0,
        "teacher": place(entry["teacher"]),
        "base": place(base),
        "limit": place(limit),
    }


def _matrix(metrics: dict) -> dict:
    """Every field on every task by the task's primary metric; shades tell how near a cell is to its column's best."""
    columns = [(task, metrics["primary"][task]) for task in metrics["retention"]]
    rows = []
    for field, scores in metrics["scores"].items():
        cells = []
        for task, name in columns:
            value = scores[task][name]
            best = max((s[task][name] or 0 for s in metrics["scores"].values()), default=0)
            shade = 0 if value is None or best <= 0 else min(max(value / best, 0), 1)
            cells.append(
                {
                    "text": _figure(value, metrics["units"][name]),
                    "shade": round(shade**2, 3),
                    "own": field == metrics["teacher_of"][task],
                }
            )
        rows.append({"field": field, "cells": cells})
    return {"columns": columns, "rows": rows}


def _novelty(metrics: dict) -> list[dict]:
    """The student's figures by kind of novelty, for tasks whose records name one."""
    return [
        {
            "task": task,
            "metrics": list(metrics["retention"][task]),
            "rows": [
                (novelty, [_figure(values[name], metrics["units"][name]) for name in metrics["retention"][task]])
                for novelty, values in kinds.items()
            ],
        }
        for task, kinds in metrics["by_novelty"].items()
    ]


def _role(key: str) -> str:
    """What a column of pictures is: `source`, `teacher`, `student` or `target`."""
    return "student" if key == f"field {STUDENT}" else "teacher" if key.startswith("field ") else key


def _comparisons(keys: list[str]) -> list[tuple[str, str]]:
    """What the student's pictures can be laid over, as (role, words for it)."""
    words = {"source": "source \N{RIGHTWARDS ARROW} student", "teacher": "teacher | student"}
    return [(role, words[role]) for key in keys if (role := _role(key)) in words]


def _gallery(evaluation: Evaluation, task: str, examples: list[Example]) -> dict:
    name = _mark(evaluation, task)
    unit = metric(name).unit
    shown = _shown(evaluation, task)

    def note(example: Example, key: str) -> str:
        field = key.removeprefix("field ")
        if field == key:
            return ""
        value = example.scores[field][name]
        if not math.isfinite(value):
            return _NONE
        return ("✓ right" if value else "✕ wrong") if unit == "rate" else _figure(value, unit)

    def cell(example: Example, key: str, title: str) -> dict:
        picture = _picture(example, key)
        return {
            "role": _role(key),
            "title": title,
            "uri": None if picture is None else _data_uri(picture),
            "pixelated": picture is not None and max(picture.shape[:2]) <= _GRID_SIDE,
            "note": note(example, key),
            "wrong": _is_wrong(evaluation, task, example, key),
        }

    return {
        "task": task,
        "metric": name,
        "rate": unit == "rate",
        "count": evaluation.metrics["records"][task],
        "columns": len(shown),
        "views": _comparisons([key for key, _ in shown]),
        "samples": [
            {
                "prompt": example.record.prompt,
                "id": example.record.id,
                "novelty": example.record.facts().get("novelty"),
                "cells": [cell(example, key, title) for key, title in shown],
            }
            for example in examples
        ],
    }


def _sections(provenance: dict) -> list[dict]:
    """Provenance as titled lists of short facts and folded blocks."""
    plain = json.loads(json.dumps(provenance, default=str))
    first: dict = {"title": "Run", "facts": [], "block": None}
    sections = [first]
    for key, value in plain.items():
        if isinstance(value, Mapping) and not any(isinstance(v, (Mapping, list)) for v in value.values()):
            sections.append({"title": key, "facts": [(k, _fact(v)) for k, v in value.items()], "block": None})
        elif isinstance(value, (Mapping, list)):
            text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
            sections.append({"title": key, "facts": [], "block": text})
        elif isinstance(value, str) and "\n" in value:
            sections.append({"title": key, "facts": [], "block": value})
        else:
            first["facts"].append((key, _fact(value)))
    return [s for s in sections if s["facts"] or s["block"]]


def _fact(value: object) -> str:
    if value is None:
        return _NONE
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- Markdown ---


def _cell(text: object) -> str:
    return " ".join(html.escape(str(text), quote=False).replace("|", "\\|").split())


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(_cell(c) if n != 1 else c for c in line)} |" for n, line in enumerate(lines)]


def _drift_lines(plots: dict) -> list[str]:
    if not plots["paths"]:
        return []
    shown = [f"![{_cell(p['title'])}]({plot_path(name)})" for p, name in zip(plots["paths"], _PATHS, strict=True)]
    shown += [f"![{_cell(p['title'])}]({plot_path(p['title'])})" for p in plots["steps"]]
    return ["## Paths and sampling steps", "", *[f"- {_cell(end)}" for end in plots["ends"]], "", *shown, ""]


def _markdown(view: dict, evaluation: Evaluation) -> str:
    sign = {"held": "held", "failed": "**failed**", "none": _NONE}
    lines = [
        f"# Evaluation of {_cell(view['recipe'])}",
        "",
        f"**{view['verdict']}.**",
        "",
        f"{_cell(view['beside'])}.",
        "",
        *[f"- {_cell(failure)}" for failure in view["failures"]],
        "",
        f"{view['records']} {view['split']} records, {view['steps']}, seed {view['seed']}.",
        "",
        "## Retention",
        "",
        *_table(
            [
                "task",
                "metric",
                "base",
                "teacher",
                "student",
                "interval",
                "retention",
                "beside its teacher",
                "gate",
                "verdict",
                "ceiling",
            ],
            [
                [
                    r["task"],
                    r["metric"] + (" (not measured)" if r["skipped"] else ""),
                    r["base"],
                    r["teacher"],
                    r["student"],
                    r["interval"] or _NONE,
                    r["kept"],
                    f"{r['verdict']}, {r['difference']} ({r['span_of_difference']})" if r["verdict"] else _NONE,
                    ", ".join(r["limits"]) or _NONE,
                    sign[r["status"]],
                    r["ceiling"],
                ]
                for r in view["rows"]
            ],
        ),
        "",
        *[f"- {_cell(name)} was not measured: {_cell(reason)}" for name, reason in view["skipped"]],
        *[""] * bool(view["skipped"]),
        f"Retention is student / teacher, and for decibels and distances student {_MINUS} teacher. "
        "The ceiling is the autoencoder's own reconstruction of the targets. "
        f"Intervals are {view['confidence']} bootstrap intervals over records.",
        "",
        "## Every field on every task",
        "",
        *_table(
            ["field", *[f"{task} ({name})" for task, name in view["matrix"]["columns"]]],
            [[row["field"], *[c["text"] for c in row["cells"]]] for row in view["matrix"]["rows"]],
        ),
        "",
        *_drift_lines(view["plots"]),
        "## Pictures",
        "",
        *[line for task in evaluation.examples for line in (f"### {_cell(task)}", "", f"![]({grid_path(task)})", "")],
        "## Provenance",
        "",
        *[f"- {_cell(s['title'])}, {_cell(k)}: {_cell(v)}" for s in view["provenance"] for k, v in s["facts"]],
    ]
    return "\n".join(lines) + "\n"
