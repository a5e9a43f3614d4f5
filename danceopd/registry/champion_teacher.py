"""The registered model's champion as a teacher: what a capability is added to, and what holds the old ones.

A student that learns one more task forgets the others unless something holds them. Here the champion's own field is
distilled on its tasks while a new teacher teaches the new one, so that neither the old teachers nor their data's
targets are needed again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from danceopd.config.recipe import ChampionTeacher, Recipe
from danceopd.errors import UserError
from danceopd.export.student import WEIGHT_FILES
from danceopd.files import hash_folder
from danceopd.registry.logged_model import PLACE, stored_pipeline, take_pipeline
from danceopd.registry.register import WEIGHTS
from danceopd.registry.versions import RegisteredModel
from danceopd.tracking import mlflow_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Champion:
    """The champion as it was found.

    Attributes:
        model: name of the registered model.
        version: its number.
        student: digest of the student it was registered from.
        weights: SHA-256 of its weights, or None for a version that does not name it.
    """

    model: str
    version: str
    student: str
    weights: str | None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model} version {self.version}"


def needs_champion(recipe: Recipe) -> bool:
    """Whether a teacher of the recipe is the champion."""
    return any(isinstance(teacher, ChampionTeacher) for teacher in recipe.teachers.values())


def find_champion(recipe: Recipe, tracking_uri: str) -> Champion:
    """The champion of the recipe's registered model.

    Raises:
        UserError: if there is none, or the store does not answer.
    """
    model = recipe.register_as.model
    there = mlflow_store.has_store(tracking_uri)
    version = RegisteredModel(mlflow_store.open_client(tracking_uri), model).champion() if there else None
    if version is None:
        raise UserError(
            f"recipe {recipe.name!r} starts from the champion of {model!r}, and "
            f"{mlflow_store.redact(tracking_uri)} has none; register one first (for the small world: make run), or "
            f"name the store that has one (--workspace or {mlflow_store.ENVIRONMENT})"
        )
    return Champion(model, str(version.version), version.tags["student"], version.tags.get(WEIGHTS))


def fetch_champion(champion: Champion, tracking_uri: str, folder: Path) -> Path:
    """Bring a champion's pipeline folder from the registry to `folder`; returns where it lies. Nobody writes into it.

    Raises:
        UserError: if it cannot be fetched, or its weights are not the registered ones.
    """
    from mlflow.exceptions import MlflowException

    uri = f"models:/{champion.model}/{champion.version}/{PLACE}"
    with mlflow_store.current_store(tracking_uri) as mlflow:
        try:
            stored = stored_pipeline(mlflow.MlflowClient(), champion.model, champion.version)
            if stored is not None:
                found = take_pipeline(stored, folder)
            else:
                found = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
        except (MlflowException, OSError) as error:
            reason = " ".join(mlflow_store.redact(str(error)).split())[:300]
            raise UserError(f"{champion.name}: its files cannot be fetched ({reason})") from error
    if champion.weights not in (None, hash_folder(found, WEIGHT_FILES)):
        raise UserError(f"{champion.name}: its weights are not the ones that were registered; promote another version")
    log.info("fetched the champion, %s", champion.name)
    return found
