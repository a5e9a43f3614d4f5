"""Whether there is anything to train: recipe, code and data now, beside those of the registry's champion."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from danceopd.config.recipe import Recipe
from danceopd.data import versioning
from danceopd.errors import UserError
from danceopd.files import content_key
from danceopd.registry.versions import RegisteredModel
from danceopd.text import parse_yaml_documents, read_text
from danceopd.tracking.mlflow_store import answers, has_store, open_client, redact
from danceopd.workspace import code_revision
from pipelines.one_line import Away

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Inputs:
    """What a student would be trained from now.

    Attributes:
        recipe: its digest.
        code: the method's own sources.
        data: (the champion's tag to compare with, its value now); None: the recipe and the code decide on the data.
    """

    recipe: str
    code: str
    data: tuple[str, str] | None

    @property
    def known(self) -> bool:
        """Whether the data has a name, so that equal inputs are equal."""
        return self.data is None or self.data[1] != UNKNOWN

    @property
    def key(self) -> str:
        """A 16-digit name of all of it."""
        return content_key(self.recipe, self.code, self.data)

    def tags(self) -> dict[str, str]:
        """The tags of a version that was trained from the same."""
        return {"recipe": self.recipe, "code": self.code} | dict([self.data] if self.data else [])


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was.

    Attributes:
        what: recipe, code or data.
        champion: its value then.
        now: its value now.
    """

    what: str
    champion: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: {self.champion[:16]} -> {self.now[:16]}"


@dataclass(frozen=True)
class Comparison:
    """The present inputs beside the champion's.

    Attributes:
        model: the registered model.
        champion: the champion's number, or None.
        differences: what changed since it.
        tried: the newest version that has the present inputs already, or None.
        newest: the newest version's number, 0 without any.
    """

    model: str
    champion: str | None
    differences: list[Difference]
    tried: str | None
    newest: int

    @property
    def changed(self) -> bool:
        """Whether a new student would be another than those there are."""
        return self.tried is None and (self.champion is None or bool(self.differences))

    def lines(self) -> list[str]:
        """The comparison in words, a line each."""
        if self.champion is None and self.tried is None:
            return [f"{self.model}: no champion yet"]
        since = [f"since champion (version {self.champion}) {difference}" for difference in self.differences]
        if self.tried is not None and self.tried != self.champion:
            return [*since, f"{self.model}: version {self.tried} was trained from just this; nothing to train"]
        return since or [f"{self.model}: nothing changed since the champion (version {self.champion})"]

    def to_json(self) -> str:
        """The comparison for other programs."""
        return json.dumps(asdict(self) | {"changed": self.changed}, indent=2)


def read_inputs(recipe: Recipe, data_file: Path | None = None) -> Inputs:
    """What a student would be trained from now.

    Args:
        recipe: of the student.
        data_file: the `data.dvc` that names its data; default: the repository's, if it is about this recipe's data.

    Raises:
        UserError: if the file is no DVC file.
    """
    return Inputs(recipe.digest(), code_revision(), _data(recipe, data_file))


def _data(recipe: Recipe, data_file: Path | None) -> tuple[str, str] | None:
    out, meta = _read_dvc(data_file) if data_file is not None else _tracked(recipe)
    if recipe.data.inputs:  # assembled from files: the registry knows DVC's hash of them
        return "dvc", out["md5"] if out else UNKNOWN
    own = meta.get("recipe_data") == content_key(recipe.data.model_dump(mode="json"))
    if data_file is not None and not own:
        raise UserError(f"{data_file}: not the data of recipe {recipe.name!r}; record it by: danceopd data track")
    return ("data", meta["content"]) if own and "content" in meta else None


def _tracked(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    repo = versioning.find_repo(Path.cwd())
    entry = versioning.tracked(repo, repo / "data") if repo is not None else None
    if entry is None:
        return {}, {}
    inside = any(Path(place).resolve().is_relative_to(entry.path) for place in recipe.data.inputs)
    return ({"md5": entry.md5} if inside or not recipe.data.inputs else {}), entry.meta


def _read_dvc(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A DVC file's one output and `meta`, wherever the file lies."""
    try:
        [read] = parse_yaml_documents(read_text(Path(file)), str(file))
        out = read["outs"][0]
        return {"md5": out["md5"]}, read.get("meta") or {}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a DVC file with one output; name the repository's data.dvc") from error


def compare(recipe: Recipe, inputs: Inputs, tracking_uri: str) -> Comparison:
    """Hold the present inputs against what the registry's versions were trained from.

    Raises:
        Away: if the store does not answer.
        UserError: if it refuses.
    """
    name = recipe.register_as.model
    if not answers(tracking_uri):
        raise Away(f"MLflow store {redact(tracking_uri)} does not answer; check its address, or try again")
    if not has_store(tracking_uri):
        return Comparison(name, None, [], None, 0)
    model = RegisteredModel(open_client(tracking_uri), name)
    champion, versions = model.champion(), model.lines()
    wanted = inputs.tags()
    tried = next((v.version for v in versions if inputs.known and wanted.items() <= v.tags.items()), None)
    differences = [] if champion is None else _differences(wanted, champion.tags)
    number = None if champion is None else str(champion.version)
    return Comparison(name, number, differences, tried, int(versions[0].version) if versions else 0)


def _differences(wanted: dict[str, str], tags: dict[str, str]) -> list[Difference]:
    names = {"dvc": "data"}
    return [
        Difference(names.get(name, name), tags.get(name, UNKNOWN), value)
        for name, value in wanted.items()
        if value == UNKNOWN or tags.get(name) != value
    ]


def verdict(recipe: Recipe, inputs: Inputs, tracking_uri: str, before: int) -> str:
    """What a run that is over did to the registry, in one line.

    Args:
        recipe: of the run.
        inputs: it was trained from.
        tracking_uri: of the store.
        before: the newest version's number before the run.

    Raises:
        UserError: if the store does not answer.
    """
    after = compare(recipe, inputs, tracking_uri)
    if after.newest <= before:
        old = f"its student is version {after.tried}, as before" if after.tried else "a gate failed; see the summary"
        return f"{after.model}: no new version, {old}"
    lines = RegisteredModel(open_client(tracking_uri), after.model).lines()
    newest = next(line for line in lines if int(line.version) == after.newest)
    aliases, reasons = ", ".join(newest.aliases) or "no alias", "; ".join(newest.reasons)
    return f"{after.model}: registered as version {newest.version} ({aliases})" + (f": {reasons}" if reasons else "")
