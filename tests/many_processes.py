"""Several processes on this machine (gloo, CPU) that do a job together, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from danceopd.errors import Interrupted

PRELOADED = ["danceopd.distill", "danceopd.backbones.flux2_klein", "danceopd.pretraining.world_base"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def name_process(rank: int, count: int, port: int) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, count, count, "127.0.0.1", port)
    os.environ.update(zip(names, map(str, values), strict=True))


def _process(rank: int, count: int, port: int, pipe: Any, job: Callable, args: tuple) -> None:
    name_process(rank, count, port)
    torch.set_num_threads(1)
    try:
        pipe.send(("done", job(rank, *args)))
    except Interrupted:
        pipe.send(("interrupted", None))
        raise
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
        raise


def together(count: int, job: Callable, *args: Any) -> list[Any]:
    """What `job(rank, *args)` gave in each of so many processes; None for those that were interrupted.

    The job is a module's function; its arguments and what it gives are plain.
    """
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(PRELOADED)
    pipes, started = [], []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        started.append(context.Process(target=_process, args=(rank, count, port, there, job, args)))
        started[-1].start()
        there.close()
        pipes.append(here)
    said = [pipe.recv() for pipe in pipes]
    for one in started:
        one.join()
    assert not [text for word, text in said if word == "failed"], said
    assert len({word for word, _ in said}) == 1, "some were interrupted, and some were not"
    return [given for _, given in said]
