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

# Kubeflow's local runner says SUCCEEDED. A cluster hands the summary the state of the chain in its metadata (2.17,
# backend/src/v2/driver/resolve.go): COMPLETE or CACHED, but RUNNING or UNKNOWN where a step inside was taken from the
# cache or the state has not been written yet.
GOOD_ENDS = ("SUCCEEDED", "SKIPPED", "CACHED", "COMPLETE")
BAD_ENDS = ("FAILED", "CANCELED", "CANCELLED")


def ended_well(state: str, registered: bool) -> bool:
    """Whether a run went well, by Kubeflow's word for it where that tells, else by its last step's own note.

    Args:
        state: in Kubeflow's words.
        registered: whether `register`, the step that needs all others, noted that it was done.
    """
    return state in GOOD_ENDS or (registered and state not in BAD_ENDS)


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


def end_tracked(workspace: Path, run: str, good: bool, tracking_uri: str) -> None:
    """Tell MLflow how a pipeline run ended, and what of it was not delivered yet.

    Args:
        workspace: folder all steps share.
        run: Kubeflow's name for it.
        good: whether it ended well.
        tracking_uri: of the store; empty: `MLFLOW_TRACKING_URI`, else the workspace's own.
    """
    with _of_run(run):
        journal.end_silent(workspace)
        journal.end_run(workspace, journal.FINISHED if good else journal.FAILED)
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
