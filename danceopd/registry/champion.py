"""Which version serves: a student beside the champion, the decision, and moving the champion by hand.

Every champion may lie a margin below the one before. So that margins do not add up over generations, each carries how
far it lies below the best champion before it (`below_best`), in the unit of each gate's metric, as measured beside its
predecessor; a student has to come within its margin of that best one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from danceopd.config.recipe import Recipe
from danceopd.errors import UserError, unknown_name
from danceopd.evaluation.measured import Measured, figure
from danceopd.evaluation.names import JUDGE
from danceopd.registry.versions import (
    BEFORE,
    BELOW_BEST,
    CHALLENGER,
    CHAMPION,
    DECISION,
    PREVIOUS,
    REASONS,
    RegisteredModel,
)

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
        below_best: {"task.metric": how far it lies below the best champion before it}, where it does.
    """

    model: str
    number: str | None
    measured: Measured
    below_best: Mapping[str, float] = field(default_factory=dict)


def candidate(model: RegisteredModel, version: ModelVersion) -> Candidate:
    """A registered version with its figures.

    Raises:
        UserError: if its run holds none.
    """
    return Candidate(model.name, str(version.version), model.measured(version), _gaps(version))


def _gaps(version: ModelVersion) -> dict[str, float]:
    return json.loads(version.tags.get(BELOW_BEST, "{}"))


def _champion_as(model: RegisteredModel, mine: Candidate, champion: ModelVersion) -> Candidate:
    """The champion with its own figures or, if they are gone, with those that the student's run measured of it."""
    try:
        return candidate(model, champion)
    except UserError:
        again = mine.measured.version(model.name, str(champion.version))
        if again is None:
            raise
        return Candidate(model.name, str(champion.version), again, _gaps(champion))


def side_by_side(ours: Candidate, theirs: Candidate) -> tuple[Measured, Measured, list[str]]:
    """Both as one evaluation measured them, if one did; and what they were measured differently on."""
    if (again := ours.measured.version(theirs.model, theirs.number)) is not None:
        return ours.measured, again, []
    if (again := theirs.measured.version(ours.model, ours.number)) is not None:
        return again, theirs.measured, []
    return ours.measured, theirs.measured, cannot_compare(ours.measured, theirs.measured)


def cannot_compare(ours: Measured, theirs: Measured) -> list[str]:
    """Why two evaluations' figures cannot be compared: other conditions, or a judge that moved between them."""
    unlike = measured_unlike(ours.conditions, theirs.conditions)
    moved = "" if JUDGE in unlike else judge_moved(ours, theirs)
    return [*unlike, *([moved] if moved else [])]


def judge_moved(ours: Measured, theirs: Measured) -> str:
    """In words how the judge changed between two evaluations that it scored; nothing where it did not."""
    from danceopd.evaluation.canaries import say_moved

    if not all(JUDGE in (of.conditions["tools"] or {}) for of in (ours, theirs)):
        return ""
    return say_moved(ours.canaries, theirs.canaries)


_NAMES = {"size": "picture size", "steps": "sampling steps", "seed": "seed"}


