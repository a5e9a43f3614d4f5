"""What the steps of one run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from danceopd.config.recipe import Recipe
from danceopd.workspace import Product, store_of


@dataclass(frozen=True)
class Run:
    """A recipe over its base and data, in a workspace.

    Attributes:
        recipe: what is wanted.
        workspace: folder that all steps share.
        base: the base's product.
        data: the dataset's product.
        tracking_uri: MLflow store of models and runs; None: the one in the workspace.
    """

    recipe: Recipe
    workspace: Path
    base: Product
    data: Product
    tracking_uri: str | None = None

    @property
    def store(self) -> str:
        """Address of the MLflow store."""
        return store_of(self.tracking_uri, self.workspace)

    @property
    def cache(self) -> Path:
        """Folder of encodings and judgements that later runs in the workspace use again."""
        return Path(self.workspace) / "cache"


def open_run(recipe: Recipe, workspace: Path, tracking_uri: str | None = None) -> Run:
    """A run whose base and data are found, or made first.

    Raises:
        UserError: as `resolve_base` and `build_data` do.
    """
    from danceopd.steps.base import resolve_base
    from danceopd.steps.data import build_data

    return Run(recipe, workspace, resolve_base(recipe, workspace), build_data(recipe, workspace), tracking_uri)
