"""Training that goes on where it was stopped, bit for bit: checkpoints of a loop's whole state, SIGTERM, Ctrl-C.

A checkpoint is a folder `step-00000200` with `state.json` (plain data, and where each tensor belongs),
`state.safetensors` (the tensors), of processes that share their tensors a file each with the rows it holds
(`shard_files.py`), and `manifest.json` (SHA-256 of all of them). It appears by one rename.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from danceopd.config.recipe import TrainRecipe
from danceopd.errors import Interrupted, UserError
from danceopd.files import CHECKPOINT, atomic_folder, hash_file, read_json, write_json
from danceopd.training.processes import ALONE, Processes
from danceopd.training.shard_files import SavedTensor, write_rows

if TYPE_CHECKING:
    from danceopd.data.sampler import TaskSampler
    from danceopd.training.learner import Learner

log = logging.getLogger(__name__)
STATE, TENSORS, MANIFEST = "state.json", "state.safetensors", "manifest.json"


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of dicts, lists, tuples, tensors and plain values as JSON; its tensors go to `tensors` by their path.

    Raises:
        TypeError: for any other value.
    """
    if isinstance(value, DTensor):
        tensors[path] = value
        return {"shared": [path, list(value.shape), value.device_mesh.size()]}
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, flatten(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be kept in a checkpoint")


def unflatten(value: Any, tensors: dict[str, Tensor], folder: Path | None = None) -> Any:
    """What `flatten` was given. Tensors are copies, laid out in memory as fresh ones are; of those that were shared it
    is told where in `folder` their rows lie."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "shared":
        name, shape, files = content
        assert folder is not None, "shared tensors lie in a checkpoint's folder"
        return SavedTensor(folder, name, torch.Size(shape), files)
    if kind == "dict":
        return {key: unflatten(item, tensors, folder) for key, item in content}
    items = [unflatten(item, tensors, folder) for item in content]
    return tuple(items) if kind == "tuple" else items


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: theirs alone, though it need not exist.
        keep: how many of the last to keep, > 0.
        run: a name for everything that decides the run's result; a checkpoint of another run is never used.
    """

    def __init__(self, folder: Path, keep: int, run: str):
        self.folder, self.keep, self.run = Path(folder), keep, run

    def save(self, step: int, state: dict, processes: Processes = ALONE) -> Path:
        """Write the state after `step` updates whole or not at all, then remove those no longer needed.

        Args:
            step: updates done.
            state: plain data and tensors.
            processes: every one must call it with the same state: each writes its rows of the tensors they share, the
                main one all else.

        Raises:
            UserError: if a process cannot write; nothing is left then.
        """
        tensors: dict[str, Tensor] = {}
        plain = {"run": self.run, "step": step, "state": flatten(state, "state", tensors)}
        shared = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        path = self.folder / f"{CHECKPOINT}{step:08d}"
        with atomic_folder(path) if processes.main else nullcontext() as scratch:
            hashes = _write_shared(shared, scratch, processes) if shared else {}
            if processes.main:
                assert scratch is not None
                save_file({name: tensor for name, tensor in tensors.items() if name not in shared}, scratch / TENSORS)
                (scratch / STATE).write_text(json.dumps(plain))
                hashes |= {name: hash_file(scratch / name) for name in (STATE, TENSORS)}
                write_json(scratch / MANIFEST, hashes)
        if processes.main:
            found = self._all()
            # One ahead of this step was passed over when the run was restored.
            stays = [other for other in found if other.name <= path.name][-self.keep :]
            for other in found:
                if other not in stays:
                    shutil.rmtree(other)
        processes.wait()
        return path

    def newest(self, processes: Processes = ALONE) -> tuple[int, dict] | None:
        """The step and state of the newest whole checkpoint; None if there is none. Damaged ones are passed over with
        a warning, and what a killed save left behind is removed.

        Args:
            processes: every one must call it; they share out the files to look through.

        Raises:
            UserError: if the folder's newest whole checkpoint is another run's, or not all processes see the same.
        """
        if processes.main:
            for leftover in self.folder.glob(f".{CHECKPOINT}*"):
                shutil.rmtree(leftover)
        processes.wait()
        found = self._all()
        self._check_seen(processes.gather([path.name for path in found]))
        for path in reversed(found):
            mine = _damage(path, processes)
            processes.wait()  # hashing takes its time
            said = [error for error in processes.gather(mine) if error is not None]
            if not said:
                return self._read(path)
            log.warning("%s; passing it over", said[0])
        if found:
            log.warning("%s: none of %d checkpoint(s) is whole; training starts anew", self.folder, len(found))
        return None

    def _check_seen(self, seen: list[list[str]]) -> None:
        if any(names != seen[0] for names in seen):
            newest = [int(names[-1].removeprefix(CHECKPOINT)) if names else None for names in seen]
            raise UserError(
                f"{self.folder}: the processes see checkpoints of different steps {newest}; "
                "the folder must lie on a volume that all of them share"
            )

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{CHECKPOINT}*"))

    def _read(self, path: Path) -> tuple[int, dict]:
        plain = json.loads((path / STATE).read_text())
        if plain["run"] != self.run:
            raise UserError(
                f"{path}: a checkpoint of another run ({plain['run']}, this is {self.run}); "
                "give this run a folder of its own, or remove that checkpoint"
            )
        return plain["step"], unflatten(plain["state"], load_file(path / TENSORS), path)


def _write_shared(shared: dict[str, DTensor], scratch: Path | None, processes: Processes) -> dict[str, str]:
    """Let each process write its rows into the main one's folder; their files' hashes."""
    folder = Path(processes.gather(str(scratch))[0])
    said: tuple[str, str | None, str]
    try:
        file = write_rows(shared, folder, processes.rank, processes.count)
        said = (file.name, hash_file(file), "")
    except OSError as error:  # the others must not wait for it
        said = (str(folder), None, f"process {processes.rank} cannot write its shard ({error.strerror or error})")
    processes.wait()  # writing takes its time
    told = processes.gather(said)
    for where, digest, why in told:
        if digest is None:
            raise UserError(f"{where}: {why}; nothing was saved: free some space, or mend the volume")
    return {name: digest for name, digest, _ in told}


def _damage(path: Path, processes: Processes) -> str | None:
    """What is wrong with a checkpoint; of several processes each looks at some of its files."""
    try:
        manifest = read_json(path / MANIFEST)
    except (ValueError, OSError) as error:
        return f"checkpoint {path / MANIFEST} cannot be read ({error})"
    hashes = manifest if isinstance(manifest, dict) else {}
    shards = sorted(set(hashes) - {STATE, TENSORS})
    for name in [STATE, TENSORS, *shards][processes.rank :: processes.count]:
        file = path / name
        if not file.is_file() or hashes.get(name) != hash_file(file):
            return f"checkpoint file {file} is damaged (its SHA-256 is not the manifest's)"
    return None


@dataclass
class StopRequest:
    """Whether the process was asked to end."""

    asked: bool = False


STOPS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_when_asked() -> Iterator[StopRequest]:
    """Within the block SIGTERM and Ctrl-C only set the yielded request, for the block to heed when it is ready.

    A second Ctrl-C interrupts at once. Python lets the main thread alone handle signals: in any other thread this does
    nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and not request.asked:
            log.warning("stopping after this step, which is saved; Ctrl-C again stops at once, without saving")
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what was there before may ignore it
        request.asked = True

    before = {number: signal.signal(number, ask) for number in STOPS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Keeper:
    """Saves a training loop as it goes.

    Attributes:
        start: updates done already; the loop goes on from there.
        kept: the `figures` of the checkpoint it was restored from; empty if there was none.
        saved_at: when the last save was, or the start; seconds of the monotonic clock.
    """

    spec: TrainRecipe
    checkpoints: Checkpoints | None
    learner: Learner
    sampler: TaskSampler
    generator: torch.Generator
    stop: StopRequest
    start: int = 0
    kept: dict[str, Any] = field(default_factory=dict)
    saved_at: float = field(default_factory=time.monotonic)

    def restore(self) -> None:
        """Put the newest checkpoint's state back, if there is one."""
        if self.checkpoints is None:
            return
        found = self.checkpoints.newest(self.learner.processes)
        if found is None:
            return
        self.start, state = found
        self.learner.load_state_dict(state["learner"])
        self.sampler.load_state_dict(state["sampler"])
        self.generator.set_state(state["generator"])
        self.kept = state["figures"]
        log.info("resumed after step %d of %d from %s", self.start, self.spec.steps, self.checkpoints.folder)

    def after(self, step: int, last: bool, **figures: Any) -> None:
        """Call after each update: saves if one is due, and ends the process if it was asked to end.

        Args:
            step: updates done.
            last: whether training ends with this one.
            figures: plain data that the loop needs to go on.

        Raises:
            Interrupted: after saving, if SIGTERM or Ctrl-C came.
            UserError: if a weight is not a finite number; the checkpoints before stay.
        """
        if self.checkpoints is None:
            return
        asked = self.learner.processes.any(self.stop.asked)
        if step % self.spec.checkpoint_every and not last and not asked and not self._due_by_time():
            return
        self.learner.check_finite()
        state: dict[str, Any] = {"learner": self.learner.state_dict(), "sampler": self.sampler.state_dict()}
        state |= {"generator": self.generator.get_state(), "figures": figures}
        path = self.checkpoints.save(step, state, self.learner.processes)
        self.saved_at = time.monotonic()
        if asked:
            raise Interrupted(
                f"interrupted after step {step} of {self.spec.steps} and saved; the same command goes on from {path}"
            )

    def _due_by_time(self) -> bool:
        """Whether the last save is so long ago that too much work would be lost; the same answer for all processes."""
        seconds = 60 * self.spec.checkpoint_minutes
        return seconds > 0 and self.learner.processes.any(time.monotonic() - self.saved_at >= seconds)


@contextmanager
def resumable(
    checkpoints: Checkpoints | None,
    spec: TrainRecipe,
    learner: Learner,
    sampler: TaskSampler,
    generator: torch.Generator,
) -> Iterator[Keeper]:
    """Run a training loop in the block so that it can be stopped and resumed.

    Without `checkpoints`, or with the recipe's `checkpoint_every` at 0, nothing is saved, and SIGTERM and Ctrl-C end
    the process as they always do.

    Raises:
        UserError: if the folder holds another run's checkpoint.
    """
    checkpoints = checkpoints if spec.checkpoint_every else None
    with nullcontext(StopRequest()) if checkpoints is None else stop_when_asked() as stop:
        keeper = Keeper(spec, checkpoints, learner, sampler, generator, stop)
        keeper.restore()
        yield keeper
    if learner.processes.any(stop.asked):  # it came after the last update's save
        raise Interrupted("interrupted after the last step; all are saved")