def measured_unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between two measurements, of what the tasks and tools that both have share."""
    unlike = []
    for name, told in (("held_out", "records of"), ("tools", "weights of")):
        mine, other = ours[name], theirs[name]
        if mine is None or other is None:
            unlike.append(f"{told} {'any task' if name == 'held_out' else 'any network'} (one did not note them)")
            continue
        unlike += [f"{told} {key}" for key in mine if key in other and mine[key] != other[key] and key != JUDGE]
        unlike += [JUDGE] if JUDGE in mine and JUDGE in other and mine[JUDGE] != other[JUDGE] else []
    return unlike + [told for name, told in _NAMES.items() if ours[name] != theirs[name]]


def decide(
    model: RegisteredModel, recipe: Recipe, version: ModelVersion, measured: Measured, unmeasured: str = ""
) -> ModelVersion:
    """Compare with the champion, move the aliases, and note the decision on the version.

    Args:
        model: the registered model.
        recipe: names the gates and their margins.
        version: what was registered.
        measured: its figures, and those of the champion where it was measured beside it.
        unmeasured: why the champion could not be measured beside it.
    """
    number = str(version.version)
    model.settle()
    champion = model.champion()
    reasons: list[str] = []
    if champion is not None and str(champion.version) == number:  # broke off after the alias was moved
        before = model.replaced(champion) or ""
        model.promote(number)
    else:
        model.set_alias(CHALLENGER, number)
        before = "" if champion is None else str(champion.version)
        mine, below = Candidate(model.name, number, measured), dict[str, float]()
        if champion is not None:
            reasons, below = against(model, recipe, mine, champion, unmeasured)
        if not reasons:
            model.promote(number, below)
    decision = CHALLENGER if reasons else CHAMPION
    for name, value in ((BEFORE, before), (REASONS, json.dumps(reasons)), (DECISION, decision)):
        model.client.set_model_version_tag(model.name, number, name, value)
    return model.version(number)


def against(
    model: RegisteredModel, recipe: Recipe, mine: Candidate, champion: ModelVersion, unmeasured: str = ""
) -> tuple[list[str], dict[str, float]]:
    """Why a version may not take over from the champion (empty if it may), and how far it lies below the best one."""
    who = f"champion (version {champion.version})"
    by_hand = (
        f"compare both reports, and if version {mine.number} shall serve, set the alias '{CHAMPION}' on it "
        f"(danceopd registry promote {mine.number} --force keeps the old one as '{PREVIOUS}')"
    )
    try:
        found = _champion_as(model, mine, champion)
    except UserError as error:
        told = f" ({unmeasured})" if unmeasured else ""
        return [f"the {who} cannot be compared with: {error}{told}; {by_hand}"], {}
    ours, theirs, unlike = side_by_side(mine, found)
    if unlike:
        told = f", and it could not be measured anew: {unmeasured}" if unmeasured else ""
        return [
            f"the {who} of {model.name} was measured otherwise ({', '.join(unlike)}), so its figures cannot be "
            f"compared{told}; {by_hand}"
        ], {}
    table = paired(recipe, ours, theirs, found.number)
    reasons = below_champion(recipe, ours, theirs, who, found.measured.own_tasks, table, found.below_best)
    return reasons, below_best(recipe, ours, theirs, found.below_best)


def below_best(recipe: Recipe, ours: Measured, theirs: Measured, before: Mapping[str, float]) -> dict[str, float]:
    """How far a student lies below the best champion so far: {"task.metric": gap}, of the gates where it does.

    Args:
        recipe: names the gates.
        ours: the student's figures.
        theirs: the champion's.
        before: how far that champion lies below the best one.
    """
    gaps = {}
    for task, spec in recipe.with_benchmarks().tasks.items():
        for gate in spec.gates:
            name = f"{task}.{gate.metric}"
            value, bar = (of.scores.get(task, {}).get(gate.metric) for of in (ours, theirs))
            gap = before.get(name, 0.0) + (bar - value if value is not None and bar is not None else 0.0)
            if gap > _ROUNDING:
                gaps[name] = gap
    return gaps


def paired(recipe: Recipe, ours: Measured, theirs: Measured, number: str | None) -> dict:
    """The student beside version `number`, paired by record: {task: {metric: comparison}}; {} without values."""
    from danceopd.evaluation.statistics import compare_values

    if ours.by_record is None or theirs.by_record is None:
        return {}
    tasks = recipe.with_benchmarks().tasks
    margins = {task: {gate.metric: gate.champion_margin for gate in spec.gates} for task, spec in tasks.items()}
    return compare_values(ours.by_record, theirs.by_record, margins, f"version {number}", ours.statistics, ours.groups)


def compare_with_champion(model: RegisteredModel, recipe: Recipe, mine: Candidate) -> dict[str, Any]:
    """{"version", "scores", "table"} of the champion if it was measured alike, else {}."""
    champion = model.champion()
    if champion is None:
        return {}
    try:
        found = _champion_as(model, mine, champion)
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
    gaps: Mapping[str, float] = MappingProxyType({}),
) -> list[str]:
    """One line per gate metric on which the student falls more than its margin below the best champion, or lacks it.

    Args:
        recipe: names the gates and their margins.
        ours: the student's figures.
        theirs: the champion's.
        who: the champion, for the reader.
        tasks: those whose gates the champion was registered with.
        table: the comparison record by record, where there is one: then a line shows the difference's interval.
        gaps: how far the champion lies below the best one before it, {"task.metric": gap}.
    """
    mine, other = ours.scores, theirs.scores
    lines = []
    for task, spec in recipe.with_benchmarks().tasks.items():
        for gate in spec.gates:
            value, bar = mine.get(task, {}).get(gate.metric), other.get(task, {}).get(gate.metric)
            if bar is None:
                continue
            best = bar + gaps.get(f"{task}.{gate.metric}", 0.0)
            if value is None or not value >= best - gate.champion_margin - _ROUNDING:
                told = "" if best == bar else f", which lies below the best one so far, at {figure(best)}"
                lines.append(
                    f"{task}.{gate.metric} is {figure(value)}, the {who} has {figure(bar)}{told} "
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
            The best champion is from then on sought among it and those after it.

    Returns:
        The champion's number now and before (None: there was none).

    Raises:
        UserError: with task, figures and interval, if it may not be promoted.
    """
    model.settle()
    version = model.find(name)
    mine, number = candidate(model, version), str(version.version)
    champion = model.champion()
    before = None if champion is None else str(champion.version)
    if before == number:
        return number, before
    failed = mine.measured.failed_gates()
    if failed:
        raise UserError(f"{model.name} version {number} fails its gates and is not promoted: {'; '.join(failed)}")
    below: dict[str, float] = {}
    if champion is not None and not force:
        reasons, below = against(model, recipe, mine, champion)
        if reasons:
            told = "; ".join(reasons)
            raise UserError(f"{model.name} version {number} is not promoted: {told}; --force does it anyway")
    model.promote(number, below)
    return number, before


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
