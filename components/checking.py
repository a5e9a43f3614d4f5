"""What is settled on a CPU before anything costs: recipe, identity of the data, and where the student is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.running import Step
from components.training import Way, pod_of
from danceopd.config.recipe import CheckpointTeacher, Recipe
from danceopd.files import at_home, content_key, write_atomic, write_json
from danceopd.preflight.at_start import check_start
from danceopd.preflight.findings import settle
from danceopd.registry.champion_teacher import find_champion, needs_champion
from danceopd.tracking.mlflow_store import default_tracking_uri


@dataclass(frozen=True)
class Checked:
    """What a run is settled to.

    Attributes:
        recipe: whole, with overrides, as JSON text.
        revision: identity of the data, and of weights behind a path.
        pod: what the distillation step's own pod asks for; see `components.training.pod_of`.
    """

    recipe: str
    revision: str
    pod: dict[str, Any]


def check(
    step: Step,
    data_revision: str,
    tracking_uri: str,
    distill_on: str,
    nodes: int,
    gpus: int,
    placement: Mapping[str, Any],
) -> Checked:
    """Settle what a run left open.

    Raises:
        UserError: if the parameters do not fit each other, or the data's revision cannot be told.
    """
    settle(check_start(step.recipe, None, tracking_uri or default_tracking_uri(step.workspace)))
    pod = pod_of(Way(distill_on, nodes, gpus), placement)
    revision = data_revision or inputs_revision(step.recipe, step.workspace, tracking_uri)
    step.results["data_revision"] = revision
    return Checked(step.recipe.model_dump_json(), revision, pod)


def write_checked(
    found: Checked, resolved: str, revision: str, pod_gpus: str, pod_cpu: str, pod_memory: str, pod_nodes: str
) -> None:
    """Write each part to the file kfp wants it in."""
    texts = {
        resolved: found.recipe,
        revision: found.revision,
        pod_gpus: found.pod["gpus"],
        pod_cpu: found.pod["cpu"],
        pod_memory: found.pod["memory"],
    }
    for path, text in texts.items():
        write_atomic(Path(path), text)
    write_json(Path(pod_nodes), found.pod["nodes"])


def of_each_teacher(recipe: Recipe, found: Checked) -> list[dict[str, str]]:
    """What the step that makes a teacher is given, a teacher each."""
    return [{"teacher": name, "recipe": found.recipe, "revision": found.revision} for name in recipe.teachers]


def inputs_revision(recipe: Recipe, workspace: Path | None = None, tracking_uri: str = "") -> str:
    """A name for all that a run reads: its data, a base and teachers that lie in folders here, a registered champion.

    A recipe's text stays the same when the weights behind a path are replaced; sizes and times of the files do not.
    A base from a hub is named by the recipe's own `model.revision`.

    Args:
        recipe: what would run.
        workspace: whose store may hold the champion; default: the recipe's own.
        tracking_uri: store that holds it; empty: the workspace's.

    Raises:
        UserError: if the recipe starts from a champion and there is none.
    """
    from danceopd import steps  # loads torch, which whoever only compiles or submits does without

    teachers = [teacher.path for teacher in recipe.teachers.values() if isinstance(teacher, CheckpointTeacher)]
    places = [at_home(path) for path in (recipe.model.base, *teachers)]
    states: list[Any] = [_files(place) for place in places if place.exists()]
    if needs_champion(recipe):
        store = tracking_uri or default_tracking_uri(workspace or Path("runs") / recipe.name)
        states.append(asdict(find_champion(recipe, store)))
    data = steps.data_revision(recipe)
    return content_key(data, states) if states else data


def _files(path: Path) -> list:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [(p.as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
