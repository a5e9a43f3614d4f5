"""A workspace's MLflow store after the workspace was moved or copied: its database names files by absolute address."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

log = logging.getLogger(__name__)

# Where MLflow's tables keep the address of files.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)


def settle_addresses(database: Path, artifacts: Path) -> int:
    """Let every address of a file below the place where `artifacts` was name the place where it is.

    An address elsewhere (another disk, a bucket) stays. All is changed in one transaction, or nothing.

    Args:
        database: the store's SQLite file; one that is not there needs nothing.
        artifacts: the folder of the store's files, by the name that it has always had.

    Returns:
        How many addresses were changed.
    """
    if not Path(database).is_file():
        return 0
    now = artifacts.as_uri()
    with closing(sqlite3.connect(database, timeout=30)) as store, store:
        known = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in known:
            return 0
        rows = store.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        before = [old for (old,) in rows if old and old.endswith(f"/{artifacts.name}") and old != now]
        moved = sum(_move(store, table, column, old, now) for old in before for table, column in _columns(store, known))
    if moved:
        log.info("%s: the workspace was moved; %d addresses of files follow it", database, moved)
    return moved


def _columns(store: sqlite3.Connection, known: set[str]) -> list[tuple[str, str]]:
    return [
        (table, column)
        for table, column in _PLACES
        if table in known and column in {row[1] for row in store.execute(f"PRAGMA table_info({table})")}
    ]


def _move(store: sqlite3.Connection, table: str, column: str, old: str, now: str) -> int:
    """Change the addresses that are `old` or lie below it; names of tables and columns are this module's own."""
    inside = f"{column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'"
    change = f"UPDATE {table} SET {column} = :now || substr({column}, length(:old) + 1) WHERE {inside}"
    return store.execute(change, {"old": old, "now": now}).rowcount
