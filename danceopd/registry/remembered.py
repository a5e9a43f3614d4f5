"""What was decided on a student, kept beside the workspace's own store for as long as that store does not change.

A run in which nothing changed asks the registry only what it said before. MLflow takes seconds to import and to open a
store; to see that a file is the one that it was takes none. Stores elsewhere are always asked.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from danceopd.files import hash_file, read_json, write_json
from danceopd.registry.register import Registration
from danceopd.tracking.mlflow_store import DATABASE, is_workspaces

FOLDER = "registrations"


def recall(workspace: Path, tracking_uri: str, asked: dict[str, Any]) -> Registration | None:
    """The registration that the same question ended in, if the store is the workspace's and has not changed since.

    Args:
        workspace: where the store lies.
        tracking_uri: the store that is asked.
        asked: all that decides the answer beside what the store holds.
    """
    path, state = _place(workspace, asked), _state(workspace, tracking_uri)
    if state is None or not path.is_file():
        return None
    kept = read_json(path)
    return Registration(**kept["registration"]) if kept["store"] == state else None


def keep(workspace: Path, tracking_uri: str, asked: dict[str, Any], answer: Registration) -> None:
    """Keep an answer of the workspace's own store; of another store nothing is kept."""
    state = _state(workspace, tracking_uri)
    if state is not None:
        write_json(_place(workspace, asked), {"store": state, "registration": asdict(answer)})


def _place(workspace: Path, asked: dict[str, Any]) -> Path:
    text = json.dumps([str(Path(workspace).resolve()), asked], sort_keys=True)  # a moved store settles its addresses
    return Path(workspace) / "cache" / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _state(workspace: Path, tracking_uri: str) -> str | None:
    """The content of the workspace's own store; None for another one, and while someone writes to it."""
    database = Path(workspace) / DATABASE
    writes = [database.with_name(f"{DATABASE}{suffix}") for suffix in ("-wal", "-journal")]
    if not is_workspaces(tracking_uri, workspace) or not database.is_file() or any(p.exists() for p in writes):
        return None
    return hash_file(database)
