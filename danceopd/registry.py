"""The way of a student into the MLflow model registry: gates, proof of the export, version, aliases.

A student that holds its gates becomes a version with alias `challenger`; if no gate metric falls more than its margin
below the version called `champion`, it takes that alias over, and the old champion is called `previous`. The figures of
two versions are compared only if they were measured alike: the same data, split, records, steps and seed. Otherwise the
student stays challenger, and a person who has looked at both reports may move the alias.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd import tracking
from danceopd.errors import UserError
from danceopd.files import hash_file, read_json
from danceopd.recipe import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
PIPELINE, METRICS, PROBE = "pipeline", "metrics.json", "probe.safetensors"
EVALUATION = "evaluation"  # folder of the run that holds the evaluation's files
LINEAGE = ("recipe", "code", "git", "dvc", "data", "base", "teachers", "student")
DECISION, REASONS, BEFORE = "decision", "reasons", "champion_before"
TOLERANCE = 1e-4
_ROUNDING = 1e-9
_REQUIREMENTS = (
    "mlflow", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pandas", "pillow", "pyarrow",
    "pydantic", "pyyaml",
)  # fmt: skip


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
    recipe: Recipe, student: Path, evaluation: Path, lineage: Mapping[str, Any], tracking_uri: str, workspace: Path
) -> Registration:
    """Register a student that holds its gates, and make it champion if it may be.

    The same student with the same evaluation is registered once: again, the answer is what was decided then.

    Args:
        recipe: names the registered model, the experiment, the gates and their margins.
        student: product folder: `pipeline/` and `probe.safetensors`.
        evaluation: folder with `metrics.json` and the report.
        lineage: recipe, code, git, dvc, data (content hash), base, teachers (by name) and student digests.
        tracking_uri: of the MLflow store.
        workspace: folder for scratch files.

    Raises:
        UserError: if a file or a part of the lineage is missing, the evaluation measured other gates, the export does
            not give the student's velocity, or the store does not answer.
    """
    student, evaluation, model = Path(student), Path(evaluation), recipe.register_as.model
    _check_lineage(lineage)
    metrics = read_metrics(evaluation, recipe)
    reasons = failed_gates(metrics)
    if reasons:
        log.warning("not registered: %s", "; ".join(reasons))
        return Registration(False, None, [], reasons, None, None)
    client = tracking.open_client(tracking_uri)
    tags = version_tags(recipe, metrics, lineage, hash_file(evaluation / METRICS))
    version = _find_version(client, model, tags)
    if version is None:
        verify_export(student / PIPELINE, recipe, student / PROBE)
        version = _create_version(recipe, student, evaluation, metrics, tags, tracking_uri, workspace)
    if DECISION not in version.tags:  # new, or a registration that broke off here
        version = _decide(client, recipe, version, metrics, tags)
    reasons = json.loads(version.tags[REASONS])
    before = version.tags[BEFORE] or None
    alias = [name for name, number in _aliases(client, model).items() if number == str(version.version)]
    log.info("%s version %s: %s%s", model, version.version, ", ".join(alias) or "no alias",
             "".join(f"; {r}" for r in reasons))  # fmt: skip
    return Registration(True, str(version.version), alias, reasons, before, version.run_id)


# --------------------------------------------------------------------------------------------------------------- gates


def read_metrics(evaluation: Path, recipe: Recipe) -> dict:
    """The figures of an evaluation.

    Raises:
        UserError: if they are missing, or a gate of the recipe was not judged.
    """
    path = Path(evaluation) / METRICS
    metrics = read_json(path)
    if not isinstance(metrics, dict) or "gates" not in metrics or "student" not in metrics.get("scores", {}):
        raise UserError(f"{path}: no scores of a student, or no gates; evaluate the student again")
    judged = {(gate["task"], gate["metric"]) for gate in metrics["gates"]}
    for task, spec in recipe.tasks.items():
        for gate in spec.gates:
            if (task, gate.metric) not in judged:
                raise UserError(f"{path}: the recipe's gate on {task}.{gate.metric} was not judged; evaluate again")
    return metrics


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def failed_gates(metrics: dict) -> list[str]:
    """One line a gate that does not hold, with task, metric and figures; empty if all hold."""
    lines = [
        f"{g['task']}.{g['metric']} is {_figure(g['value'])}, its gate is {_figure(g['limit'])} ({g['rule']})"
        for g in metrics["gates"]
        if not g["passed"]
    ]
    return lines if lines or metrics["passed"] else ["the evaluation did not pass"]


# -------------------------------------------------------------------------------------------------------------- export


def verify_export(pipeline: Path, recipe: Recipe, probe_reference: Path) -> float:
    """Read an exported pipeline back, as a user would, and compare its velocity with the trained student's.

    Args:
        pipeline: the exported folder.
        recipe: its name is one of the two probe prompts; the other is empty.
        probe_reference: safetensors file with `velocity` (2, N, C), taken from the student in memory.

    Returns:
        The greatest absolute difference, at most `TOLERANCE` off.

    Raises:
        UserError: if the reference is missing, or the velocity is another.
    """
    import torch
    from safetensors.torch import load_file

    from danceopd.backbones import Condition
    from danceopd.checkpoint import probe
    from danceopd.generate import open_student

    if not Path(probe_reference).is_file():
        raise UserError(f"{probe_reference}: no such file; distill the student again, so that its export can be proved")
    wanted = load_file(probe_reference).get("velocity")
    if wanted is None:
        raise UserError(f"{probe_reference}: holds no 'velocity'; distill the student again")
    drawer = open_student(pipeline)
    settings, prompts = drawer.settings, drawer.field.backbone.encode_prompts(["", recipe.name])
    found = probe(drawer.field, Condition(prompts, None, settings.height, settings.width))
    if found.shape != wanted.shape:
        shapes = f"{tuple(found.shape)}, the trained student's is {tuple(wanted.shape)}"
        raise UserError(f"{pipeline}: the velocity's shape is {shapes}; export the student again")
    difference = float((found - wanted).abs().max())
    if not torch.allclose(found, wanted, atol=TOLERANCE):
        raise UserError(
            f"{pipeline}: the exported student is not the trained one (its velocity differs by {difference:.3g}); "
            "the files were changed or the export is broken: distill the student again"
        )
    return difference


# ------------------------------------------------------------------------------------------------------------- version


def _check_lineage(lineage: Mapping[str, Any]) -> None:
    for name in LINEAGE:
        if name not in lineage:
            raise UserError(f"lineage: {name!r} is missing; a version names {', '.join(LINEAGE)}")


def version_tags(recipe: Recipe, metrics: dict, lineage: Mapping[str, Any], evaluation: str) -> dict[str, str]:
    """What a version says of itself: its lineage, its evaluation, how it was measured, and its gates' figures."""
    tags = {name: str(lineage[name] or "none") for name in LINEAGE if name != "teachers"}
    tags |= {f"teacher.{name}": str(digest) for name, digest in lineage["teachers"].items()}
    tags |= {"recipe_name": recipe.name, EVALUATION: evaluation}
    tags["measured"] = json.dumps(_measured(metrics, tags["data"]), sort_keys=True)
    for gate in metrics["gates"]:
        tags[_tag(f"gate.{gate['task']}.{gate['metric']}")] = f"{_figure(gate['value'])} ({gate['rule']})"
    return {_tag(name): value for name, value in tags.items()}


