"""Whether the first run holds on other people's machines: the recipe's whole training, over seeds and CPU numerics.

Another CPU rounds differently, and training makes another model of that. `ATEN_CPU_CAPABILITY` makes one CPU round as
an older one does, and so does another number of threads. Every run trains teachers and student anew and evaluates them;
its line in the file of results says how far each gate was from failing, as a share of what the gate allows (0: just
held, 1: as good as the teacher). A run that is in the file is not made again, so a stopped benchmark goes on.

    python -m benchmarks.first_run --seeds 0,1,2,3 --instructions default,avx2,avx512
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Bar, Report, arguments, names, run_script
from danceopd.config.load import load_recipe
from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.evaluation.gates import gate_allowance
from danceopd.evaluation.validate import gate_margin
from danceopd.files import content_key
from danceopd.studies.table import estimate
from danceopd.workspace import code_revision

INSTRUCTIONS = ("default", "avx2", "avx512")
LEAST = 1 / 3  # of what a gate allows: the margin that every run should keep


@dataclass(frozen=True)
class Setting:
    """One run: what is drawn at random, and how the CPU computes."""

    seed: int
    instructions: str
    threads: int

    def environment(self) -> dict[str, str]:
        return {"ATEN_CPU_CAPABILITY": self.instructions, "OMP_NUM_THREADS": str(self.threads)}


def gate_margins(recipe: Recipe, metrics: dict) -> dict[str, float]:
    """The margin of every gate by "task metric", from an evaluation's `metrics.json`."""
    found = {}
    for task, spec in recipe.tasks.items():
        for gate in spec.gates:
            entry = metrics["retention"][task][gate.metric]
            found[f"{task} {gate.metric}"] = gate_margin(gate, entry["student"], entry["teacher"])
    return found


def run_once(recipe_name: str, overrides: list[str], setting: Setting, workspace: Path) -> dict:
    """Train and evaluate in a process of its own; returns its line for the file of results.

    Raises:
        UserError: with the end of its log, if the process fails.
    """
    recipe = load_recipe(recipe_name, [*overrides, f"seed={setting.seed}"])
    command = [sys.executable, "-m", "danceopd", "evaluate", "--recipe", recipe_name, "--workspace", str(workspace)]
    command += [part for override in (*overrides, f"seed={setting.seed}") for part in ("--set", override)]
    workspace.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log = workspace / f"seed-{setting.seed}.log"
    with log.open("w") as file:
        done = subprocess.run(command, env=os.environ | setting.environment(), stdout=file, stderr=file, check=False)
    if done.returncode:
        raise UserError(
            f"{setting}: ended with code {done.returncode}; {log} ends: {' '.join(log.read_text()[-600:].split())}"
        )
    told = next(line for line in reversed(log.read_text().splitlines()) if "report.html" in line)
    evaluation = Path(told.partition("report.html")[0].strip())
    metrics = json.loads((evaluation / "metrics.json").read_text())
    return {
        "seed": setting.seed,
        "instructions": setting.instructions,
        "threads": setting.threads,
        "seconds": round(time.monotonic() - started, 1),
        "passed": metrics["passed"],
        "margins": gate_margins(recipe, metrics),
        "retention": metrics["retention"],
    }


def read_results(path: Path, key: str) -> list[dict]:
    """The lines of a file of results that were made by this recipe and this code."""
    if not path.is_file():
        return []
    return [line for text in path.read_text().splitlines() if (line := json.loads(text))["key"] == key]


def make_results(options: argparse.Namespace) -> list[dict]:
    """Every run of the grid, from the file of results or made now and appended to it."""
    recipe = load_recipe(options.recipe, options.overrides)
    key = content_key(recipe.digest(), code_revision())
    grid = [
        Setting(seed, instructions, threads)
        for seed in options.seeds
        for instructions in options.instructions
        for threads in options.run_threads
    ]
    found = []
    for setting in grid:
        known = [line for line in read_results(options.results, key) if _setting(line) == setting]
        if known:
            found.append(known[-1])
            continue
        print(f"first_run: {setting} ...", file=sys.stderr)
        place = options.workspace / f"{setting.instructions}-{setting.threads}"
        line = run_once(options.recipe, options.overrides, setting, place) | {"key": key}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with options.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        found.append(line)
    return found


def _setting(line: dict) -> Setting:
    return Setting(line["seed"], line["instructions"], line["threads"])


