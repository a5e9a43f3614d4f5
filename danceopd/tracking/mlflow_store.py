"""MLflow runs: one per step, with parameters, curves, pictures and files, in a store inside the workspace by default.

MLflow is slow to import, so it is imported inside the functions that need it.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from danceopd.errors import UserError
from danceopd.tracking.moved_store import settle_addresses

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = "MLFLOW_TRACKING_URI"
DATABASE = "mlflow.db"
ARTIFACTS = "mlflow-artifacts"
HIDDEN = "(hidden)"
AWAY = "no server answers there"
DIGEST = 36  # the most that MLflow keeps of a dataset's hash
_SQLITE = "sqlite:///"
_SECRET = re.compile(r"(^|[_\-])(secret|token|password|passwd|credentials?|api_?key|access_?key|private_?key)$", re.I)
_USER_INFO = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")
_QUERY = re.compile(r"(\w[\w+.-]*://[^\s?]+)\?\S+")
_CHUNK = 100  # MLflow takes at most 100 parameters and 1000 metrics per call
_METRICS = 1000
_PATIENCE = 5.0  # seconds


def default_tracking_uri(workspace: Path) -> str:
    """`MLFLOW_TRACKING_URI` if it is set, else a SQLite file in the workspace."""
    return os.environ.get(ENVIRONMENT) or f"{_SQLITE}{Path(workspace).resolve() / DATABASE}"


def artifact_location(tracking_uri: str) -> str | None:
    """Where a SQLite store's files go: a folder beside the database. None for a server, which decides itself."""
    found = _own_artifacts(tracking_uri)
    return None if found is None else found.as_uri()


def _own_artifacts(tracking_uri: str) -> Path | None:
    if not tracking_uri.startswith(_SQLITE):
        return None
    return Path(tracking_uri.removeprefix(_SQLITE)).resolve().parent / ARTIFACTS


def is_workspaces(tracking_uri: str, workspace: Path) -> bool:
    """Whether a store is the workspace's own SQLite file."""
    path = Path(tracking_uri.removeprefix(_SQLITE))
    return tracking_uri.startswith(_SQLITE) and path.resolve() == Path(workspace).resolve() / DATABASE


def was_workspaces(tracking_uri: str, workspace: Path) -> bool:
    """Whether it is, or was before the workspace was moved: then nothing lies there any more."""
    path = Path(tracking_uri.removeprefix(_SQLITE))
    gone = tracking_uri.startswith(_SQLITE) and path.name == DATABASE and not path.exists()
    return gone or is_workspaces(tracking_uri, workspace)


def import_mlflow() -> ModuleType:
    """The `mlflow` module, quiet, and not reporting its use to anyone; set its own variables to have it otherwise."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of 7, over minutes: what fails is sent again later
    import mlflow

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # if it was imported before
    return mlflow


def open_client(tracking_uri: str) -> MlflowClient:
    """A client of the store; a SQLite file and its folder are made if they are missing.

    Raises:
        UserError: if the address is none, or the store does not answer.
    """
    if not answers(tracking_uri):
        raise UserError(f"MLflow store {redact(tracking_uri)} does not answer; check {ENVIRONMENT}")
    mlflow = import_mlflow()
    if tracking_uri.startswith(_SQLITE):
        Path(tracking_uri.removeprefix(_SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    try:
        if (artifacts := _own_artifacts(tracking_uri)) is not None:
            settle_addresses(Path(tracking_uri.removeprefix(_SQLITE)), artifacts)
        client = mlflow.MlflowClient(tracking_uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # a store's driver decides what it raises
        text = " ".join(redact(str(error)).split())[:300]
        raise UserError(f"MLflow store {redact(tracking_uri)} does not answer: {text}; check {ENVIRONMENT}") from error
    return client


def answers(tracking_uri: str) -> bool:
    """Whether a server answers within seconds, be it with a refusal; of files and databases only opening them can tell.

    MLflow's own client tries for many minutes.
    """
    parts = urlsplit(tracking_uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return True
    import http.client  # all slow, and for servers only
    import ssl
    import urllib.error
    import urllib.request

    place = parts.netloc.rpartition("@")[2]
    try:
        urllib.request.urlopen(f"{parts.scheme}://{place}{parts.path.rstrip('/')}/health", timeout=_PATIENCE).close()
    except urllib.error.HTTPError as error:
        return error.code not in (502, 503, 504)  # a gateway speaks for a server that is away
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # MLflow may be told to trust it all the same
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def has_store(tracking_uri: str) -> bool:
    """Whether a SQLite store's file is there; of a server only asking it can tell."""
    return not tracking_uri.startswith(_SQLITE) or Path(tracking_uri.removeprefix(_SQLITE)).is_file()


def require_store(tracking_uri: str) -> None:
    """Check that a SQLite store is there already, for whoever only reads or changes what others registered.

    Raises:
        UserError: if its file is missing.
    """
    if not has_store(tracking_uri):
        raise UserError(
            f"MLflow store {tracking_uri}: no such file; register a student first, or name the store "
            f"(--tracking-uri, --workspace or {ENVIRONMENT})"
        )


