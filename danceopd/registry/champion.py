"""Which version serves: a student beside the champion, the decision, and moving the champion by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from danceopd.config.recipe import Recipe
from danceopd.errors import UserError, unknown_name
from danceopd.evaluation.measured import Measured, figure
from danceopd.registry.versions import BEFORE, CHALLENGER, CHAMPION, DECISION, PREVIOUS, REASONS, RegisteredModel

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_ROUNDING = 1e-9
ACTIONS = ("promote", "rollback")


@dataclass(frozen=True)
class Candidate:
    """A version, or a student that is to be one, with what an evaluation measured of it.

    Attributes:
        model: name of the registered model.
        number: of the version; None for a student that has none yet.
        measured: its figures.
        data: content hash of the dataset it was evaluated on.
    """

    model: str
    number: str | None
    measured: Measured
    data: str


def candidate(model: RegisteredModel, version: ModelVersion) -> Candidate:
    """A registered version with its figures.

    Raises:
        UserError: if its run holds none.
    """
    return Candidate(model.name, str(version.version), model.measured(version), version.tags.get("data", "none"))


def side_by_side(ours: Candidate, theirs: Candidate) -> tuple[Measured, Measured, list[str]]:
    """Both as one evaluation measured them, if one did; and what they were measured differently on."""
    if (again := ours.measured.version(theirs.model, theirs.number)) is not None:
        return ours.measured, again, []
    if (again := theirs.measured.version(ours.model, ours.number)) is not None:
        return again, theirs.measured, []
    unlike = measured_unlike(ours.measured.conditions(ours.data), theirs.measured.conditions(theirs.data))
    return ours.measured, theirs.measured, unlike


def measured_unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between two measurements; their record counts are compared for the tasks both have."""
    unlike = [name for name in ("data", "split", "steps", "seed") if ours[name] != theirs[name]]
    shared = set(ours["records"]) & set(theirs["records"])
    if any(ours["records"][task] != theirs["records"][task] for task in shared):
        unlike.append("records")
    return unlike


def decide(model: RegisteredModel, recipe: Recipe, version: ModelVersion, measured: Measured) -> ModelVersion:
    """Compare with the champion, move the aliases, and note the decision on the version."""
    number = str(version.version)
    model.set_alias(CHALLENGER, number)
    champion = model.champion()
    if champion is not None and str(champion.version) == number:  # broke off after the alias was moved
        champion = None
    mine = Candidate(model.name, number, measured, version.tags.get("data", "none"))
    reasons = [] if champion is None else against(model, recipe, mine, champion)
    if not reasons:
        model.promote(number)
    decision = CHALLENGER if reasons else CHAMPION
    before = "" if champion is None else str(champion.version)
    for name, value in ((BEFORE, before), (REASONS, json.dumps(reasons)), (DECISION, decision)):
        model.client.set_model_version_tag(model.name, number, name, value)
    return model.version(number)


def against(model: RegisteredModel, recipe: Recipe, mine: Candidate, champion: ModelVersion) -> list[str]:
    """Why a version may not take over from the champion; empty if it may."""
    who = f"champion (version {champion.version})"
    by_hand = (
        f"compare both reports, and if version {mine.number} shall serve, set the alias '{CHAMPION}' on it "
        f"(danceopd registry promote {mine.number} --force keeps the old one as '{PREVIOUS}')"
    )
    try:
        found = candidate(model, champion)
    except UserError as error:
        return [f"the {who} cannot be compared with: {error}; {by_hand}"]
    ours, theirs, unlike = side_by_side(mine, found)
    if unlike:
        return [
            f"the {who} of {model.name} was measured on other {', '.join(unlike)}, so its figures cannot be compared; "
            f"{by_hand}"
        ]
    table = paired(recipe, ours, theirs, found.number)
    return below_champion(recipe, ours, theirs, who, found.measured.own_tasks, table)


def paired(recipe: Recipe, ours: Measured, theirs: Measured, number: str | None) -> dict:
    """The student beside version `number`, paired by record: {task: {metric: comparison}}; {} without values."""
    from danceopd.evaluation.statistics import compare_values

    if ours.by_record is None or theirs.by_record is None:
        return {}
    tasks = recipe.with_benchmarks().tasks
    margins = {task: {gate.metric: gate.champion_margin for gate in spec.gates} for task, spec in tasks.items()}
    return compare_values(ours.by_record, theirs.by_record, margins, f"version {number}", ours.statistics)


