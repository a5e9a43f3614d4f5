"""Work shared among processes: each takes the next item when it is done with its last, and none outlives this one."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from danceopd.errors import Interrupted, UserError

log = logging.getLogger(__name__)


def usable_cores() -> int:
    """The cores that `OMP_NUM_THREADS` allows, else those this process may run on."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit() and int(allowed) > 0:
        return int(allowed)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work_off(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Do `work` on every item, in order, in so many processes; 1 is this one.

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
def _threads(count: int) -> Iterator[None]:
    """Processes started within the block compute in so many threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _share(work: Callable[[Any], Any], items: list[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    todo, busy, processes = items[::-1], {}, {}
    try:
        with _threads(max(1, usable_cores() // workers)):
            for _ in range(min(workers, len(items))):
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                theirs.close()
                processes[mine] = process
        for line in processes:
            busy[line] = todo.pop()
            line.send(busy[line])
        while busy:
            for line in wait(list(busy)):
                item = busy.pop(line)
                try:
                    result = line.recv()
                except EOFError:
                    processes[line].join()
                    result = RuntimeError(f"its process ended with code {processes[line].exitcode}")
                    line = None
                yield item, result
                if line is not None and todo:
                    busy[line] = todo.pop()
                    line.send(busy[line])
        for item in todo[::-1]:  # every process died
            yield item, RuntimeError("no process was left for it")
    finally:
        for line, process in processes.items():
            line.close()
            process.terminate()
        for process in processes.values():
            process.join()


def _serve(line: Connection, work: Callable[[Any], Any]) -> None:
    """A worker's life: until the other end of its line is closed, or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the others
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            item = line.recv()
        except EOFError:
            return
        line.send(_tried(work, item))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
