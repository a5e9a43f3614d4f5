"""The second pipeline: promote a registered version, or roll back, from where the first one's runs are started.

No postponed annotations here: kfp reads the pipeline function's annotations themselves.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from kfp import dsl

from components.move_champion import move_champion
from components.running import read_notes
from danceopd.config.recipe import Recipe
from danceopd.tracking.mlflow_store import ENVIRONMENT
from danceopd.workspace import code_revision
from pipelines.distillation import place_task
from pipelines.local import run_here
from pipelines.options import MOUNT, PipelineOptions
from pipelines.placement import Placement


def build_champion_pipeline(options: PipelineOptions) -> Callable:
    """Compose the pipeline function; see `PipelineOptions` for what is fixed here and not at run time."""

    @dsl.pipeline(name="danceopd-champion", display_name="DanceOPD: promote a version, or roll back")
    def champion_pipeline(
        recipe: str,
        action: str,
        version: str = "challenger",
        force: bool = False,
        code_revision: str = options.image,
        workspace: str = MOUNT,
        tracking_uri: str = "",
    ) -> None:
        """Promote a registered version that is no worse than the champion, or go back to the champion before.

        Args:
            recipe: The recipe as JSON text; it names the registered model, its gates and its margins.
            action: promote or rollback.
            version: What to promote, a number or an alias; a rollback has no use for it.
            force: Promote it although it is worse than the champion; never although a gate fails.
            code_revision: Identity of the code or image, shown with the step.
            workspace: Folder on the shared volume.
            tracking_uri: MLflow tracking server; empty for a store in the workspace.
        """
        asked = {"action": action, "version": version, "force": force}
        where = {"workspace": workspace, "tracking_uri": tracking_uri, "code_revision": code_revision}
        place_task(move_champion(recipe=recipe, **asked, **where), options)

    return champion_pipeline


def run_champion(recipe: Recipe, workspace: Path, action: str, version: str = "challenger", force: bool = False) -> str:
    """Run the pipeline on this machine; returns who is champion now, in one line.

    Raises:
        StepFailed: with the step's one line, if the version may not be promoted or there is nothing to go back to.
    """
    workspace, run = Path(workspace).resolve(), uuid.uuid4().hex[:12]
    arguments = {
        "recipe": recipe.model_dump_json(),
        "action": action,
        "version": version,
        "force": force,
        "code_revision": code_revision(),
        "workspace": str(workspace),
        "tracking_uri": os.environ.get(ENVIRONMENT, ""),
    }
    run_here(build_champion_pipeline(PipelineOptions(placement=Placement(retries=0))), arguments, workspace, run)
    return read_notes(workspace, run)[-1]["said"]