@contextmanager
def current_store(tracking_uri: str) -> Iterator[Any]:
    """Make a store MLflow's current one for its functions that take no address, and put the old one back."""
    mlflow = import_mlflow()
    before = os.environ.pop(ENVIRONMENT, None)  # so that what MLflow was told by call shows
    previous = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(tracking_uri)  # sets the environment variable, too
    try:
        yield mlflow
    finally:
        mlflow.set_tracking_uri(previous)
        os.environ.pop(ENVIRONMENT, None)
        if before is not None:
            os.environ[ENVIRONMENT] = before


def open_experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """The id of an experiment, which is created if it is missing.

    Raises:
        UserError: if it was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location(tracking_uri))
        except MlflowException:  # another step running at the same time may have made it
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment {name!r} was deleted; restore it, or name another (register_as.experiment)")
    return found.experiment_id


def redact(text: str) -> str:
    """Text without the credentials that addresses may carry: user information and query strings."""
    return _QUERY.sub(r"\1", _USER_INFO.sub(r"\1", text))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A tree of settings as `a.b.c: text`, without secrets; a list becomes one comma-separated text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif _SECRET.search(str(key)):
            flat[name] = HIDDEN
        elif isinstance(value, (list, tuple)) and not any(isinstance(v, Mapping) for v in value):
            flat[name] = redact(", ".join(map(str, value)))
        elif isinstance(value, (list, tuple)):
            flat |= flatten({str(i): v for i, v in enumerate(value)}, f"{name}.")
        else:
            flat[name] = redact(str(value))
    return flat


def clean_key(name: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as MLflow takes them, without what addresses may carry."""
    return {clean_key(name): redact(str(value)) for name, value in tags.items()}


def _chunks(values: Iterable, size: int) -> Iterator[list]:
    values = list(values)
    for start in range(0, len(values), size):
        yield values[start : start + size]


def log_step(
    tracking_uri: str,
    experiment: str,
    run_name: str,
    *,
    params: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    series: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    images: Mapping[str, Sequence[tuple[int, Path]]] | None = None,
    artifacts: Sequence[tuple[Path, str]] = (),
    tags: Mapping[str, str] | None = None,
) -> str:
    """Write one finished run and return its id. If writing breaks off, the run is marked as failed.

    Args:
        tracking_uri: of the store.
        experiment: its name; created if missing.
        run_name: what the run is called in lists.
        params: settings, nested as you like; secrets are hidden.
        metrics: final figures.
        series: curves, as (step, value) pairs.
        images: pictures that change over steps, as (step, image file) pairs.
        artifacts: (file or folder, folder of the run its contents go to) pairs; "" is the run's top.
        tags: short texts to search by.

    Raises:
        UserError: if the store does not answer, or the experiment was deleted.
    """
    client = open_client(tracking_uri)
    run_id = client.create_run(open_experiment(client, tracking_uri, experiment), run_name=run_name).info.run_id
    try:
        _log_figures(client, run_id, params or {}, metrics or {}, series or {}, tags or {})
        _log_files(client, run_id, images or {}, artifacts)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _log_figures(
    client: MlflowClient, run_id: str, params: Mapping, metrics: Mapping, series: Mapping, tags: Mapping
) -> None:
    from mlflow.entities import RunTag

    now = int(time.time() * 1000)
    points = [(name, value, now, 0) for name, value in metrics.items()]
    points += [(name, value, now, step) for name, curve in series.items() for step, value in curve]
    log_params(client, run_id, params)
    for part in _chunks((RunTag(k, v) for k, v in clean_tags(tags).items()), _CHUNK):
        client.log_batch(run_id, tags=part)
    log_points(client, run_id, points)


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Log settings, flattened; MLflow never changes one, so those the run has are left as they are."""
    from mlflow.entities import Param

    flat = {clean_key(name): value for name, value in flatten(params).items()}
    known = client.get_run(run_id).data.params if flat else {}
    for part in _chunks((Param(name, value) for name, value in flat.items() if name not in known), _CHUNK):
        client.log_batch(run_id, params=part)


def log_points(
    client: MlflowClient,
    run_id: str,
    points: Iterable[tuple[str, float, int, int]],
    model: str | None = None,
    dataset: tuple[str, str] | None = None,
) -> None:
    """Log figures.

    Args:
        client: of the store.
        run_id: whose figures.
        points: (name, value, milliseconds since 1970, step) each; what the run has already, it does not get twice.
        model: id of the logged model they were measured of.
        dataset: name and hash of the dataset they were measured on.
    """
    from mlflow.entities import Metric

    of = {} if dataset is None else {"dataset_name": dataset[0], "dataset_digest": dataset[1][:DIGEST]}
    metrics = [
        Metric(clean_key(name), float(value), when, int(step), model_id=model, **of)
        for name, value, when, step in points
    ]
    for part in _chunks(metrics, _METRICS):
        client.log_batch(run_id, metrics=part)


def _log_files(client: MlflowClient, run_id: str, images: Mapping, artifacts: Sequence[tuple[Path, str]]) -> None:
    from PIL import Image

    for name, frames in images.items():
        for step, path in frames:
            with Image.open(path) as image:
                client.log_image(run_id, image.convert("RGB"), key=clean_key(name), step=int(step), synchronous=True)
    for path, place in artifacts:
        log = client.log_artifacts if Path(path).is_dir() else client.log_artifact
        log(run_id, str(path), place or None)
