"""The way of a student into the MLflow model registry: gates, proof of the export, version, aliases.

A student that holds its gates becomes a version with alias `challenger`; if no gate metric falls more than its margin
below the version called `champion`, it takes that alias over, and the old champion is called `previous`. The figures of
two versions are compared only if they were measured alike: the same data, split, records, steps and seed. Otherwise the
student stays challenger, and a person who has looked at both reports may move the alias (`danceopd registry promote`).
Where the other version was a teacher in the student's own run (a capability added to a champion), that run measured
both alike, and its figures of the other version are the ones that count.
Limits are held against means; the bootstrap intervals beside them say how sure those are.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd import delivery, journal, tracking
from danceopd.errors import UserError, unknown_name
from danceopd.files import hash_file, hash_folder, read_json, write_atomic, write_json
from danceopd.model_card import write_card
from danceopd.recipe import EvaluateRecipe, Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
WEIGHTS, WEIGHT_FILES = "weights", "**/*.safetensors"  # tag with the hash of the exported pipeline's weights
ADDED_TO = "added_to"  # in the lineage of a student that a champion was taught in its run: which version
PIPELINE, METRICS, VALUES, PROBE = "pipeline", "metrics.json", "values.json", "probe.safetensors"
REPORT, LORA = "report.html", "lora"
EVALUATION = "evaluation"  # folder of the run that holds the evaluation's files
LINEAGE = ("recipe", "code", "git", "dvc", "data", "base", "teachers", "student")
DECISION, REASONS, BEFORE = "decision", "reasons", "champion_before"
TOLERANCE = 1e-4
_ROUNDING = 1e-9
_REQUIREMENTS = (
    "mlflow",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "pydantic",
    "pyyaml",
)


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
        lineage: recipe, code, git, dvc, data (content hash), base, teachers (by name) and student digests; and
            `added_to` for a capability added to a champion.
        tracking_uri: of the MLflow store.
        workspace: folder for scratch files.

    Raises:
        UserError: if a file or a part of the lineage is missing, the evaluation measured other gates, the export does
            not give the student's velocity, or the store does not answer.
    """
    student, evaluation, model = Path(student), Path(evaluation), recipe.register_as.model
    _check_lineage(lineage)
    metrics = read_metrics(evaluation, recipe)
    values = read_json(evaluation / VALUES) if (evaluation / VALUES).is_file() else None
    reasons = failed_gates(metrics)
    if reasons:
        log.warning("not registered: %s", "; ".join(reasons))
        return Registration(False, None, [], reasons, None, None)
    client = tracking.open_client(tracking_uri)
    tags = version_tags(recipe, metrics, lineage, hash_file(evaluation / METRICS))
    tags[WEIGHTS] = hash_folder(student / PIPELINE, WEIGHT_FILES)
    version = _find_version(client, model, tags)
    if version is None:
        verify_export(student / PIPELINE, recipe, student / PROBE)
        champion = _compare_with_champion(client, recipe, _Measured(model, None, metrics, values, tags["data"]))
        origins = _origins(lineage)
        version = _create_version(
            client, recipe, student, evaluation, metrics, champion, origins, tags, tracking_uri, workspace
        )
    if DECISION not in version.tags:  # new, or a registration that broke off here
        version = _decide(client, recipe, version, metrics, values)
    reasons = json.loads(version.tags[REASONS])
    before = version.tags[BEFORE] or None
    alias = [name for name, number in _aliases(client, model).items() if number == str(version.version)]
    log.info(
        "%s version %s: %s%s",
        model,
        version.version,
        ", ".join(alias) or "no alias",
        "".join(f"; {r}" for r in reasons),
    )
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
    for task, spec in recipe.with_benchmarks().tasks.items():
        for gate in spec.gates:
            if (task, gate.metric) not in judged:
                raise UserError(f"{path}: the recipe's gate on {task}.{gate.metric} was not judged; evaluate again")
    return metrics


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _interval(low: float, high: float, metrics: dict) -> str:
    return f"{100 * _statistics(metrics)['confidence']:g} % interval {_figure(low)} to {_figure(high)}"


