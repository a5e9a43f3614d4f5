"""What a step has to tell MLflow, written down in the workspace first: training never waits for a tracking server.

A journal is a folder `tracking/<run>/<product>` with `journal.jsonl`, one JSON object per line in the order things
happened, and `files/`. `delivery.py` takes it to the store. Only the first of several processes writes; a line that a
kill cut off is passed over. What was written once for a name and a step is not written again, so that training that
goes on from a checkpoint leaves no point twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from danceopd.errors import Interrupted, UserError
from danceopd.files import link_file, write_json
from danceopd.tracking.mlflow_store import flatten, redact

RUN = "DANCEOPD_RUN"  # names the pipeline run this process is a step of
ALONE = "alone"  # the folder of commands that belong to no pipeline run
TRACKING, LINES, FILES, RUN_FILE, END_FILE = "tracking", "journal.jsonl", "files", "run.json", "end.json"
NO_LAST_WORD = "ended without a word; was it stopped, or out of memory?"
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"


@dataclass(frozen=True)
class DatasetUse:
    """A dataset as a run read it.

    Attributes:
        name: of the recipe whose data it is.
        digest: SHA-256 of its content.
        source: where it came from: data revision, or the folder it lies in.
        context: training or evaluation.
        counts: {task: {split: records}}.
    """

    name: str
    digest: str
    source: dict[str, Any]
    context: str
    counts: dict[str, Any]


def current_run() -> str | None:
    """The pipeline run this process is a step of, or None."""
    return os.environ.get(RUN) or None


def run_folder(workspace: Path, run: str | None = None) -> Path:
    """Where the journals of a pipeline run lie; default: those of the run this process belongs to, or of no run."""
    return Path(workspace) / TRACKING / (run or current_run() or ALONE)


def begin_run(workspace: Path, name: str, experiment: str, params: Mapping[str, Any]) -> None:
    """Say what the parent of this run's steps is called and holds; every step may, the first that comes is heard."""
    path = run_folder(workspace) / RUN_FILE
    if current_run() is not None and not path.is_file():
        write_json(path, {"name": name, "experiment": experiment, "params": flatten(params), "time": now()})


def end_run(workspace: Path, status: str, metrics: Mapping[str, float | None] | None = None) -> None:
    """Say how the pipeline run ended and what it came to; saying the same status again changes nothing."""
    path = run_folder(workspace) / END_FILE
    if current_run() is None or not path.with_name(RUN_FILE).is_file():
        return
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get("status") != status:
        figures = before.get("metrics", {}) | {n: v for n, v in (metrics or {}).items() if v is not None}
        write_json(path, {"status": status, "metrics": figures, "time": now()})


def end_silent(workspace: Path) -> None:
    """End the journals of a pipeline run that is over whose steps were killed before they could say so."""
    for path in sorted(run_folder(workspace).glob(f"*/{LINES}")):
        states = [line for line in read_lines(path.parent)[0] if line["kind"] in ("start", "end")]
        if current_run() is not None and states and states[-1]["kind"] == "start":
            Journal(path.parent).end(KILLED, NO_LAST_WORD)


def open_journal(workspace: Path, name: str) -> Journal:
    """The journal of one product; of several processes all but the first get one that stays empty."""
    main = os.environ.get("RANK", "0") == "0"
    return Journal(run_folder(workspace) / name if main else None)


