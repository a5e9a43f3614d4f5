"""Journals to the MLflow store: one parent run per pipeline run, a child per step, nothing twice.

How far a journal has got is kept beside it, and what a broken delivery may have left in the store is looked for before
it is sent again. A store that is away costs seconds and one warning; what it should have got stays in the workspace.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.errors import UserError
from danceopd.files import read_json, write_json
from danceopd.tracking import journal, mlflow_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
RUN_TAG, JOURNAL_TAG, DIGEST_TAG = "danceopd.run", "danceopd.tracking.journal", "danceopd.digest"
DELIVERED, STORE, LOCK = "delivered.json", "store", ".lock"
_OWN = "the workspace's own"  # store of journals that are for no other; its address changes as the workspace is moved
# What a store says of a line it will never take; everything else may be better tomorrow.
_REFUSED = (
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_STATE",
)


@dataclass(frozen=True)
class Outcome:
    """What a delivery came to.

    Attributes:
        delivered: journals that are all in the store now, and were not before.
        waiting: journals with something the store has not got.
        reason: why they wait; empty if none does.
    """

    delivered: int
    waiting: int
    reason: str = ""


def is_file_store(tracking_uri: str) -> bool:
    """Whether a store is a file of this machine, which no one watches while a step runs."""
    return tracking_uri.startswith(("sqlite:", "file:", "/", "."))


def pending(workspace: Path, run: str | None = None) -> list[Path]:
    """The journals of a workspace, or of one of its runs, with something that was not delivered."""
    found = Path(workspace).glob(f"{journal.TRACKING}/{run or '*'}/*/{journal.LINES}")
    return sorted(path.parent for path in found if path.stat().st_size > _state(path.parent).get("offset", 0))


def deliver(workspace: Path, tracking_uri: str, by_hand: bool = False) -> Outcome:
    """Send the store what it has not got: of this process's run, and of earlier ones that were for the same store.

    Args:
        workspace: whose journals.
        tracking_uri: of the store.
        by_hand: send what was meant for any store.

    A store that does not answer is no error: the outcome says so and, unless by hand, a line in the log.
    """
    store, own = mlflow_store.redact(tracking_uri), journal.run_folder(workspace)
    mark = _OWN if mlflow_store.is_workspaces(tracking_uri, workspace) else store
    if own.is_dir() and not (own / STORE).is_file():
        (own / STORE).write_text(mark)
    folders = [own] if own.is_dir() else []
    folders += [f for f in sorted(Path(workspace).glob(f"{journal.TRACKING}/*")) if f != own and f.is_dir()]
    wanted = [f for f in folders if by_hand or f == own or _meant_for(f) == mark]
    waiting = {f: [j for j in pending(workspace, f.name)] for f in wanted}
    waiting = {f: journals for f, journals in waiting.items() if journals or _parent_waits(f)}
    if not waiting:
        return Outcome(0, 0)
    count = sum(map(len, waiting.values()))
    if not mlflow_store.answers(tracking_uri):
        return _away(count, store, mlflow_store.AWAY, by_hand)
    try:
        client = mlflow_store.open_client(tracking_uri)
        return _deliver_all(client, tracking_uri, waiting)
    except Exception as error:  # a store's driver decides what it raises
        left = sum(len(pending(workspace, f.name)) for f in waiting)
        return _away(left, store, " ".join(mlflow_store.redact(str(error)).split())[:200], by_hand)


def _away(waiting: int, store: str, reason: str, by_hand: bool) -> Outcome:
    if not by_hand:  # who asked is told by the outcome
        log.warning(
            "MLflow store %s: %s; %d journal(s) stay in the workspace and are delivered by the next step, or "
            "by: danceopd tracking deliver",
            store,
            reason,
            waiting,
        )
    return Outcome(0, waiting, reason)


def _meant_for(run: Path) -> str | None:
    if not (run / STORE).is_file():
        return None
    mark = (run / STORE).read_text()
    workspace = run.parent.parent
    # An older workspace, which may have been moved since, notes the address of its own store.
    return _OWN if mlflow_store.was_workspaces(mark, workspace) else mark


def _deliver_all(client: MlflowClient, uri: str, waiting: Mapping[Path, list[Path]]) -> Outcome:
    delivered, left = 0, 0
    for run, journals in waiting.items():
        parent = _parent(client, uri, run)
        for folder in _in_order(journals):
            with _locked(folder) as mine:
                whole = mine and _Sender(client, uri, run, folder, parent).send()
            delivered, left = delivered + whole, left + (not whole)
        _end_parent(client, run, parent)
    return Outcome(delivered, left, "another process delivers them" if left else "")


def _in_order(journals: list[Path]) -> list[Path]:
    """Journals by their start, but the one that makes a model before those that read it.

    Two of them may begin in one millisecond, and the clocks of two machines differ by more than that.
    """
    lines = {folder: journal.read_lines(folder)[0] for folder in journals}
    by_start = sorted(journals, key=lambda folder: lines[folder][0]["time"] if lines[folder] else 0)
    makers = {line["digest"]: folder for folder in by_start for line in lines[folder] if line["kind"] == "model"}
    order: list[Path] = []

    def place(folder: Path, asking: frozenset[Path]) -> None:
        if folder in order or folder in asking:
            return
        for line in lines[folder]:
            maker = makers.get(line["digest"]) if line["kind"] == "uses" else None
            if maker is not None:
                place(maker, asking | {folder})
        order.append(folder)

    for folder in by_start:
        place(folder, frozenset())
    return order


# -------------------------------------------------------------------------------------------------------------- parent


def parent_run(client: MlflowClient, tracking_uri: str, workspace: Path) -> str | None:
    """The parent of this process's pipeline run, made if no step was here before; None outside of a pipeline run."""
    return None if journal.current_run() is None else _parent(client, tracking_uri, journal.run_folder(workspace))


