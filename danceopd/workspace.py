"""Products in a workspace folder, named by their content: found or made, whole or absent.

Every step writes one product folder, named by everything it depends on (recipe section, inputs' digests, code); a
product that exists is reused, so that a retried pod and a second run on a laptop pick up what is there.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.errors import UserError
from danceopd.files import CHECKPOINT, atomic_folder, content_key, hash_file, hash_folder, hold, read_json, write_json
from danceopd.tracking import recording
from danceopd.tracking.journal import open_journal

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from danceopd.training.processes import Processes

log = logging.getLogger(__name__)

STEP = "step.json"


STUDENTS = "students"


MODELS = ("teachers", STUDENTS)  # steps whose products are models


_KEY = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Product:
    """What a step made.

    Attributes:
        folder: where it lies.
        digest: SHA-256 of its files.
        facts: figures and names worth passing on.
    """

    folder: Path
    digest: str
    facts: dict[str, Any]

    @property
    def pipeline(self) -> Path:
        """The diffusers pipeline folder of a base or student product."""
        return self._place("pipeline")

    @property
    def dataset(self) -> Path:
        """The folder of a data product's dataset."""
        return self._place("dataset")

    def _place(self, fact: str) -> Path:
        path = self.folder / self.facts[fact]
        if path.exists():
            return path
        # An older product names its place in the workspace by an absolute path, which a move leaves behind.
        workspace = self.folder.parent.parent
        places = [workspace / path.relative_to(above) for above in list(path.parents)[::-1]]
        return next((place for place in places if place.exists()), path)


def portable(path: Path, workspace: Path) -> str:
    """A place as a product's facts name it: seen from the product's folder if it lies in the workspace, else absolute.

    A workspace that is moved finds what lies in it.
    """
    path, workspace = Path(path).resolve(), Path(workspace).resolve()
    return str(Path("../..") / path.relative_to(workspace)) if path.is_relative_to(workspace) else str(path)


def open_product(folder: Path) -> Product:
    """Read a product folder back.

    Raises:
        UserError: if it is not there, or not whole.
    """
    folder = Path(folder)
    if not (folder / STEP).is_file():
        raise UserError(f"{folder}: no finished step there ({STEP} is missing); run the step before this one again")
    data = read_json(folder / STEP)
    return Product(folder, data["digest"], data["facts"])


@functools.cache
def code_revision() -> str:
    """A name for the method's own code: the same sources, the same name, with or without git."""
    package = Path(str(resources.files("danceopd")))
    sources = [p for pattern in ("**/*.py", "**/*.j2") for p in package.glob(pattern)]
    return content_key(sorted((p.relative_to(package).as_posix(), hash_file(p)) for p in sources))


def make_product(
    workspace: Path,
    step: str,
    name: str,
    inputs: Any,
    build: Callable[[Path, Path], dict],
    together: bool = False,
    journal: bool = True,
) -> Product:
    """Reuse the product, or have `build` write it into the first folder it is given and say its facts.

    The second folder is for what a build that was stopped needs to go on with when it is run again; it is named by the
    product's key and removed once the product is there. Of several processes the main one makes the product; the
    others wait for it, or take part in a build that is done `together` (training) and leave the writing to it. What is
    made inside another product's build keeps no `journal`: that build's own hears how it ends.
    """
    key = product_key(step, name, inputs)
    folder = Path(workspace) / step / f"{name}-{key}"
    checkpoints = Path(workspace) / "checkpoints" / f"{step}-{name}-{key}"
    there = (folder / STEP).is_file()
    processes = joined_processes()
    if processes is not None:
        there = processes.gather(there)[0]  # on a network's file system they need not see the same
        if not processes.main:
            if together and not there:
                with tempfile.TemporaryDirectory() as scratch:
                    build(Path(scratch), checkpoints)
            processes.wait()
            return open_product(folder)
    if there:
        shutil.rmtree(checkpoints, ignore_errors=True)
        log.info("%s %s: reused from %s", step, name, folder)
    else:
        lock = Path(workspace) / ".locks" / checkpoints.name
        with hold(folder, lock, wait=processes is None):  # several processes have no one to wait with
            if (folder / STEP).is_file():
                log.info("%s %s: made by another process meanwhile, %s", step, name, folder)
            else:
                recorded = recording.recorded(workspace, checkpoints.name) if journal else nullcontext()
                with recorded:
                    _build(Path(workspace), folder, checkpoints, step, name, key, build)
    if processes is not None:
        processes.wait()
    return open_product(folder)


def product_key(step: str, name: str, inputs: Any) -> str:
    return content_key(step, name, inputs, code_revision())


def _build(
    workspace: Path,
    folder: Path,
    checkpoints: Path,
    step: str,
    name: str,
    key: str,
    build: Callable[[Path, Path], dict],
) -> None:
    _tell_unfinished(checkpoints, f"{step}-{name}-")
    started = time.monotonic()
    with atomic_folder(folder) as scratch:
        facts = build(scratch, checkpoints)
        seconds = round(time.monotonic() - started, 1)
        digest = hash_folder(scratch)
        if step in MODELS:
            recording.model_made(open_journal(workspace, checkpoints.name), name, folder, digest, facts)
        write_json(scratch / STEP, {"step": step, "key": key, "digest": digest, "facts": facts, "seconds": seconds})
    shutil.rmtree(checkpoints, ignore_errors=True)
    log.info("%s %s: done in %.0f s, %s", step, name, seconds, folder)


def _tell_unfinished(checkpoints: Path, start: str) -> None:
    """Say that a product of the same name was begun under other settings, and can be gone on with under those only."""
    if any(checkpoints.glob(f"{CHECKPOINT}*")):
        return
    for other in sorted(checkpoints.parent.glob(f"{start}*")):
        saved = sorted(other.glob(f"{CHECKPOINT}*"))
        if saved and _KEY.fullmatch(other.name.removeprefix(start)):
            log.warning(
                "%s: an unfinished run under other settings, data or code, saved at step %d; this one starts at step "
                "0. With those settings it would go on; if it is not wanted any more, remove that folder",
                other,
                int(saved[-1].name.removeprefix(CHECKPOINT)),
            )


def joined_processes() -> Processes | None:
    """The processes that run this together, or None if it runs alone (then torch is not imported for the question)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from danceopd.training.processes import this_process

    return this_process()


def main_first() -> AbstractContextManager:
    """Of several processes, let the main one run the block first; the others find what it wrote."""
    processes = joined_processes()
    return nullcontext() if processes is None else processes.main_first()


def store_of(tracking_uri: str | None, workspace: Path) -> str:
    from danceopd.tracking.mlflow_store import default_tracking_uri

    return tracking_uri or default_tracking_uri(Path(workspace))