class Journal:
    """The lines and files of one run in MLflow; `None` for a folder: nothing is written."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        known = read_lines(folder)[0] if folder is not None else []
        self._seen = {mark for line in known for mark in _marks(line)}
        used = [line for line in known if line["kind"] == "dataset"]
        self._dataset = {name: used[-1][name] for name in ("name", "digest")} if used else None

    def start(self, title: str, experiment: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it.

        Args:
            title: what it is called in lists.
            experiment: in MLflow.
            params: settings, nested as you like; secrets are hidden.
            tags: short texts to search by.
        """
        self._write("start", title=title, experiment=experiment, params=flatten(params), tags=dict(tags))

    def points(self, step: int, values: Mapping[str, float | None], model: str | None = None) -> None:
        """Figures of one step; `model` is the digest of what they were measured of, on the dataset that was read."""
        found = {name: float(value) for name, value in values.items() if value is not None}
        fresh = {name: value for name, value in found.items() if self._new("points", name, step)}
        if fresh:
            self._write("points", step=step, values=fresh, model=model, dataset=self._dataset if model else None)

    def image(self, name: str, step: int, path: Path) -> None:
        """A picture that changes over steps."""
        if self._new("image", name, step):
            self._write("image", name=name, step=step, file=self._keep(path, f"{name}-{step:08d}{Path(path).suffix}"))

    def file(self, path: Path, place: str = "") -> None:
        """A file, and the folder of the run it goes to; "" is the run's top."""
        self._write("file", file=self._keep(path, f"{place}/{Path(path).name}".lstrip("/")), place=place)

    def dataset(self, use: DatasetUse) -> None:
        """A dataset that was read."""
        self._dataset = {"name": use.name, "digest": use.digest}
        self._write("dataset", **asdict(use))

    def model(self, name: str, digest: str, step: int, tags: Mapping[str, Any]) -> None:
        """A state of a model, made at `step`; `digest` names it wherever it is used."""
        if self._new("model", digest, step):
            self._write("model", name=name, digest=digest, step=step, tags=dict(tags))

    def next_step(self, prefix: str) -> int:
        """The step after the last of all figures whose names begin so; 0 without any."""
        return 1 + max((s for kind, name, s in self._seen if kind == "points" and name.startswith(prefix)), default=-1)

    def _new(self, kind: str, name: str, step: int) -> bool:
        mark = (kind, name, step)
        fresh = mark not in self._seen
        self._seen.add(mark)
        return fresh

    def uses(self, digest: str) -> None:
        """A model that was read."""
        self._write("uses", digest=digest)

    def end(self, status: str, error: str = "") -> None:
        """Say how it ended, if it ever started."""
        if self.folder is not None and (self.folder / LINES).is_file():
            self._write("end", status=status, error=redact(error))

    def _keep(self, path: Path, name: str) -> str:
        """Keep a file under the journal, as a second name for it where the file system can do that."""
        if self.folder is None:
            return name
        kept = self.folder / FILES / name
        kept.unlink(missing_ok=True)
        link_file(Path(path), kept)
        return name

    def _write(self, kind: str, **content: Any) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"kind": kind, "time": now(), **content}) + "\n"
        file = os.open(self.folder / LINES, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            torn = size and os.pread(file, 1, size - 1) != b"\n"  # a kill came in the middle of the last line
            os.write(file, (("\n" if torn else "") + line).encode())
        finally:
            os.close(file)


@contextmanager
def ending(journal: Journal) -> Iterator[None]:
    """Note how a block ended; a stop that can be resumed is no failure."""
    try:
        yield
    except Interrupted as stop:
        journal.end(KILLED, str(stop))
        raise
    except Exception as error:
        journal.end(FAILED, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise
    except BaseException:
        journal.end(KILLED)
        raise
    journal.end(FINISHED)


def read_lines(folder: Path, offset: int = 0) -> tuple[list[dict], int]:
    """The whole lines of a journal from a byte on, and where they end."""
    path = Path(folder) / LINES
    if not path.is_file():
        return [], offset
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read()
    content = content[: content.rfind(b"\n") + 1]
    return [line for line in map(_parsed, content.splitlines()) if line is not None], offset + len(content)


def _parsed(line: bytes) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:  # torn by a kill
        return None


def _marks(line: dict) -> list[tuple[str, str, int]]:
    """What is written once only: kind, name and step."""
    kind = line["kind"]
    if kind == "points":
        return [(kind, name, line["step"]) for name in line["values"]]
    return [(kind, line["digest" if kind == "model" else "name"], line["step"])] if kind in ("image", "model") else []


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000
