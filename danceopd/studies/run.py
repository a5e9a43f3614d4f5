"""A study from its plan to its table: what is there is kept, the rest is shared among processes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.files import write_atomic, write_json
from danceopd.studies.cells import Cell, find_result, reference_scores, run_cell
from danceopd.studies.plan import Study
from danceopd.studies.shared import Shared, find_shared, open_shared
from danceopd.studies.table import PLOT, STEPS_PLOT, markdown, summarise
from danceopd.studies.workers import work_off

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Held:
    """What one seed's students are made with and held against: see `Shared` and `reference_scores`."""

    shared: Shared
    reference: dict


def _asked(seed: int, study: Study) -> tuple[Recipe, set[str]]:
    """One seed's recipe, of its first variant, and where the students of all of them start from."""
    starts = {study.recipe_of(variant, seed, 1).distill.start for variant in study.variants}
    return study.recipe_of(next(iter(study.variants)), seed, 1), starts


def _hold(seed: int, study: Study, workspace: Path, folder: Path) -> _Held:
    first, starts = _asked(seed, study)
    shared = open_shared(first, starts, workspace, folder, study.at_steps)
    return _Held(shared, reference_scores(first, shared))


def hold_seeds(study: Study, workspace: Path, folder: Path, workers: int) -> dict[int, _Held]:
    """Teachers and their scores by seed: the same for all, or each seed's own, made in several processes.

    Raises:
        UserError: naming the seeds whose teachers could not be made.
    """
    hold = partial(_hold, study=study, workspace=workspace, folder=folder)
    if study.teachers == "once":
        return dict.fromkeys(study.seeds, hold(study.seeds[0]))
    from danceopd.steps import open_run

    asked = [_asked(seed, study) for seed in study.seeds]
    lacking = [first for first, starts in asked if find_shared(first, starts, workspace, folder) is None]
    if lacking:  # base and data are the same for all seeds: made here, so that no two processes do
        open_run(lacking[0], workspace)
    held, failed = {}, []
    for number, (seed, found) in enumerate(work_off(hold, study.seeds, workers), 1):
        if isinstance(found, Exception):
            failed.append(f"seed {seed} ({found})")
            continue
        held[seed] = found
        log.info("study: teachers of seed %d are there (%d of %d seeds)", seed, number, len(study.seeds))
    if failed:
        raise UserError(f"study {study.name}: teachers of {len(failed)} seeds failed: {'; '.join(failed)}")
    return {seed: held[seed] for seed in study.seeds}  # the same table whichever came first


def plan_cells(study: Study, shared: Shared) -> list[Cell]:
    """Every cell of a study, seed by seed, so that one that is stopped holds every variant at the first seeds.

    Args:
        study: what to compare.
        shared: of the first seed; what a variant's forwards cost does not depend on the seed.

    Raises:
        UserError: if the budget does not pay for one update, or the preflight finds an error.
    """
    from danceopd.methods.table import needs_targets
    from danceopd.preflight.checks import preflight
    from danceopd.preflight.findings import settle
    from danceopd.preflight.forwards import expected_forwards
    from danceopd.steps.student import open_training
    from danceopd.studies.plan import steps_within

    trial = {variant: study.recipe_of(variant, study.seeds[0], 1) for variant in study.variants}
    opened, planned = {}, {}
    for variant, recipe in trial.items():
        targets = needs_targets(recipe.distill)
        if targets not in opened:
            ready = open_training(shared.run(recipe), shared.teachers)
            facts = {name: product.facts for name, product in shared.teachers.items()}
            counts = shared.data.facts["counts"]
            settle(preflight(recipe, ready.backbone, shared.base.pipeline, ready.fields, facts, ready.encoded, counts))
            opened[targets] = ready
        ready = opened[targets]
        forwards = expected_forwards(recipe, ready.backbone, ready.encoded, ready.fields)
        planned[variant] = steps_within(study.budget, forwards, recipe.distill.batch), forwards
        log.info("study: %s takes %.2f forwards per sample, %d steps", variant, forwards, planned[variant][0])
    return [
        Cell(variant, study.recipe_of(variant, seed, steps), forwards)
        for seed in study.seeds
        for variant, (steps, forwards) in planned.items()
    ]