def _statistics(metrics: dict) -> dict[str, Any]:
    """How an evaluation's intervals are drawn."""
    default = EvaluateRecipe()
    plain = {"confidence": default.confidence, "resamples": default.resamples, "seed": default.seed}
    known = metrics.get("statistics", {}) | {"seed": metrics.get("seed")}
    return plain | {name: value for name, value in known.items() if value is not None}


def failed_gates(metrics: dict) -> list[str]:
    """One line a gate that does not hold, with task, metric, figures and interval; empty if all hold."""
    lines = [
        f"{g['task']}.{g['metric']} is {_figure(g['value'])}, its gate is {_figure(g['limit'])} ({g['rule']})"
        + (f", {_interval(*g['interval'], metrics)}" if g.get("interval") else "")
        + (f": {g['reason']}" if g.get("reason") else "")
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


def _origins(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """A lineage as the model card's table of origins."""
    plain = {name: lineage[name] for name in (ADDED_TO, *LINEAGE) if name != "teachers" and name in lineage}
    return plain | {f"teacher {name}": digest for name, digest in lineage["teachers"].items()}


def version_tags(recipe: Recipe, metrics: dict, lineage: Mapping[str, Any], evaluation: str) -> dict[str, str]:
    """What a version says of itself: its lineage, its evaluation, how it was measured, and its gates' figures."""
    tags = {name: str(lineage[name] or "none") for name in LINEAGE if name != "teachers"}
    tags |= {f"teacher.{name}": str(digest) for name, digest in lineage["teachers"].items()}
    tags |= {ADDED_TO: str(lineage[ADDED_TO])} if ADDED_TO in lineage else {}
    tags |= {"recipe_name": recipe.name, EVALUATION: evaluation}
    tags["measured"] = json.dumps(_conditions(metrics, tags["data"]), sort_keys=True)
    for gate in metrics["gates"]:
        tags[_tag(f"gate.{gate['task']}.{gate['metric']}")] = f"{_figure(gate['value'])} ({gate['rule']})"
    return {_tag(name): value for name, value in tags.items()}


def _tag(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


def _conditions(metrics: dict, data: str) -> dict[str, Any]:
    conditions = {name: metrics.get(name) for name in ("split", "steps", "seed")}
    records = dict(metrics.get("records", {}))
    records |= {name: [records.get(name), b["content"]] for name, b in metrics.get("benchmarks", {}).items()}
    return {"data": data, "records": records, **conditions}


def _find_version(client: MlflowClient, model: str, tags: Mapping[str, str]) -> Any | None:
    same = f"name = '{model}' and tags.student = '{tags['student']}' and tags.evaluation = '{tags[EVALUATION]}'"
    found = client.search_model_versions(same)
    return max(found, key=lambda v: int(v.version)) if found else None


def _create_version(
    client: MlflowClient,
    recipe: Recipe,
    student: Path,
    evaluation: Path,
    metrics: dict,
    champion: dict,
    origins: dict,
    tags: dict[str, str],
    uri: str,
    workspace: Path,
) -> Any:
    """Log figures, report and model in one run, then make it a version, with its tags from the start.

    The registered copy's model card has the figures; the student's own product stays as it was made.
    """
    scores = {
        f"{task}/{name}": value
        for task, row in metrics["scores"]["student"].items()
        for name, value in row.items()
        if value is not None
    }
    Path(workspace).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace) as scratch:
        pipeline = Path(scratch) / PIPELINE
        shutil.copytree(student / PIPELINE, pipeline, copy_function=_link)  # weights are large, and stay as they are
        card = write_card(recipe, pipeline, (student / LORA).is_dir(), origins, metrics)
        artifacts = [
            (_with_champion(evaluation, metrics, champion, Path(scratch) / EVALUATION), EVALUATION),
            (card, ""),
        ]
        if (student / LORA).is_dir():
            artifacts.append((student / LORA, LORA))
        parent = delivery.parent_run(client, uri, Path(workspace))
        run_id = tracking.log_step(
            uri,
            recipe.register_as.experiment,
            f"register {recipe.name}",
            params=recipe.model_dump(mode="json"),
            tags=tags | ({delivery.PARENT_TAG: parent} if parent else {}),
            artifacts=artifacts,
        )
        delivery.use_model(client, run_id, client.get_run(run_id).info.experiment_id, tags["student"])
        with tracking.current_store(uri) as mlflow, mlflow.start_run(run_id=run_id, nested=True):
            info = _log_model(mlflow, pipeline, Path(workspace))
            points = [(name, value, journal.now(), 0) for name, value in scores.items()]
            tracking.log_points(client, run_id, points, info.model_id, (recipe.name, tags["data"]))
            return mlflow.register_model(info.model_uri, recipe.register_as.model, tags=tags)


def _link(source: str, target: str) -> None:
    """The same file under another name, or a copy where the two places do not share a file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _with_champion(evaluation: Path, metrics: dict, champion: dict, folder: Path) -> Path:
    """A copy of an evaluation whose figures and report also tell how the student compares with the champion."""
    shutil.copytree(evaluation, folder)
    if champion:
        from danceopd.evaluation.report import add_champion

        compared = metrics.get("comparisons", {}) | {"champion": champion["table"]}
        write_json(folder / METRICS, metrics | {"comparisons": compared, "champion": champion["version"]})
        if (folder / REPORT).is_file():
            page = add_champion((folder / REPORT).read_text(), champion, metrics)
            write_atomic(folder / REPORT, page)
    return folder


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


def _version_file(client: MlflowClient, version: Any, name: str) -> dict:
    from mlflow.exceptions import MlflowException

    where = f"{version.name} version {version.version}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return read_json(Path(client.download_artifacts(version.run_id, f"{EVALUATION}/{name}", scratch)))
        except (MlflowException, OSError) as error:
            raise UserError(f"{where}: its run holds no {EVALUATION}/{name}, so it cannot be compared") from error


def _version_metrics(client: MlflowClient, version: Any) -> dict:
    return _version_file(client, version, METRICS)


def _version_values(client: MlflowClient, version: Any) -> dict | None:
    """A version's per-record values, or None if it was registered without."""
    try:
        return _version_file(client, version, VALUES)
    except UserError:
        return None


@dataclass(frozen=True)
class _Measured:
    """A version, or a student that is to be one (no number yet), with what an evaluation measured of it.

    Attributes:
        model: name of the registered model.
        number: of the version, or None.
        metrics: its `metrics.json`.
        values: its `values.json`, or None.
        data: content hash of the dataset.
    """

    model: str
    number: str | None
    metrics: dict
    values: dict | None
    data: str

    def of(self, other: _Measured) -> _Measured | None:
        """The other version as this evaluation measured it, or None if it did not: it was no teacher in this run."""
        wanted = {"model": other.model, "version": other.number}
        field = next((name for name, of in self.metrics.get("versions", {}).items() if of == wanted), None)
        if field is None:
            return None
        scores = self.metrics["scores"] | {"student": self.metrics["scores"][field]}
        metrics = self.metrics | {"scores": scores, "gates": other.metrics.get("gates", [])}
        values = None if self.values is None else self.values | {"student": self.values[field]}
        return _Measured(other.model, other.number, metrics, values, self.data)


def _measured_version(client: MlflowClient, version: Any) -> _Measured:
    metrics, values = _version_metrics(client, version), _version_values(client, version)
    return _Measured(version.name, str(version.version), metrics, values, version.tags.get("data", "none"))


def _side_by_side(ours: _Measured, theirs: _Measured) -> tuple[_Measured, _Measured, list[str]]:
    """Both as one evaluation measured them, if one did; and what they were measured differently on."""
    if (again := ours.of(theirs)) is not None:
        return ours, again, []
    if (again := theirs.of(ours)) is not None:
        return again, theirs, []
    return ours, theirs, measured_unlike(_conditions(ours.metrics, ours.data), _conditions(theirs.metrics, theirs.data))


def _decide(client: MlflowClient, recipe: Recipe, version: Any, metrics: dict, values: dict | None) -> Any:
    """Compare with the champion, move the aliases, and note the decision on the version."""
    model, number = version.name, str(version.version)
    client.set_registered_model_alias(model, CHALLENGER, number)
    champion = current_champion(client, model)
    if champion is not None and str(champion.version) == number:  # broke off after the alias was moved
        champion = None
    reasons = [] if champion is None else _against(client, recipe, version, metrics, values, champion)
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
    client: MlflowClient, recipe: Recipe, version: Any, metrics: dict, values: dict | None, champion: Any
) -> list[str]:
    """Why a student may not take over from the champion; empty if it may."""
    model, number, who = champion.name, version.version, f"champion (version {champion.version})"
    by_hand = (
        f"compare both reports, and if version {number} shall serve, set the alias '{CHAMPION}' on it "
        f"(danceopd registry promote {number} --force keeps the old one as '{PREVIOUS}')"
    )
    try:
        found = _measured_version(client, champion)
    except UserError as error:
        return [f"the {who} cannot be compared with: {error}; {by_hand}"]
    mine = _Measured(model, str(number), metrics, values, version.tags.get("data", "none"))
    ours, theirs, unlike = _side_by_side(mine, found)
    if unlike:
        return [
            f"the {who} of {model} was measured on other {', '.join(unlike)}, so its figures cannot be compared; "
            f"{by_hand}"
        ]
    return below_champion(recipe, ours.metrics, theirs.metrics, who, _paired(recipe, ours, theirs))


def _paired(recipe: Recipe, ours: _Measured, theirs: _Measured) -> dict:
    """The student beside another version, paired by record: {task: {metric: comparison}}; {} without values."""
    from danceopd.evaluation.statistics import compare_values

    if ours.values is None or theirs.values is None:
        return {}
    tasks = recipe.with_benchmarks().tasks
    margins = {task: {gate.metric: gate.champion_margin for gate in spec.gates} for task, spec in tasks.items()}
    settings = _statistics(ours.metrics)
    return compare_values(ours.values, theirs.values, margins, f"version {theirs.number}", settings)


def _compare_with_champion(client: MlflowClient, recipe: Recipe, mine: _Measured) -> dict[str, Any]:
    """{"version", "scores", "table"} of the champion if it was measured alike, else {}."""
    champion = current_champion(client, recipe.register_as.model)
    if champion is None:
        return {}
    try:
        found = _measured_version(client, champion)
    except UserError:
        return {}
    ours, theirs, unlike = _side_by_side(mine, found)
    table = {} if unlike else _paired(recipe, ours, theirs)
    scores = theirs.metrics["scores"]["student"]
    return {"version": str(champion.version), "scores": scores, "table": table} if table else {}


def _difference(found: Mapping[str, Any] | None, metrics: dict) -> str:
    if found is None:
        return ""
    return f", difference {_figure(found['difference'])}, {_interval(found['low'], found['high'], metrics)}"


def measured_unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between two measurements; their record counts are compared for the tasks both have."""
    unlike = [name for name in ("data", "split", "steps", "seed") if ours[name] != theirs[name]]
    shared = set(ours["records"]) & set(theirs["records"])
    if any(ours["records"][task] != theirs["records"][task] for task in shared):
        unlike.append("records")
    return unlike


def below_champion(
    recipe: Recipe, ours: dict, theirs: dict, who: str, paired: Mapping[str, Mapping[str, dict | None]] | None = None
) -> list[str]:
    """One line a gate metric on which the student falls more than its margin below the champion, or lacks it.

    Where `paired` has the comparison record by record, the line shows the interval of the difference.
    """
    mine, other = ours["scores"]["student"], theirs["scores"]["student"]
    lines = []
    for task, spec in recipe.with_benchmarks().tasks.items():
        for gate in spec.gates:
            value, bar = mine.get(task, {}).get(gate.metric), other.get(task, {}).get(gate.metric)
            if bar is not None and (value is None or not value >= bar - gate.champion_margin - _ROUNDING):
                lines.append(
                    f"{task}.{gate.metric} is {_figure(value)}, the {who} has {_figure(bar)} "
                    f"(margin {gate.champion_margin:g})"
                    + _difference((paired or {}).get(task, {}).get(gate.metric), ours)
                )
    gated = {gate["task"] for gate in theirs.get("gates", [])} - set(theirs.get("benchmarks", {}))
    lines += [f"the {who} also does task {task!r}, this student does not" for task in sorted(gated - set(mine))]
    return lines


# ---------------------------------------------------------------------------------------------------------- by command


@dataclass(frozen=True)
class VersionLine:
    """One version as a list shows it.

    Attributes:
        version: its number.
        aliases: the names it goes by.
        created: milliseconds since 1970.
        tags: its lineage, gates' figures and the decision.
    """

    version: str
    aliases: list[str]
    created: int
    tags: dict[str, str]

    @property
    def reasons(self) -> list[str]:
        """Why it did not become champion, or could not be compared."""
        return json.loads(self.tags.get(REASONS, "[]"))

    @property
    def decision(self) -> str:
        """What was decided on it, and why."""
        said = self.tags.get(DECISION, "undecided")
        return f"{said}: {'; '.join(self.reasons)}" if self.reasons else said


def open_registry(tracking_uri: str, model: str) -> MlflowClient:
    """A client of a store that holds a registered model.

    Raises:
        UserError: if there is no store, it does not answer, or it knows no such model.
    """
    tracking.require_store(tracking_uri)
    client = tracking.open_client(tracking_uri)
    known = [found.name for found in client.search_registered_models()]
    if model not in known:
        raise unknown_name("registered model (register_as.model)", model, known or ["(none yet)"])
    return client


def find_version(client: MlflowClient, model: str, name: str) -> Any:
    """A model version by its number or by an alias.

    Raises:
        UserError: if there is none, listing what there is.
    """
    aliases = _aliases(client, model)
    numbers = [str(v.version) for v in client.search_model_versions(f"name = '{model}'")]
    number = aliases.get(name, name)
    if number not in numbers:
        raise unknown_name(f"version of {model}", name, [*aliases, *numbers])
    return client.get_model_version(model, number)


def list_versions(client: MlflowClient, model: str) -> list[VersionLine]:
    """All versions of a model, the newest first."""
    names: dict[str, list[str]] = {}
    for alias, number in sorted(_aliases(client, model).items()):
        names.setdefault(number, []).append(alias)
    found = sorted(client.search_model_versions(f"name = '{model}'"), key=lambda v: -int(v.version))
    return [
        VersionLine(str(v.version), names.get(str(v.version), []), int(v.creation_timestamp), dict(v.tags))
        for v in found
    ]


def promote_checked(client: MlflowClient, recipe: Recipe, name: str, force: bool) -> tuple[str, str | None]:
    """Make a version champion if it holds its gates and, unless forced, is no worse than the champion.

    Args:
        client: of the store.
        recipe: names the model, the gates and their margins.
        name: the version's number or alias.
        force: promote it although it is worse than the champion, or cannot be compared; never although a gate fails.

    Returns:
        The champion's number now and before (None: there was none).

    Raises:
        UserError: with task, figures and interval, if it may not be promoted.
    """
    model = recipe.register_as.model
    version = find_version(client, model, name)
    number, champion = str(version.version), current_champion(client, model)
    before = None if champion is None else str(champion.version)
    if before == number:
        return number, before
    metrics = _version_metrics(client, version)
    failed = failed_gates(metrics)
    if failed:
        raise UserError(f"{model} version {number} fails its gates and is not promoted: {'; '.join(failed)}")
    if champion is not None and not force:
        reasons = _against(client, recipe, version, metrics, _version_values(client, version), champion)
        if reasons:
            raise UserError(f"{model} version {number} is not promoted: {'; '.join(reasons)}; --force does it anyway")
    promote(client, model, number)
    return number, before


def rollback(client: MlflowClient, model: str) -> tuple[str, str | None]:
    """Make the version called `previous` champion again; the champion is called `previous` then.

    Returns:
        The champion's number now and before (None: there was none).

    Raises:
        UserError: if no version is called `previous`.
    """
    aliases = _aliases(client, model)
    if PREVIOUS not in aliases:
        raise UserError(
            f"{model}: no version is called '{PREVIOUS}', so there is nothing to go back to; promote one by its number"
        )
    old, back = aliases.get(CHAMPION), aliases[PREVIOUS]
    client.set_registered_model_alias(model, CHAMPION, back)
    if old:
        client.set_registered_model_alias(model, PREVIOUS, old)
    else:
        client.delete_registered_model_alias(model, PREVIOUS)
    return back, old


ACTIONS = ("promote", "rollback")


def move_champion(
    client: MlflowClient, recipe: Recipe, action: str, version: str = CHALLENGER, force: bool = False
) -> tuple[str, str | None]:
    """Promote a version or roll back, as a person or a pipeline asks for it by name.

    Args:
        client: of the store.
        recipe: names the model, the gates and their margins.
        action: one of `ACTIONS`.
        version: what to promote, a number or an alias; a rollback has no use for it.
        force: see `promote_checked`.

    Returns:
        The champion's number now and before (None: there was none).

    Raises:
        UserError: if the action is none, or it may not be done.
    """
    if action not in ACTIONS:
        raise unknown_name("action on the registry", action, ACTIONS)
    if action == "promote":
        return promote_checked(client, recipe, version, force)
    return rollback(client, recipe.register_as.model)


def say_champion(model: str, now: str, before: str | None) -> str:
    """Who is champion now and who was before, in one line."""
    return f"{model}: champion is version {now}" + ("" if before in (None, now) else f", previous is {before}")


def versions_markdown(client: MlflowClient, model: str) -> str:
    """All versions of a model as a Markdown table: aliases, decision and its reasons."""
    lines = [f"# {model}", "", "| version | aliases | decision |", "|---|---|---|"]
    for line in list_versions(client, model):
        lines.append(f"| {line.version} | {', '.join(line.aliases)} | {line.decision} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class VersionsCompared:
    """Two versions side by side.

    Attributes:
        ours: the first version's number.
        theirs: the second's.
        unlike: what they were measured differently on; if anything, there is no comparison.
        scores: (task, metric, first, second) of every figure that either has.
        table: {task: {metric: comparison}} of the first beside the second, where both have values.
    """

    ours: str
    theirs: str
    unlike: list[str]
    scores: list[tuple[str, str, float | None, float | None]]
    table: dict[str, dict[str, dict | None]]


def compare_versions(client: MlflowClient, recipe: Recipe, first: str, second: str) -> VersionsCompared:
    """Compare two versions, each by its number or alias; margins are the recipe's `champion_margin`.

    Raises:
        UserError: if one is unknown, or its figures are gone.
    """
    one, two = (find_version(client, recipe.register_as.model, name) for name in (first, second))
    ours, theirs, unlike = _side_by_side(_measured_version(client, one), _measured_version(client, two))
    table = {} if unlike else _paired(recipe, ours, theirs)
    mine, other = ours.metrics["scores"]["student"], theirs.metrics["scores"]["student"]
    names = {(task, name): None for row in (mine, other) for task in row for name in row[task]}
    scores = [(t, n, mine.get(t, {}).get(n), other.get(t, {}).get(n)) for t, n in names]
    return VersionsCompared(str(one.version), str(two.version), unlike, scores, table)
