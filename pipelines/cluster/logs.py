"""A job's log, from whichever pod speaks for it: streamed, and taken up again after a drop or a new pod."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import urllib3
from kubernetes.client import ApiException

from danceopd.errors import UserError
from pipelines.cluster.connect import SAID_AFTER, Cluster, Unreachable, persist
from pipelines.cluster.jobs import INDEX, Handle, pods_of
from pipelines.cluster.reasons import refused

QUIET = 60.0  # seconds without a line before a stream is opened anew: an idle one may be dead
PAUSE = 2.0
OVERLAP = 30  # seconds of log read twice after a drop, so that none is lost; lines are told apart by their time
READ, BROKEN, REFUSED = "read", "broken", "refused"  # how a stream ended; the last was never opened
log = logging.getLogger(__name__)


@contextmanager
def streaming(cluster: Cluster, handle: Handle, say: Callable[[str], Any], rank: int = 0) -> Iterator[None]:
    """Within the block the job's log goes to `say`, line by line, from a thread; at its end the rest is waited for."""
    over = threading.Event()

    def stream() -> None:
        try:
            follow(cluster, handle, say, rank, over)
        except (UserError, Unreachable) as error:
            log.warning("the log of %s cannot be shown: %s", handle, error)

    thread = threading.Thread(target=stream, daemon=True, name=f"log of {handle.name}")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=30)


def follow(
    cluster: Cluster, handle: Handle, say: Callable[[str], Any], rank: int, over: threading.Event, pause: float = PAUSE
) -> None:
    """Say the log of every pod of this rank, one pod after the other, until `over` is set and all is said.

    Raises:
        UserError: if logs may not be read.
    """
    said: dict[str, tuple[str, float]] = {}  # by pod: the last line's time, and when it was read here
    done: set[str] = set()
    failed = 0  # streams in a row that could not be opened
    while True:
        last_round = over.is_set()
        for pod in (p for p in pods_of(cluster, handle) if _rank(p) == rank and p["metadata"]["uid"] not in done):
            if not _speaks(pod):
                continue
            end = _stream(cluster, pod, say, said)
            if end == READ and _final(pod):
                done.add(pod["metadata"]["uid"])
            failed = failed + 1 if end == REFUSED else 0
            if failed == SAID_AFTER:
                name = pod["metadata"]["name"]
                log.warning("the log of pod %s cannot be read at present (its node or the API is away)", name)
        if last_round:
            return
        over.wait(pause)


def read(cluster: Cluster, handle: Handle, rank: int = 0) -> Iterator[str]:
    """The log so far of the newest pod of this rank.

    Raises:
        UserError: if it has no pod that has run.
    """
    pods = [pod for pod in pods_of(cluster, handle) if _rank(pod) == rank and _speaks(pod)]
    if not pods:
        raise UserError(f"{handle}: no pod of rank {rank} has run yet; `danceopd job status {handle.name}` says why")
    name = pods[-1]["metadata"]["name"]
    try:
        text = persist(cluster, cluster.core.read_namespaced_pod_log, name, cluster.namespace)
    except ApiException as error:
        raise refused(error, cluster.namespace, f"the log of pod {name}") from error
    yield from text.splitlines()


def _rank(pod: dict) -> int:
    metadata = pod["metadata"]
    value = (metadata.get("labels") or {}).get(INDEX) or (metadata.get("annotations") or {}).get(INDEX)
    return int(value or 0)


def _speaks(pod: dict) -> bool:
    states = [c.get("state", {}) for c in pod["status"].get("containerStatuses") or []]
    return any("running" in state or "terminated" in state for state in states)


def _final(pod: dict) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def _stream(cluster: Cluster, pod: dict, say: Callable[[str], Any], said: dict[str, tuple[str, float]]) -> str:
    """Say what of a pod's log is new, until it ends or the connection does; returns which (READ, BROKEN, REFUSED)."""
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    options = {"follow": True, "timestamps": True, "_preload_content": False, "_request_timeout": (10, QUIET)}
    since, when = said.get(uid, ("", 0.0))
    if since:
        options["since_seconds"] = round(time.monotonic() - when) + OVERLAP
    try:
        answer = cluster.core.read_namespaced_pod_log(name, cluster.namespace, **options)
    except ApiException as error:
        if error.status in (401, 403):
            raise refused(error, cluster.namespace, f"the log of pod {name}") from error
        return READ if error.status == 404 else REFUSED  # the pod is gone, and its log with it
    except urllib3.exceptions.HTTPError:
        return REFUSED
    try:
        for stamp, text in map(_split, _lines(answer)):
            if stamp > since:
                since = stamp
                said[uid] = (stamp, time.monotonic())
                say(text)
        return READ
    except (urllib3.exceptions.HTTPError, OSError) as error:
        log.debug("log stream of %s dropped: %s", name, error)
        return BROKEN
    finally:
        answer.release_conn()


def _lines(answer: Any) -> Iterator[str]:
    """Whole lines only: one that a drop cut off comes again."""
    held = b""
    for part in answer.stream(2**14, decode_content=False):
        *lines, held = (held + part).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if held:
        yield held.decode(errors="replace")


def _split(line: str) -> tuple[str, str]:
    stamp, _, text = line.partition(" ")
    return stamp, text
