"""A study from its plan to its table: what is there is kept, the rest is shared among processes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.files import write_atomic, write_json
from danceopd.studies.cells import Cell, Shared, find_result, open_shared, reference_scores, run_cell
from danceopd.studies.plan import Study
from danceopd.studies.table import PLOT, markdown, summarise
from danceopd.studies.workers import work_off

log = logging.getLogger(__name__)


def plan_cells(study: Study, shared: Shared) -> list[Cell]:
    """Every cell of a study, seed by seed, so that one that is stopped holds every variant at the first seeds.

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
    """Run what is missing of a study, and write `study.json`, `study.md` and `study.png` into its folder.

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
    first = study.recipe_of(next(iter(study.variants)), study.seeds[0], 1)
    starts = {study.recipe_of(variant, study.seeds[0], 1).distill.start for variant in study.variants}
    shared = open_shared(first, starts, Path(workspace), folder)
    reference = reference_scores(first, shared)
    cells = plan_cells(study, shared)
    results = [result for cell in cells if (result := find_result(cell, shared)) is not None]
    missing = [cell for cell in cells if find_result(cell, shared) is None]
    log.info("study %s: %d cells, %d of them there; %s each", study.name, len(cells), len(results), study.budget)
    failed: list[str] = []
    try:
        for cell, result in _announced(missing, shared, workers, reference):
            if isinstance(result, Exception):
                failed.append(f"{cell.variant} seed {cell.seed} ({result})")
            else:
                results.append(result)
    finally:
        summary = _write(study, first, results, reference, folder)
    if failed:
        raise UserError(f"study {study.name}: {len(failed)} of {len(cells)} cells failed: {'; '.join(failed)}")
    return summary


def _announced(cells: list[Cell], shared: Shared, workers: int, reference: dict) -> Iterator[tuple[Cell, Any]]:
    """Run cells, with a line on each as it ends: what it reached, and how long the rest may take."""
    started = time.monotonic()
    evaluation = sum(reference["records"].values())
    work = [cell.forwards + evaluation * cell.recipe.evaluate.steps for cell in cells]
    done, total = 0.0, sum(work)
    amount = dict(zip(map(id, cells), work, strict=True))
    for number, (cell, result) in enumerate(work_off(partial(run_cell, shared=shared), cells, workers), 1):
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


def _write(study: Study, recipe: Recipe, results: list[dict], reference: dict, folder: Path) -> dict:
    from danceopd.studies.plot import plot_study

    summary = summarise(study, recipe, results, reference)
    write_json(folder / "study.json", summary)
    write_atomic(folder / "study.md", markdown(summary))
    if summary["variants"]:
        plot_study(summary, folder / PLOT)
    return summary | {"folder": str(folder)}
