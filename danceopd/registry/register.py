"""The way of a student into the MLflow model registry: gates, proof of the export, version, aliases.

A student that holds its gates becomes a version with alias `challenger`; if no gate metric falls more than its margin
below the version called `champion`, it takes that alias over, and the old champion is called `previous`. The figures of
two versions are compared if they were measured alike: the same held-out records, picture size, steps, seed, metric
networks and judge, whatever they were trained on. Where they were not, the champion is measured anew in the student's
run (`measure_anew`); where that cannot be done, the student stays challenger, and a person who has looked at both
reports may move the alias (`danceopd registry promote`). Where the other version was a teacher in the student's own run
(a capability added to a champion), that run measured both alike, and its figures of the other version count.
Limits are held against means; the bootstrap intervals beside them say how sure those are.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.config.recipe import Recipe
from danceopd.config.sampling import write_sampling
from danceopd.errors import UserError
from danceopd.evaluation.measured import METRICS, REPORT, VALUES, Measured, figure, read_evaluation
from danceopd.export.model_card import write_card
from danceopd.export.student import PIPELINE, check_export
from danceopd.files import hash_file, write_atomic, write_json
from danceopd.registry.champion import Candidate, compare_with_champion, decide
from danceopd.registry.logged_model import copy_without_weights, log_student
from danceopd.registry.measure_anew import MeasuredAnew
from danceopd.registry.versions import BEFORE, DECISION, EVALUATION, REASONS, RegisteredModel
from danceopd.tracking import delivery, journal, mlflow_store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

WEIGHTS = "weights"  # tag with the hash of the exported pipeline's weights
ADDED_TO = "added_to"  # in the lineage of a student that a champion was taught in its run: which version
LORA = "lora"
LINEAGE = ("recipe", "code", "git", "dvc", "data", "base", "teachers", "student")


@dataclass(frozen=True)
class Registration:
    """What came of it.

    Attributes:
        registered: whether the student is a version of the registered model.
        version: its number, or None.
        alias: the aliases it got, `champion` or `challenger`.
        reasons: why it was refused, or why it stayed challenger.
        champion_before: the version that was champion when this was decided, or None.
        run_id: the MLflow run that holds its figures and report, or None if it was refused.
    """

    registered: bool
    version: str | None
    alias: list[str]
    reasons: list[str]
    champion_before: str | None
    run_id: str | None


def register_student(
    recipe: Recipe,
    student: Path,
    evaluation: Path,
    lineage: Mapping[str, Any],
    tracking_uri: str,
    workspace: Path,
    champion: MeasuredAnew | None = None,
) -> Registration:
    """Register a student that holds its gates, and make it champion if it may be.

    The same student with the same evaluation is registered once: again, the answer is what was decided then.

    Args:
        recipe: names the registered model, the experiment, the gates and their margins.
        student: product folder: `pipeline/` and `proof.json`.
        evaluation: folder with `metrics.json` and the report.
        lineage: recipe, code, git, dvc, data (content hash), base, teachers (by name) and student digests; and
            `added_to` for a capability added to a champion.
        tracking_uri: of the MLflow store.
        workspace: folder for scratch files.
        champion: the champion as this run measured it, where its own figures cannot be compared.

    Raises:
        UserError: if a file or a part of the lineage is missing, the evaluation measured other gates, the export is
            not the one that was proved, or the store does not answer.
    """
    student, evaluation = Path(student), Path(evaluation)
    _check_lineage(lineage)
    measured = read_evaluation(evaluation, recipe)
    reasons = measured.failed_gates()
    if reasons:
        return Registration(False, None, [], reasons, None, None)
    model = RegisteredModel(mlflow_store.open_client(tracking_uri), recipe.register_as.model)
    if champion is not None and champion.measured is not None:
        measured = measured.beside(champion.measured, champion.model, champion.version)
    tags = version_tags(recipe, measured, lineage, hash_file(evaluation / METRICS))
    tags[WEIGHTS] = check_export(student)
    version = model.find_same(tags)
    if version is None:
        compared = compare_with_champion(model, recipe, Candidate(model.name, None, measured))
        entry = _Entry(recipe, student, evaluation, measured, compared, _origins(lineage), tags)
        version = _create_version(model, entry, tracking_uri, Path(workspace))
    if DECISION not in version.tags:  # new, or a registration that broke off here
        version = decide(model, recipe, version, measured, "" if champion is None else champion.reason)
    return _said(model, version)


def _said(model: RegisteredModel, version: ModelVersion) -> Registration:
    """What was decided on a version, as its tags tell it."""
    number, reasons = str(version.version), json.loads(version.tags[REASONS])
    alias = [name for name, of in model.aliases().items() if of == number]
    told = "".join(f"; {reason}" for reason in reasons)
    log.info("%s version %s: %s%s", model.name, number, ", ".join(alias) or "no alias", told)
    return Registration(True, number, alias, reasons, version.tags[BEFORE] or None, version.run_id)


@dataclass(frozen=True)
class _Entry:
    """What a version is made of: the student's and the evaluation's folders, what was measured, and its tags."""

    recipe: Recipe
    student: Path
    evaluation: Path
    measured: Measured
    champion: dict
    origins: dict
    tags: dict[str, str]


def _check_lineage(lineage: Mapping[str, Any]) -> None:
    for name in LINEAGE:
        if name not in lineage:
            raise UserError(f"lineage: {name!r} is missing; a version names {', '.join(LINEAGE)}")


def _origins(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """A lineage as the model card's table of origins."""
    plain = {name: lineage[name] for name in (ADDED_TO, *LINEAGE) if name != "teachers" and name in lineage}
    return plain | {f"teacher {name}": digest for name, digest in lineage["teachers"].items()}


