"""A run's end: its summary as Markdown, what MLflow hears of it, and what becomes of a training job it submitted."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from components.commands import hand_over
from components.running import DONE, RUN_ID, failures, notes_folder, read_notes
from components.tracked import end_tracked, ended_well
from danceopd.errors import Interrupted, UserError
from danceopd.files import write_atomic

SUCCEEDED, FAILED = "SUCCEEDED", "FAILED"
REGISTER = "register"  # the step that needs all others
log = logging.getLogger(__name__)


def write_summary(workspace: str, state: str, path: str, tracking_uri: str = "", **revisions: str) -> None:
    """Write the run's summary as Markdown: how it ended, what failed and why, the registration, the figures.

    A training job of a run that did not end well is deleted: nobody follows it any more.

    Args:
        workspace: of the run.
        state: how the pipeline ended, in its own words.
        path: of the file; a copy lies beside the run's notes.
        tracking_uri: where MLflow hears how it ended; see `components.tracked`.
        revisions: code and data revision, by name; one that is empty is what a step noted.
    """
    folder = Path(workspace)
    notes = read_notes(folder)
    good = ended_well(state, any(note["step"] == REGISTER and note["state"] == DONE for note in notes))
    jobs = {name: _end_job(name, good) for name in submitted_jobs(folder)}
    noted = {name: note[name] for note in notes for name in revisions if name in note}
    shown = noted | {name: value for name, value in revisions.items() if value}
    text = summary_markdown(notes, _in_words(state, good), shown, jobs)
    write_atomic(notes_folder(folder) / "summary.md", text)
    write_atomic(Path(path), text)
    end_tracked(folder, os.environ.get(RUN_ID, ""), good, tracking_uri)


def submitted_jobs(workspace: Path) -> list[str]:
    """The training jobs that the run submitted: each left its manifest beside the run's notes."""
    return sorted(path.stem for path in notes_folder(workspace).glob("*.yaml"))


def _in_words(state: str, good: bool) -> str:
    """How the run ended, with Kubeflow's own word where that is another."""
    word = SUCCEEDED if good else FAILED
    return word if state == word else f"{word} (Kubeflow: {state})"


def _end_job(name: str, good: bool) -> str:
    """Delete a job of a run that did not end well; returns what became of it."""
    if good:
        return "done; it goes with its run"
    try:
        hand_over(f"job {name}", ["danceopd", "job", "cancel", name, "--if-there"])
    except (UserError, RuntimeError, Interrupted) as error:
        log.warning("%s", error)
        return f"may still hold its nodes, for it could not be deleted; run: danceopd job cancel {name}"
    return "deleted with its run; its checkpoints stay on the volume, and the next run goes on from them"


def summary_markdown(notes: list[dict], state: str, revisions: dict[str, str], jobs: dict[str, str]) -> str:
    """The run's summary; see `write_summary`."""
    lines = [f"# DanceOPD run: {state}", ""]
    lines += [f"- {name.replace('_', ' ')}: `{value}`" for name, value in revisions.items()]
    if failed := failures(notes):
        lines += ["", "## What failed", "", *[f"- {failure}" for failure in failed]]
    if jobs:
        lines += ["", "## Training jobs", "", *[f"- {name}: {fate}" for name, fate in jobs.items()]]
    for registration in [note["registration"] for note in notes if "registration" in note]:
        lines += ["", "## Registration", "", *[f"- {name}: {_text(v)}" for name, v in registration.items()]]
    for said in [note["shortfalls"] for note in notes if note.get("shortfalls")]:
        lines += ["", "## What the student lacks, and what to try", "", *[f"- {line}" for line in said]]
    lines += ["", "## Steps that ran", "", "| step | seconds | |", "|---|---|---|"]
    lines += [f"| {note['step']} | {note['seconds']} | {note['state']} |" for note in notes]
    reports = [Path(note["evaluation"]) / "report.md" for note in notes if "evaluation" in note]
    lines += ["", *[report.read_text() for report in reports if report.is_file()]]
    return "\n".join(lines).rstrip() + "\n"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value is None else str(value)
