"""What every step does around its one call: named log lines, one-line errors, and a note for the run's summary."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.tracked import tracked
from danceopd.config.load import apply_overrides, load_recipe, parse_recipe
from danceopd.config.recipe import Recipe
from danceopd.errors import GatesFailed, Interrupted, UserError, mendable
from danceopd.files import write_json
from danceopd.text import parse_json, parse_yaml, read_json
from danceopd.tracking.journal import NO_LAST_WORD

RUN_ID = "KFP_RUN_ID"
RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A step that is running.

    Attributes:
        recipe: parsed.
        workspace: the folder all steps share.
        results: what the run's summary should say of this step; the step adds to it.
    """

    recipe: Recipe
    workspace: Path
    results: dict[str, Any]


def notes_folder(workspace: Path, run: str | None = None) -> Path:
    """Where the steps of a run leave their notes; the run is named by the environment unless given."""
    return Path(workspace) / "notes" / (run or os.environ.get(RUN_ID, "run"))


@contextmanager
def running(
    step: str, recipe: str, workspace: str, part: str = "", overrides: Sequence[str] = (), tracking_uri: str = ""
) -> Iterator[Step]:
    """Run a step's body.

    What a user can mend ends the process with one line and a code (2: bad input; 4: the student fails a gate), without
    a traceback; a bug goes through. Either way the run's notes say how the step ended, and what it found until then.

    Args:
        step: its name.
        recipe: as `read_recipe` takes it.
        workspace: the folder all steps share.
        part: which of several, for a step that runs once per teacher.
        overrides: of the recipe, each `key.sub=value`.
        tracking_uri: where MLflow hears of it; see `components.tracked`.
    """
    label = f"{step} {part}".strip()
    _log_as(label)
    with _one_line_errors():
        folder = _writable(Path(workspace))
        with _noted(label, folder) as results:
            read = read_recipe(recipe, overrides)
            with tracked(read, folder, os.environ.get(RUN_ID, ""), tracking_uri):
                try:
                    yield Step(read, folder, results)
                except KeyboardInterrupt as stop:
                    raise Interrupted("interrupted; run again, it goes on from what is saved") from stop


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if (told := mendable(error)) is None:
            raise
        log.debug("what led to it", exc_info=error)
        log.error("failed: %s", told[0])
        sys.exit(told[1])


@contextmanager
def _noted(label: str, workspace: Path) -> Iterator[dict]:
    """Leave a note of how the block ended; what is put into the yielded mapping goes with it."""
    started = time.monotonic()
    results: dict[str, Any] = {}

    def note(**outcome: Any) -> None:
        entry = {"step": label, "seconds": round(time.monotonic() - started, 1), **outcome}
        write_json(notes_folder(workspace) / f"{label.replace(' ', '-')}.json", entry)

    log.info("started")
    note(state=RUNNING)
    try:
        yield results
    except Exception as error:
        plain = isinstance(error, UserError | GatesFailed)
        note(state=FAILED, error=str(error) if plain else f"{type(error).__name__}: {error}", **results)
        raise
    except Interrupted as stop:
        log.warning("%s", stop)
        note(state=INTERRUPTED, error=str(stop))
        raise
    note(state=DONE, **results)
    log.info("finished in %.1f s", time.monotonic() - started)


def _log_as(label: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {label} | %(message)s", "%H:%M:%S"))
    for package in ("danceopd", "components"):
        logger = logging.getLogger(package)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def read_recipe(text: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe as people and steps give it: a shipped one's name, a YAML file, or its text as YAML or JSON.

    Raises:
        UserError: if it cannot be found or read, or does not fit the models.
    """
    if not any(sign in text for sign in "\n:{["):
        return load_recipe(text.strip(), overrides)
    return parse_recipe(apply_overrides(_json_or_yaml(text), overrides), "recipe")


def _json_or_yaml(text: str) -> Any:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        try:
            return parse_yaml(text, "recipe")
        except UserError as error:
            reason = str(error).removeprefix("recipe: ")
            raise UserError(
                f"recipe: neither valid YAML nor JSON ({reason}); give a shipped recipe's name, or its text"
            ) from error
    return parse_json(text, "recipe")


def _writable(workspace: Path) -> Path:
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workspace {workspace}: cannot be made ({error}); mount a volume there") from error
    if not os.access(workspace, os.W_OK):
        raise UserError(f"workspace {workspace}: no permission to write; give the step's user write access")
    return workspace


def read_notes(workspace: Path, run: str | None = None) -> list[dict]:
    """What the steps of a run noted, in the order they ended. Steps taken from the cache leave no note."""
    files = sorted(notes_folder(workspace, run).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [read_json(path) for path in files]


def failures(notes: list[dict]) -> list[str]:
    """Which steps failed and why, one text per step, for notes of a run that is over."""
    ended = [note for note in notes if note["state"] != DONE]
    return [f"{note['step']}: {note.get('error', NO_LAST_WORD)}" for note in ended]