def run_study(study: Study, workspace: Path, workers: int) -> dict:
    """Run what is missing of a study, and write `study.json`, `study.md` and `study.png` into its folder, and
    `study-steps.png` if it scores fields at several numbers of sampling steps.

    The files are written from what there is, also when the study is stopped or a cell fails.

    Args:
        study: what to compare.
        workspace: of the recipe; the study's folder is `studies/<name>` in it.
        workers: processes, each with its share of the cores.

    Returns:
        The summary (see `danceopd.studies.table.summarise`), with `folder`.

    Raises:
        UserError: naming the cells that failed.
        Interrupted: if SIGTERM came.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("danceopd study starts its own processes; run it plainly, with --workers")
    folder = Path(workspace) / "studies" / study.name
    held = hold_seeds(study, Path(workspace), folder, workers)
    cells = plan_cells(study, held[study.seeds[0]].shared)
    there = [find_result(cell, held[cell.seed].shared) for cell in cells]
    results = [result for result in there if result is not None]
    missing = [cell for cell, result in zip(cells, there, strict=True) if result is None]
    log.info("study %s: %d cells, %d of them there; %s each", study.name, len(cells), len(results), study.budget)
    failed: list[str] = []
    try:
        for cell, result in _announced(missing, held, workers):
            if isinstance(result, Exception):
                failed.append(f"{cell.variant} seed {cell.seed} ({result})")
            else:
                results.append(result)
    finally:
        summary = _write(study, cells[0].recipe, results, held, folder)
    if failed:
        raise UserError(f"study {study.name}: {len(failed)} of {len(cells)} cells failed: {'; '.join(failed)}")
    return summary


def _run(cell: Cell, held: dict[int, _Held]) -> dict:
    return run_cell(cell, held[cell.seed].shared)


def _announced(cells: list[Cell], held: dict[int, _Held], workers: int) -> Iterator[tuple[Cell, Any]]:
    """Run cells, with a line on each as it ends: what it reached, and how long the rest may take."""
    started = time.monotonic()

    def evaluation(cell: Cell) -> int:
        mine = held[cell.seed]
        return sum(mine.reference["records"].values()) * (cell.recipe.evaluate.steps + sum(mine.shared.at_steps))

    work = [cell.forwards + evaluation(cell) for cell in cells]
    done, total = 0.0, sum(work)
    amount = dict(zip(map(id, cells), work, strict=True))
    for number, (cell, result) in enumerate(work_off(partial(_run, held=held), cells, workers), 1):
        done += amount[id(cell)]
        left = (time.monotonic() - started) * (total - done) / done
        said = f"failed: {result}" if isinstance(result, Exception) else _said(result)
        rest = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        log.info("study: %d/%d %s seed %d %s; about %s left", number, len(cells), cell.variant, cell.seed, said, rest)
        yield cell, result


def _said(result: dict) -> str:
    scores = ", ".join(
        f"{task} {name} " + ("n/a" if value is None else f"{value:.4g}")
        for task, metrics in result["scores"].items()
        for name, value in metrics.items()
    )
    return f"{scores} ({result['steps']} steps, {result['forwards']:.0f} forwards)"


def _write(study: Study, recipe: Recipe, results: list[dict], held: dict[int, _Held], folder: Path) -> dict:
    from danceopd.studies.plot import plot_steps, plot_study

    summary = summarise(study, recipe, results, {seed: found.reference for seed, found in held.items()})
    write_json(folder / "study.json", summary)
    write_atomic(folder / "study.md", markdown(summary))
    if summary["variants"]:
        plot_study(summary, folder / PLOT)
        if study.at_steps:
            plot_steps(summary, folder / STEPS_PLOT)
    return summary | {"folder": str(folder)}
