"""A recipe's registered model in an MLflow store: its versions, their aliases, and the files their runs hold."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from danceopd.errors import UserError, unknown_name
from danceopd.evaluation.measured import METRICS, VALUES, Measured
from danceopd.files import read_json
from danceopd.tracking import mlflow_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.entities.model_registry import RegisteredModel as StoredModel
    from mlflow.store.entities import PagedList

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
EVALUATION = "evaluation"  # folder of a version's run that holds its evaluation; and the tag with the figures' hash
DECISION, REASONS, BEFORE = "decision", "reasons", "champion_before"
REPLACED = "replaced"  # tag of a champion: whom it took the alias from, which is who `previous` is
BELOW_BEST = "below_best"  # tag of a champion: how far it lies below the best one before it, JSON


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


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model in a store; it may have no version yet.

    Attributes:
        client: of the store.
        name: the model's.
    """

    client: MlflowClient
    name: str

    def exists(self) -> bool:
        """Whether the store knows the model."""
        return self._found() is not None

    def aliases(self) -> dict[str, str]:
        """Version numbers by alias."""
        found = self._found()
        return {} if found is None else {alias: str(number) for alias, number in found.aliases.items()}

    def _found(self) -> StoredModel | None:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        try:
            return self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return None
            raise

    def champion(self) -> ModelVersion | None:
        """The version called champion, or None."""
        number = self.aliases().get(CHAMPION)
        return None if number is None else self.version(number)

    def version(self, number: str) -> ModelVersion:
        """A version by its number."""
        return self.client.get_model_version(self.name, number)

    def find(self, name: str) -> ModelVersion:
        """A version by its number or by an alias.

        Raises:
            UserError: if there is none, listing what there is.
        """
        aliases = self.aliases()
        numbers = [str(version.version) for version in self._all()]
        number = aliases.get(name, name)
        if number not in numbers:
            raise unknown_name(f"version of {self.name}", name, [*aliases, *numbers])
        return self.version(number)

    def find_same(self, tags: Mapping[str, str]) -> ModelVersion | None:
        """The newest version of the same student with the same evaluation, or None."""
        found = self._all(f"tags.student = '{tags['student']}' and tags.evaluation = '{tags[EVALUATION]}'")
        return max(found, key=lambda version: int(version.version)) if found else None

    def _all(self, condition: str = "") -> list[ModelVersion]:
        wanted = f"name = '{self.name}'" + (f" and {condition}" if condition else "")
        return all_pages(partial(self.client.search_model_versions, wanted))

    def lines(self) -> list[VersionLine]:
        """All versions, the newest first."""
        names: dict[str, list[str]] = {}
        for alias, number in sorted(self.aliases().items()):
            names.setdefault(number, []).append(alias)
        return [
            VersionLine(str(v.version), names.get(str(v.version), []), int(v.creation_timestamp), dict(v.tags))
            for v in sorted(self._all(), key=lambda v: -int(v.version))
        ]

    def markdown(self) -> str:
        """All versions as a Markdown table: aliases, decision and its reasons."""
        lines = [f"# {self.name}", "", "| version | aliases | decision |", "|---|---|---|"]
        for line in self.lines():
            lines.append(f"| {line.version} | {', '.join(line.aliases)} | {line.decision} |")
        return "\n".join(lines) + "\n"

    def measured(self, version: ModelVersion) -> Measured:
        """What a version's evaluation measured, as its run keeps it.

        Raises:
            UserError: if the run holds no figures; a version without values by record has None for them.
        """
        metrics = self._file(version, METRICS)
        try:
            return Measured(metrics, self._file(version, VALUES))
        except UserError:
            return Measured(metrics, None)

    def _file(self, version: ModelVersion, name: str) -> dict:
        from mlflow.exceptions import MlflowException

        where = f"{self.name} version {version.version}"
        with tempfile.TemporaryDirectory() as scratch:
            try:
                path = self.client.download_artifacts(version.run_id or "", f"{EVALUATION}/{name}", scratch)
                return read_json(Path(path))
            except (MlflowException, OSError) as error:
                raise UserError(f"{where}: its run holds no {EVALUATION}/{name}, so it cannot be compared") from error

    def set_alias(self, alias: str, number: str) -> None:
        """Give an alias to a version; no other version has it then."""
        self.client.set_registered_model_alias(self.name, alias, number)

    def promote(self, number: str, below_best: Mapping[str, float] = MappingProxyType({})) -> None:
        """Make a version the champion; the champion before it is called `previous`.

        Whom it replaces is noted on it first, so that `settle` finishes a move that broke off between two aliases.

        Args:
            number: the version's.
            below_best: how far it lies below the best champion so far, {"task.metric": gap}.
        """
        aliases = self.aliases()
        old = aliases.get(CHAMPION)
        if old != number:
            self._tag(number, REPLACED, old or "")
            self._tag(number, BELOW_BEST, json.dumps(dict(below_best), sort_keys=True))
            self.set_alias(CHAMPION, number)
        self.settle()
        if aliases.get(CHALLENGER) == number:
            self.client.delete_registered_model_alias(self.name, CHALLENGER)

    def settle(self) -> None:
        """Let `previous` be whom the champion replaced, which it is not after a move that broke off."""
        champion = self.champion()
        replaced = None if champion is None else self.replaced(champion)
        if replaced and self.aliases().get(PREVIOUS) != replaced:
            self.set_alias(PREVIOUS, replaced)

    @staticmethod
    def replaced(champion: ModelVersion) -> str | None:
        """Whom a champion took the alias from; empty: nobody; None: it became champion before that was noted."""
        return champion.tags.get(REPLACED)

    def _tag(self, number: str, name: str, value: str) -> None:
        self.client.set_model_version_tag(self.name, number, name, value)

    def rollback(self) -> tuple[str, str | None]:
        """Make the version called `previous` champion again; the champion is called `previous` then.

        Returns:
            The champion's number now and before (None: there was none).

        Raises:
            UserError: if no version is called `previous`.
        """
        self.settle()
        aliases = self.aliases()
        if PREVIOUS not in aliases:
            raise UserError(
                f"{self.name}: no version is called '{PREVIOUS}', so there is nothing to go back to; "
                "promote one by its number"
            )
        old, back = aliases.get(CHAMPION), aliases[PREVIOUS]
        if old:
            self._tag(old, REPLACED, back)  # for `settle`, should this break off before the champion has moved
        self._tag(back, REPLACED, old or "")
        self.client.delete_registered_model_alias(self.name, PREVIOUS)
        self.set_alias(CHAMPION, back)
        self.settle()
        return back, old


def open_model(tracking_uri: str, name: str) -> RegisteredModel:
    """A registered model that must be there.

    Raises:
        UserError: if there is no store, it does not answer, or it knows no such model.
    """
    mlflow_store.require_store(tracking_uri)
    model = RegisteredModel(mlflow_store.open_client(tracking_uri), name)
    if not model.exists():
        known = sorted(found.name for found in all_pages(model.client.search_registered_models))
        raise unknown_name("registered model (register_as.model)", name, known or ["(none yet)"])
    return model


def all_pages(search: Callable[..., PagedList]) -> list:
    """Everything a search of the store's client finds, page by page."""
    found: list[Any] = []
    token = None
    while token != "":
        page = search(page_token=token)
        found, token = found + list(page), page.token or ""
    return found