def _parent(client: MlflowClient, uri: str, run: Path) -> str | None:
    """Steps that come at once agree on one parent: who holds the lock makes it, and the others read its id."""
    if not (run / journal.RUN_FILE).is_file():
        return None
    with _locked(run, wait=True):
        state = _state(run)
        if state.get("run_id") is None:
            about = read_json(run / journal.RUN_FILE)
            experiment = mlflow_store.open_experiment(client, uri, about["experiment"])
            run_id = _find(client, experiment, RUN_TAG, run.name)
            if run_id is None:
                tags = {RUN_TAG: run.name}
                made = client.create_run(experiment, about["time"], tags, f"{about['name']} {run.name[:8]}")
                run_id = made.info.run_id
            mlflow_store.log_params(client, run_id, about["params"])
            state = {"run_id": run_id}
            write_json(run / DELIVERED, state)
    return state["run_id"]


def _parent_waits(run: Path) -> bool:
    """Whether the store lacks how a run ended. One that ended well and made nothing gets no entry: nobody looks for it,
    and opening a store takes seconds."""
    end = run / journal.END_FILE
    if not end.is_file():
        return False
    status, known = read_json(end)["status"], _state(run)
    if not known and status == journal.FINISHED and not any(run.glob(f"*/{journal.LINES}")):
        return False
    return status != known.get("status")


def _end_parent(client: MlflowClient, run: Path, parent: str | None) -> None:
    if parent is None or not _parent_waits(run):
        return
    end = read_json(run / journal.END_FILE)
    mlflow_store.log_points(client, parent, [(name, v, end["time"], 0) for name, v in end["metrics"].items()])
    client.set_terminated(parent, end["status"], end["time"])
    write_json(run / DELIVERED, {"run_id": parent, "status": end["status"]})


def _find(client: MlflowClient, experiment: str, tag: str, value: str) -> str | None:
    found = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", max_results=1, order_by=["start_time ASC"])
    return found[0].info.run_id if found else None


# --------------------------------------------------------------------------------------------------------------- child