def _tag(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


def _measured(metrics: dict, data: str) -> dict[str, Any]:
    conditions = {name: metrics.get(name) for name in ("split", "steps", "seed")}
    return {"data": data, "records": metrics.get("records", {}), **conditions}


def _find_version(client: MlflowClient, model: str, tags: Mapping[str, str]) -> Any | None:
    same = f"name = '{model}' and tags.student = '{tags['student']}' and tags.evaluation = '{tags[EVALUATION]}'"
    found = client.search_model_versions(same)
    return max(found, key=lambda v: int(v.version)) if found else None


def _create_version(
    recipe: Recipe, student: Path, evaluation: Path, metrics: dict, tags: dict[str, str], uri: str, workspace: Path
) -> Any:
    """Log figures, report and model in one run, then make it a version, with its tags from the start."""
    scores = {f"{task}/{name}": value for task, row in metrics["scores"]["student"].items()
              for name, value in row.items() if value is not None}  # fmt: skip
    run_id = tracking.log_step(
        uri, recipe.register_as.experiment, f"register {recipe.name}",
        params=recipe.model_dump(mode="json"), metrics=scores, tags=tags, artifacts=[(evaluation, EVALUATION)],
    )  # fmt: skip
    with tracking.current_store(uri) as mlflow, mlflow.start_run(run_id=run_id, nested=True):
        info = _log_model(mlflow, student / PIPELINE, Path(workspace))
        return mlflow.register_model(info.model_uri, recipe.register_as.model, tags=tags)


def _log_model(mlflow: Any, pipeline: Path, workspace: Path) -> Any:
    import pandas as pd

    from danceopd import pyfunc_model

    workspace.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace) as scratch:
        package = Path(pyfunc_model.__file__).parent
        code = Path(scratch) / package.name
        shutil.copytree(package, code, ignore=_all_but_code)
        return mlflow.pyfunc.log_model(
            name="student",
            python_model=pyfunc_model.__file__,
            artifacts={PIPELINE: str(pipeline)},
            code_paths=[str(code)],
            signature=pyfunc_model.signature(),
            input_example=(pd.DataFrame({"prompt": ["a picture"], "seed": [0]}), {"steps": 1}),
            pip_requirements=_requirements(),
        )


