"""The step that measures the champion on a student's held-out records, where its own figures cannot be compared."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.config.sampling import read_sampling
from danceopd.errors import UserError
from danceopd.evaluation.measured import METRICS, VALUES, Measured, read_evaluation
from danceopd.evaluation.names import JUDGE
from danceopd.files import read_json, write_json
from danceopd.steps.encodings import Encoder, open_backbone
from danceopd.steps.evaluation import judged_in
from danceopd.steps.run import Run
from danceopd.tracking import recording
from danceopd.workspace import Product, make_product

if TYPE_CHECKING:  # MLflow is slow to import
    from danceopd.registry.champion_teacher import Champion
    from danceopd.registry.measure_anew import MeasuredAnew

log = logging.getLogger(__name__)


def measure_champion(run: Run, student: Product, evaluation: Product) -> MeasuredAnew | None:
    """Draw and score the registered model's champion as `evaluation` did the student.

    Kept in the workspace: asked again, it is read back. With a judge it is kept for each evaluation apart.

    Returns:
        The champion's figures, or why it could not be measured; None where its own figures can be compared, where
        there is no champion, and for a student that failed a gate.
    """
    from danceopd.registry.champion import judge_moved
    from danceopd.registry.champion_teacher import find_champion
    from danceopd.registry.measure_anew import MeasuredAnew, needs_measuring
    from danceopd.registry.versions import RegisteredModel
    from danceopd.tracking import mlflow_store

    recipe = run.recipe
    mine = read_evaluation(evaluation.folder, recipe)
    if not mine.metrics["passed"] or not mlflow_store.has_store(run.store):
        return None
    model = RegisteredModel(mlflow_store.open_client(run.store), recipe.register_as.model)
    if not needs_measuring(model, student.digest, mine):
        return None
    champion = find_champion(recipe, run.store)
    metrics = {task: spec.metrics for task, spec in recipe.with_benchmarks().tasks.items()}
    judged = evaluation.digest if JUDGE in mine.conditions["tools"] else ""
    inputs = [asdict(champion), mine.conditions, metrics, run.base.digest, recipe.model.decisive(), judged]

    def build(scratch: Path, checkpoints: Path) -> dict:
        title = f"{champion.name} measured anew"
        settings = {"model": recipe.model.model_dump(mode="json"), "evaluate": recipe.evaluate.model_dump(mode="json")}
        read = run.data.facts
        recording.begin(recipe, run.workspace, checkpoints.name, title, settings, read, recording.EVALUATION)
        return _measure(run, champion, judged_in(student), scratch)

    try:
        made = make_product(run.workspace, "champions", f"version-{champion.version}", inputs, build)
    except UserError as error:
        log.warning("%s could not be measured anew: %s", champion.name, error)
        return MeasuredAnew(champion.model, champion.version, None, str(error))
    measured = Measured(read_json(made.folder / METRICS), read_json(made.folder / VALUES))
    if moved := judge_moved(mine, measured):
        told = f"{moved} since the student was judged; remove {evaluation.folder} and run it again"
        log.warning("%s cannot be compared: %s", champion.name, told)
        return MeasuredAnew(champion.model, champion.version, None, told)
    return MeasuredAnew(champion.model, champion.version, measured)


def _measure(run: Run, champion: Champion, judged: str, out: Path) -> dict:
    from danceopd.evaluation.evaluate import measure_field
    from danceopd.flow.field_io import load_field
    from danceopd.preflight.compatibility import check_pipeline
    from danceopd.preflight.findings import settle
    from danceopd.registry.champion_teacher import fetch_champion

    with tempfile.TemporaryDirectory(dir=run.workspace) as scratch:
        folder = fetch_champion(champion, run.store, Path(scratch))
        settle(check_pipeline("champion", folder, run.base.pipeline))
        encoder = Encoder(run, open_backbone(run))
        field = load_field(encoder.backbone, "champion", folder, encoder.empty_prompt)
        place = (run.cache, encoder.key, judged)
        metrics, values = measure_field(run.recipe, field, encoder.dataset(), *place, read_sampling(folder))
    write_json(out / METRICS, metrics)
    write_json(out / VALUES, values)
    return {"model": champion.model, "version": champion.version, "scores": metrics["scores"]}