class _Sender:
    """Takes one journal to its run."""

    def __init__(self, client: MlflowClient, uri: str, run: Path, folder: Path, parent: str | None):
        self.client, self.uri, self.folder, self.parent = client, uri, folder, parent
        self.name = mlflow_store.clean_key(f"{run.name}/{folder.name}")
        state = _state(folder)
        self.run_id: str | None = state.get("run_id")
        self.experiment: str | None = state.get("experiment")
        self.offset = state.get("offset", 0)
        self._models: dict[str, str] = {}

    @property
    def _run(self) -> str:
        """The run's id; empty, which the store refuses, if it refused to make the run."""
        return self.run_id or ""

    @property
    def _in(self) -> str:
        """The id of the run's experiment; empty as the run's is."""
        return self.experiment or ""

    def send(self) -> bool:
        """Send what is new; afterwards the store has all the journal says."""
        lines, end = journal.read_lines(self.folder, self.offset)
        for kind, of_kind in itertools.groupby(lines, key=lambda line: line["kind"]):
            if kind == "points":
                self._try(kind, list(of_kind))
            else:
                for line in of_kind:
                    self._try(kind, line)
        self.offset = end
        self._save()
        for line in lines:  # the store has them
            if "file" in line:
                (self.folder / journal.FILES / line["file"]).unlink(missing_ok=True)
        return True

    def _save(self) -> None:
        state = {"run_id": self.run_id, "experiment": self.experiment, "offset": self.offset}
        write_json(self.folder / DELIVERED, state)

    def _try(self, kind: str, content: Any) -> None:
        """Send a line, or points; what the store will never take is passed over, or it would hold up all behind it."""
        from mlflow.exceptions import MlflowException

        try:
            getattr(self, f"_{kind}")(content)
        except MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            text = " ".join(mlflow_store.redact(str(error)).split())[:200]
            log.warning("MLflow does not take %s of %s: %s", kind, self.name, text)

    def _start(self, line: dict) -> None:
        if self.run_id is None:
            self.experiment = mlflow_store.open_experiment(self.client, self.uri, line["experiment"])
            self.run_id = _find(self.client, self.experiment, JOURNAL_TAG, self.name)
        if self.run_id is None:
            tags = {JOURNAL_TAG: self.name} | ({PARENT_TAG: self.parent} if self.parent else {})
            tags |= mlflow_store.clean_tags(line["tags"])
            self.run_id = self.client.create_run(self._in, line["time"], tags, line["title"]).info.run_id
        else:
            self.client.update_run(self.run_id, status=journal.RUNNING)
        self._save()  # found again though the rest of this delivery breaks off
        mlflow_store.log_params(self.client, self._run, line["params"])

    def _end(self, line: dict) -> None:
        if line["error"]:
            self.client.set_tag(self._run, "error", mlflow_store.redact(line["error"])[:500])
        self.client.set_terminated(self._run, line["status"], line["time"])

    def _points(self, lines: list[dict]) -> None:
        for (model, data), same in itertools.groupby(lines, key=lambda line: (line["model"], line["dataset"])):
            points = [(n, value, line["time"], line["step"]) for line in same for n, value in line["values"].items()]
            of = None if data is None else (data["name"], data["digest"])
            mlflow_store.log_points(self.client, self._run, points, self._model_of(model) if model else None, of)

    def _image(self, line: dict) -> None:
        from PIL import Image

        key = mlflow_store.clean_key(line["name"])
        mark = f"images/{key.replace('/', '~')}+step+{line['step']}+timestamp+{line['time']}+"
        # MLflow gives each picture a random name: one that a broken delivery left is known by its beginning.
        if any(name.startswith(mark) and name.endswith(".webp") for name in self._images_there):
            return
        path = self.folder / journal.FILES / line["file"]
        if path.is_file():
            with Image.open(path) as picture:
                self.client.log_image(
                    self._run,
                    picture.convert("RGB"),
                    key=key,
                    step=line["step"],
                    timestamp=line["time"],
                    synchronous=True,
                )

    @functools.cached_property
    def _images_there(self) -> list[str]:
        return [item.path for item in self.client.list_artifacts(self._run, "images")]

    def _file(self, line: dict) -> None:
        path = self.folder / journal.FILES / line["file"]
        if path.is_file():
            self.client.log_artifact(self._run, str(path), line["place"] or None)

    def _dataset(self, line: dict) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind = "dvc" if line["source"].get("dvc") else "local"
        profile = json.dumps({"records": line["counts"], "content": line["digest"]})
        source = mlflow_store.redact(json.dumps(line["source"], sort_keys=True))
        data = Dataset(line["name"], line["digest"][: mlflow_store.DIGEST], kind, source, profile=profile)
        self.client.log_inputs(self._run, [DatasetInput(data, [InputTag("mlflow.data.context", line["context"])])])

    def _model(self, line: dict) -> None:
        from mlflow.entities import LoggedModelOutput

        model = self._model_of(line["digest"])
        if model is None:
            tags = {DIGEST_TAG: line["digest"]} | mlflow_store.clean_tags(line["tags"])
            made = self.client.create_logged_model(self._in, line["name"], self._run, tags, model_type="field")
            model = made.model_id
            self.client.finalize_logged_model(model, "READY")
        outputs = self.client.get_run(self._run).outputs
        if model not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self.client.log_outputs(self._run, [LoggedModelOutput(model, line["step"])])

    def _uses(self, line: dict) -> None:
        use_model(self.client, self._run, self._in, line["digest"])

    def _model_of(self, digest: str) -> str | None:
        if digest not in self._models and (model := _model_of(self.client, self._in, digest)) is not None:
            self._models[digest] = model
        return self._models.get(digest)