def compare_with_champion(model: RegisteredModel, recipe: Recipe, mine: Candidate) -> dict[str, Any]:
    """{"version", "scores", "table"} of the champion if it was measured alike, else {}."""
    champion = model.champion()
    if champion is None:
        return {}
    try:
        found = candidate(model, champion)
    except UserError:
        return {}
    ours, theirs, unlike = side_by_side(mine, found)
    table = {} if unlike else paired(recipe, ours, theirs, found.number)
    return {"version": str(champion.version), "scores": theirs.scores, "table": table} if table else {}


def below_champion(
    recipe: Recipe,
    ours: Measured,
    theirs: Measured,
    who: str,
    tasks: set[str],
    table: Mapping[str, Mapping[str, dict | None]] | None = None,
) -> list[str]:
    """One line per gate metric on which the student falls more than its margin below the champion, or lacks it.

    Args:
        recipe: names the gates and their margins.
        ours: the student's figures.
        theirs: the champion's.
        who: the champion, for the reader.
        tasks: those whose gates the champion was registered with.
        table: the comparison record by record, where there is one: then a line shows the difference's interval.
    """
    mine, other = ours.scores, theirs.scores
    lines = []
    for task, spec in recipe.with_benchmarks().tasks.items():
        for gate in spec.gates:
            value, bar = mine.get(task, {}).get(gate.metric), other.get(task, {}).get(gate.metric)
            if bar is not None and (value is None or not value >= bar - gate.champion_margin - _ROUNDING):
                lines.append(
                    f"{task}.{gate.metric} is {figure(value)}, the {who} has {figure(bar)} "
                    f"(margin {gate.champion_margin:g})"
                    + _difference((table or {}).get(task, {}).get(gate.metric), ours)
                )
    lines += [f"the {who} also does task {task!r}, this student does not" for task in sorted(tasks - set(mine))]
    return lines


def _difference(found: Mapping[str, Any] | None, measured: Measured) -> str:
    if found is None:
        return ""
    return f", difference {figure(found['difference'])}, {measured.interval(found['low'], found['high'])}"


def promote_checked(model: RegisteredModel, recipe: Recipe, name: str, force: bool) -> tuple[str, str | None]:
    """Make a version champion if it holds its gates and, unless forced, is no worse than the champion.

    Args:
        model: the recipe's registered model.
        recipe: names the gates and their margins.
        name: the version's number or alias.
        force: promote it although it is worse than the champion, or cannot be compared; never although a gate fails.

    Returns:
        The champion's number now and before (None: there was none).

    Raises:
        UserError: with task, figures and interval, if it may not be promoted.
    """
    mine = candidate(model, model.find(name))
    champion = model.champion()
    before = None if champion is None else str(champion.version)
    if before == mine.number:
        return mine.number, before
    failed = mine.measured.failed_gates()
    if failed:
        raise UserError(f"{model.name} version {mine.number} fails its gates and is not promoted: {'; '.join(failed)}")
    if champion is not None and not force:
        reasons = against(model, recipe, mine, champion)
        if reasons:
            told = "; ".join(reasons)
            raise UserError(f"{model.name} version {mine.number} is not promoted: {told}; --force does it anyway")
    model.promote(mine.number)
    return mine.number, before


def move_champion(
    model: RegisteredModel, recipe: Recipe, action: str, version: str = CHALLENGER, force: bool = False
) -> tuple[str, str | None]:
    """Promote a version or roll back, as a person or a pipeline asks for it by name.

    Args:
        model: the recipe's registered model.
        recipe: names the gates and their margins.
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
    return promote_checked(model, recipe, version, force) if action == "promote" else model.rollback()


def say_champion(model: str, now: str, before: str | None) -> str:
    """Who is champion now and who was before, in one line."""
    return f"{model}: champion is version {now}" + ("" if before in (None, now) else f", previous is {before}")


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


def compare_versions(model: RegisteredModel, recipe: Recipe, first: str, second: str) -> VersionsCompared:
    """Compare two versions, each by its number or alias; margins are the recipe's `champion_margin`.

    Raises:
        UserError: if one is unknown, or its figures are gone.
    """
    one, two = (candidate(model, model.find(name)) for name in (first, second))
    ours, theirs, unlike = side_by_side(one, two)
    table = {} if unlike else paired(recipe, ours, theirs, two.number)
    mine, other = ours.scores, theirs.scores
    names = {(task, name): None for row in (mine, other) for task in row for name in row[task]}
    scores = [(t, n, mine.get(t, {}).get(n), other.get(t, {}).get(n)) for t, n in names]
    return VersionsCompared(str(one.number), str(two.number), unlike, scores, table)
