"""Work shared among processes: each takes the next item when it is done with its last, and none outlives this one."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from danceopd.devices import usable_cores
from danceopd.errors import Interrupted, UserError

log = logging.getLogger(__name__)


def work_off(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Do `work` on every item, in order, in this many processes; 1: in this one.

    Args:
        work: a function that another process can import.
        items: what it is given, one at a time.
        workers: processes, each with its share of the cores.

    Yields:
        (item, its result, or the exception it ended with), as they are done.

    Raises:
        Interrupted: if SIGTERM came.
    """
    with _end_by_sigterm():
        if workers == 1:
            for item in items:
                yield item, _tried(work, item)
        else:
            yield from _share(work, list(items), workers)


def _tried(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except UserError as error:
        return error
    except Exception as error:
        log.exception("it failed")
        return error


@contextmanager
def _end_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Interrupted("interrupted; what is done is kept, and the same command goes on from there")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _environment(**settings: str) -> Iterator[None]:
    """Processes started within the block find these in their environment."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _share(work: Callable[[Any], Any], items: list[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    processes = _start(work, min(workers, len(items)))
    todo = items[::-1]
    busy: dict[Connection, Any] = {}

    def give(line: Connection) -> None:
        busy[line] = todo.pop()
        with suppress(OSError):  # the process is gone, and reading from it will say so
            line.send(busy[line])

    ended = False
    try:
        for line in processes:
            give(line)
        while busy:
            for line in cast(list[Connection], wait(list(busy))):
                item = busy.pop(line)
                try:
                    result = line.recv()
                except (EOFError, OSError):
                    processes[line].join()
                    yield item, RuntimeError(f"its process ended with code {processes[line].exitcode}")
                    continue
                if todo:
                    give(line)
                yield item, result
        for item in todo[::-1]:
            yield item, RuntimeError("no process was left for it")
        ended = True
    finally:
        for line, process in processes.items():
            line.close()  # who waits for an item ends by this
            if not ended:
                process.terminate()
        for process in processes.values():
            process.join()


def _start(work: Callable[[Any], Any], count: int) -> dict[Connection, BaseProcess]:
    """Processes that wait for items at the other end of their lines."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    processes: dict[Connection, BaseProcess] = {}
    with _environment(OMP_NUM_THREADS=str(max(1, usable_cores() // max(1, count))), TQDM_DISABLE="1"):
        for _ in range(count):
            mine, theirs = context.Pipe()
            processes[mine] = context.Process(target=_serve, args=(theirs, work), daemon=True)
            processes[mine].start()
            theirs.close()
    return processes


def _serve(line: Connection, work: Callable[[Any], Any]) -> None:
    """A worker's life: until the other end of its line is closed, or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the others
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            item = line.recv()
        except EOFError:
            return
        line.send(_tried(work, item))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # only workers come here
    parent.join()
    os._exit(1)
