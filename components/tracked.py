"""What a step tells MLflow as a part of its pipeline run: which run it is of, how that ended, and when it is delivered.

Steps write journals into the workspace (`danceopd.tracking.journal`). A server gets them every minute and at each
step's end. A store that is a file, which nobody watches meanwhile, gets them from the step that needs the store anyway
(`register`), or from the run's last one: opening it takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from danceopd.config.recipe import Recipe
from danceopd.tracking import delivery, journal
from danceopd.tracking.mlflow_store import ENVIRONMENT, default_tracking_uri

GOOD_ENDS = ("SUCCEEDED", "SKIPPED", "CACHED")


@contextmanager
def tracked(recipe: Recipe, workspace: Path, run: str, tracking_uri: str) -> Iterator[None]:
    """Let what the block and the processes it starts write into journals be a part of the pipeline run.

    Args:
        recipe: of the run.
        workspace: folder all steps share.
        run: Kubeflow's name for the run; empty: the step runs by itself.
        tracking_uri: of the store; empty: `MLFLOW_TRACKING_URI`; without that a later step delivers.
    """
    uri = tracking_uri or os.environ.get(ENVIRONMENT, "")
    server = uri and not delivery.is_file_store(uri)
    with _of_run(run):
        journal.begin_run(workspace, recipe.name, recipe.register_as.experiment, recipe.model_dump(mode="json"))
        try:
            with delivery.Courier(workspace, uri) if server else nullcontext():
                yield
        finally:
            if server:
                delivery.deliver(workspace, uri)


def end_tracked(workspace: Path, run: str, state: str, tracking_uri: str) -> None:
    """Tell MLflow how a pipeline run ended, and what of it was not delivered yet.

    Args:
        workspace: folder all steps share.
        run: Kubeflow's name for it.
        state: how it ended, in Kubeflow's words.
        tracking_uri: of the store; empty: `MLFLOW_TRACKING_URI`, else the workspace's own.
    """
    with _of_run(run):
        journal.end_silent(workspace)
        journal.end_run(workspace, journal.FINISHED if state in GOOD_ENDS else journal.FAILED)
        delivery.deliver(workspace, tracking_uri or default_tracking_uri(workspace))


@contextmanager
def _of_run(run: str) -> Iterator[None]:
    """Name the pipeline run in the environment, for this process and those it starts."""
    before = os.environ.get(journal.RUN)
    if run:
        os.environ[journal.RUN] = run
    try:
        yield
    finally:
        os.environ.pop(journal.RUN, None)
        if before is not None:
            os.environ[journal.RUN] = before