def use_model(client: MlflowClient, run_id: str, experiment: str, digest: str) -> None:
    """Say that a run read the model with a digest, if the experiment has one: older products were not logged."""
    from mlflow.entities import LoggedModelInput

    if (model := _model_of(client, experiment, digest)) is not None:
        client.log_inputs(run_id, models=[LoggedModelInput(model)])


def _model_of(client: MlflowClient, experiment: str, digest: str) -> str | None:
    found = client.search_logged_models([experiment], f"tags.`{DIGEST_TAG}` = '{digest}'", max_results=1)
    return found[0].model_id if found else None


# --------------------------------------------------------------------------------------------------------------- files


def _state(folder: Path) -> dict[str, Any]:
    path = folder / DELIVERED
    return read_json(path) if path.is_file() else {}


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a folder alone among processes; without waiting, whether it is held. A lock ends with its process."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            log.debug("%s: no locks here", folder)
        yield True
    finally:
        os.close(file)


# --------------------------------------------------------------------------------------------------- in the background


class Courier:
    """Delivers every `every` seconds from a thread of its own, for whoever watches a long step on a server."""

    def __init__(self, workspace: Path, tracking_uri: str, every: float = 60.0):
        self._workspace, self._uri, self._every = Path(workspace), tracking_uri, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="danceopd-courier", daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            if mlflow_store.answers(self._uri):  # whether it is away is said once, at the end
                deliver(self._workspace, self._uri)

    def __enter__(self) -> Courier:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def deliver_named(workspace: Path, tracking_uri: str) -> Outcome:
    """Deliver by hand all that waits in a workspace.

    Raises:
        UserError: if the workspace holds no journals, or some still wait.
    """
    if not (Path(workspace) / journal.TRACKING).is_dir():
        raise UserError(f"{workspace}: no journals there ({journal.TRACKING}/ is missing); name another --workspace")
    outcome = deliver(workspace, tracking_uri, by_hand=True)
    if outcome.waiting:
        raise UserError(
            f"MLflow store {mlflow_store.redact(tracking_uri)}: {outcome.waiting} journal(s) still wait "
            f"({outcome.reason}); try again when it is back, or name another (--tracking-uri)"
        )
    return outcome