def _all_but_code(folder: str, names: list[str]) -> list[str]:
    return [n for n in names if n == "__pycache__" or not (n.endswith(".py") or (Path(folder) / n).is_dir())]


def _requirements() -> list[str]:
    """The packages a served student needs, as installed here; a build's local label is left out."""
    return [f"{name}=={installed_version(name).split('+')[0]}" for name in _REQUIREMENTS]


# ------------------------------------------------------------------------------------------------------------ champion


def _aliases(client: MlflowClient, model: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        return {alias: str(number) for alias, number in client.get_registered_model(model).aliases.items()}
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return {}
        raise


def current_champion(client: MlflowClient, model: str) -> Any | None:
    """The model version called champion, or None."""
    number = _aliases(client, model).get(CHAMPION)
    return None if number is None else client.get_model_version(model, number)


def load_champion_metrics(client: MlflowClient, model: str) -> dict | None:
    """The champion's `metrics.json`, or None if there is no champion.

    Raises:
        UserError: if there is a champion whose figures cannot be read.
    """
    champion = current_champion(client, model)
    return None if champion is None else _version_metrics(client, champion)


def _version_metrics(client: MlflowClient, version: Any) -> dict:
    from mlflow.exceptions import MlflowException

    where = f"{version.name} version {version.version}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return read_json(Path(client.download_artifacts(version.run_id, f"{EVALUATION}/{METRICS}", scratch)))
        except (MlflowException, OSError) as error:
            raise UserError(f"{where}: its run holds no {EVALUATION}/{METRICS}, so it cannot be compared") from error


def champion_summary(tracking_uri: str, model: str) -> dict[str, Any] | None:
    """The champion in short: version, run_id, tags and the student's scores (None if unreadable); None without one.

    Raises:
        UserError: if the store does not answer.
    """
    client = tracking.open_client(tracking_uri)
    champion = current_champion(client, model)
    if champion is None:
        return None
    try:
        scores = _version_metrics(client, champion)["scores"]["student"]
    except (UserError, KeyError):
        scores = None
    return {"version": str(champion.version), "run_id": champion.run_id, "tags": dict(champion.tags), "scores": scores}


def _decide(client: MlflowClient, recipe: Recipe, version: Any, metrics: dict, tags: Mapping[str, str]) -> Any:
    """Compare with the champion, move the aliases, and note the decision on the version."""
    model, number = version.name, str(version.version)
    client.set_registered_model_alias(model, CHALLENGER, number)
    champion = current_champion(client, model)
    if champion is not None and str(champion.version) == number:  # broke off after the alias was moved
        champion = None
    reasons = [] if champion is None else _against(client, recipe, number, metrics, tags, champion)
    if not reasons:
        promote(client, model, number)
    decision = CHALLENGER if reasons else CHAMPION
    before = "" if champion is None else str(champion.version)
    for name, value in ((BEFORE, before), (REASONS, json.dumps(reasons)), (DECISION, decision)):
        client.set_model_version_tag(model, number, name, value)
    return client.get_model_version(model, number)


def promote(client: MlflowClient, model: str, version: str) -> None:
    """Make a version the champion; the champion before it is called `previous`."""
    aliases = _aliases(client, model)
    old = aliases.get(CHAMPION)
    if old is not None and old != version:
        client.set_registered_model_alias(model, PREVIOUS, old)
    client.set_registered_model_alias(model, CHAMPION, version)
    if aliases.get(CHALLENGER) == version:
        client.delete_registered_model_alias(model, CHALLENGER)


def _against(
    client: MlflowClient, recipe: Recipe, number: str, metrics: dict, tags: Mapping[str, str], champion: Any
) -> list[str]:
    """Why a student may not take over from the champion; empty if it may."""
    model, who = champion.name, f"champion (version {champion.version})"
    by_hand = (f"compare both reports, and if version {number} shall serve, set the alias '{CHAMPION}' on it in MLflow "
               f"(danceopd.registry.promote does it and keeps the old one as '{PREVIOUS}')")  # fmt: skip
    try:
        theirs = _version_metrics(client, champion)
    except UserError as error:
        return [f"the {who} cannot be compared with: {error}; {by_hand}"]
    unlike = measured_unlike(_measured(metrics, tags["data"]), _measured(theirs, champion.tags.get("data", "none")))
    if unlike:
        return [f"the {who} of {model} was measured on other {', '.join(unlike)}, so its figures cannot be compared; "
                f"{by_hand}"]  # fmt: skip
    return below_champion(recipe, metrics, theirs, who)


def measured_unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between two measurements; their record counts are compared for the tasks both have."""
    unlike = [name for name in ("data", "split", "steps", "seed") if ours[name] != theirs[name]]
    shared = set(ours["records"]) & set(theirs["records"])
    if any(ours["records"][task] != theirs["records"][task] for task in shared):
        unlike.append("records")
    return unlike


def below_champion(recipe: Recipe, ours: dict, theirs: dict, who: str) -> list[str]:
    """One line a gate metric on which the student falls more than its margin below the champion, or lacks it."""
    mine, other = ours["scores"]["student"], theirs["scores"]["student"]
    lines = []
    for task, spec in recipe.tasks.items():
        for gate in spec.gates:
            value, bar = mine.get(task, {}).get(gate.metric), other.get(task, {}).get(gate.metric)
            if bar is not None and (value is None or not value >= bar - gate.champion_margin - _ROUNDING):
                lines.append(f"{task}.{gate.metric} is {_figure(value)}, the {who} has {_figure(bar)} "
                             f"(margin {gate.champion_margin:g})")  # fmt: skip
    gated = {gate["task"] for gate in theirs.get("gates", [])}
    lines += [f"the {who} also does task {task!r}, this student does not" for task in sorted(gated - set(mine))]
    return lines