def report(recipe: Recipe, lines: list[dict]) -> Report:
    """One row a run with every gate's margin, the worst of each gate, and what must hold."""
    gates = list(lines[0]["margins"])
    rows: list[list] = [
        [line["seed"], line["instructions"], line["threads"], *_shares(line["margins"].values()), line["seconds"]]
        for line in lines
    ]
    worst = {gate: min(line["margins"][gate] for line in lines) for gate in gates}
    rows.append(["worst", "", "", *_shares(worst.values()), max(line["seconds"] for line in lines)])
    held = sum(line["passed"] for line in lines)
    notes = [f"{gate}: {_figures(gate, lines)}; the gate allows {_allowed(recipe, gate, lines)}" for gate in gates]
    return Report(
        "first_run",
        "The first run, over seeds and CPU numerics",
        "Teachers, student and evaluation made anew in every run. A cell is how far the gate was from failing, as a "
        "share of what it allows: 0 % just held, 100 % as good as the teacher.",
        ["seed", "instructions", "threads", *gates, "seconds"],
        rows,
        [
            Bar(f"runs of {len(lines)} that hold every gate", held, len(lines)),
            Bar("smallest margin, as a share of what its gate allows", min(worst.values()), LEAST),
        ],
        notes,
        details={"runs": lines},
    )


def _shares(values) -> list[str]:
    return [f"{100 * value:.0f} %" for value in values]


def _figures(gate: str, lines: list[dict]) -> str:
    task, metric = gate.split()
    values = [line["retention"][task][metric]["student"] for line in lines]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"student {statistics.mean(values):.4g} (standard deviation {spread:.2g})"


def _allowed(recipe: Recipe, gate: str, lines: list[dict]) -> str:
    task, metric = gate.split()
    rule = next(g for g in recipe.tasks[task].gates if g.metric == metric)
    teachers = [line["retention"][task][metric]["teacher"] for line in lines]
    return f"{gate_allowance(rule, statistics.mean(teachers)):.3g} below its teacher's {statistics.mean(teachers):.4g}"


def figures(lines: list[dict]) -> Report:
    """One row a metric: teacher and student over the seeds, and how far apart CPUs bring one seed's student."""
    shown = [(task, metric) for task, found in lines[0]["retention"].items() for metric in found]
    rows = [
        [
            task,
            metric,
            *(_over_seeds(lines, task, metric, who) for who in ("teacher", "student")),
            f"{_between_cpus(lines, task, metric):.3g}",
        ]
        for task, metric in shown
    ]
    return Report(
        "first_run",
        "The first run's figures",
        f"Mean over {len({line['seed'] for line in lines})} seeds, each the mean of its runs, with half of the 95 % "
        "interval (Student's t); last, the widest range that one seed's student shows over the CPUs' instruction sets.",
        ["task", "metric", "teacher", "student", "range over instruction sets"],
        rows,
    )


def _by_seed(lines: list[dict], task: str, metric: str, who: str) -> list[list[float]]:
    seeds = sorted({line["seed"] for line in lines})
    return [[line["retention"][task][metric][who] for line in lines if line["seed"] == seed] for seed in seeds]


def _over_seeds(lines: list[dict], task: str, metric: str, who: str) -> str:
    found = estimate([statistics.mean(values) for values in _by_seed(lines, task, metric, who)])
    return f"{found.mean:.4g}" + ("" if found.half is None else f" ± {found.half:.2g}")


def _between_cpus(lines: list[dict], task: str, metric: str) -> float:
    return max(max(values) - min(values) for values in _by_seed(lines, task, metric, "student"))


def measure(options: argparse.Namespace) -> list[Report]:
    lines = make_results(options)
    return [report(load_recipe(options.recipe, options.overrides), lines), figures(lines)]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    parser = arguments("the first run over seeds and CPU numerics")
    parser.add_argument("--recipe", default="world")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2, 3])
    parser.add_argument("--instructions", type=names(INSTRUCTIONS), default=list(INSTRUCTIONS))
    parser.add_argument("--run-threads", type=_numbers, default=[1], help="of each run: 1, or 1,2")
    parser.add_argument("--workspace", type=Path, default=Path("runs/first_run"))
    parser.add_argument("--results", type=Path, default=Path("runs/first_run/results.jsonl"))
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_script(parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