def version_tags(recipe: Recipe, measured: Measured, lineage: Mapping[str, Any], evaluation: str) -> dict[str, str]:
    """What a version says of itself: its lineage, its evaluation, how it was measured, and its gates' figures."""
    tags = {name: str(lineage[name] or "none") for name in LINEAGE if name != "teachers"}
    tags |= {f"teacher.{name}": str(digest) for name, digest in lineage["teachers"].items()}
    tags |= {ADDED_TO: str(lineage[ADDED_TO])} if ADDED_TO in lineage else {}
    tags |= {"recipe_name": recipe.name, EVALUATION: evaluation}
    if measured.sampling is not None:
        tags["sampling"] = json.dumps(measured.sampling.model_dump(mode="json"), sort_keys=True)
    tags["measured"] = json.dumps(measured.conditions, sort_keys=True)
    for gate in measured.gates:
        tags[_tag(f"gate.{gate['task']}.{gate['metric']}")] = f"{figure(gate['value'])} ({gate['rule']})"
    return {_tag(name): value for name, value in tags.items()}


def _tag(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


def _create_version(model: RegisteredModel, entry: _Entry, uri: str, workspace: Path) -> ModelVersion:
    """Log figures, report and model in one run, then make it a version, with its tags from the start.

    The registered copy's model card has the figures; the student's own product stays as it was made.
    """
    recipe, client, lora = entry.recipe, model.client, entry.student / LORA
    workspace.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace) as scratch:
        exported = entry.student / PIPELINE
        pipeline = copy_without_weights(exported, Path(scratch) / PIPELINE)
        if (drawn := entry.measured.sampling) is not None:
            write_sampling(pipeline, drawn)  # as it was measured
        card = write_card(recipe, pipeline, lora.is_dir(), entry.origins, entry.measured.metrics)
        compared = _with_champion(entry, Path(scratch) / EVALUATION)
        artifacts = [(compared, EVALUATION), (card, ""), *([(lora, LORA)] if lora.is_dir() else [])]
        parent = delivery.parent_run(client, uri, workspace)
        run_id = mlflow_store.log_step(
            uri,
            recipe.register_as.experiment,
            f"register {recipe.name}",
            params=recipe.model_dump(mode="json"),
            tags=entry.tags | ({delivery.PARENT_TAG: parent} if parent else {}),
            artifacts=artifacts,
        )
        delivery.use_model(client, run_id, client.get_run(run_id).info.experiment_id, entry.tags["student"])
        with mlflow_store.current_store(uri) as mlflow, mlflow.start_run(run_id=run_id, nested=True):
            info = log_student(mlflow, client, pipeline, exported, workspace)
            mlflow_store.log_points(client, run_id, _points(entry), info.model_id, (recipe.name, entry.tags["data"]))
            return mlflow.register_model(info.model_uri, model.name, tags=entry.tags)


def _points(entry: _Entry) -> list[tuple[str, float, int, int]]:
    return [
        (f"{task}/{name}", value, journal.now(), 0)
        for task, row in entry.measured.scores.items()
        for name, value in row.items()
        if value is not None
    ]


def _with_champion(entry: _Entry, folder: Path) -> Path:
    """A copy of the evaluation whose figures and report also tell how the student compares with the champion."""
    shutil.copytree(entry.evaluation, folder)
    if entry.champion:
        from danceopd.evaluation.report import add_champion

        metrics, champion = entry.measured.metrics, entry.champion
        compared = metrics.get("comparisons", {}) | {"champion": champion["table"]}
        write_json(folder / METRICS, {**metrics, "comparisons": compared, "champion": champion["version"]})
        write_json(folder / VALUES, entry.measured.values)  # with the champion's, if it was measured anew
        if (folder / REPORT).is_file():
            write_atomic(folder / REPORT, add_champion((folder / REPORT).read_text(), champion, metrics))
    return folder
