"""Figures of a running server, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
import time
from collections import Counter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds of a request


class Metrics:
    """Counts what the server does; every method may be called from any thread."""

    def __init__(self, places: int):
        self._lock = threading.Lock()
        self._places, self._waiting, self._ready = places, 0, False
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, list[float]] = {}  # sum and count
        self._buckets: Counter[tuple[str, float]] = Counter()
        self._pictures, self._drawing = 0, 0.0
        self._version, self._rollovers, self._failing = "", 0, False
        self._seen: float | None = None

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered."""
        with self._lock:
            self._requests[endpoint, status] += 1
            total = self._seconds.setdefault(endpoint, [0.0, 0])
            total[0] += seconds
            total[1] += 1
            for bound in BUCKETS:
                self._buckets[endpoint, bound] += seconds <= bound

    def drawn(self, pictures: int, seconds: float) -> None:
        """A job was drawn."""
        with self._lock:
            self._pictures += pictures
            self._drawing += seconds

    def waiting(self, jobs: int) -> None:
        """How many jobs wait now."""
        with self._lock:
            self._waiting = jobs

    def ready(self, is_ready: bool) -> None:
        """The model is there, or not any more."""
        with self._lock:
            self._ready = is_ready

    def serves(self, version: str) -> None:
        """The registered version that draws."""
        with self._lock:
            self._version = version

    def rolled_over(self, version: str) -> None:
        """Another version took over."""
        with self._lock:
            self._version, self._rollovers, self._failing = version, self._rollovers + 1, False

    def rollover_failing(self, is_failing: bool) -> None:
        """The alias names a version that cannot be served, or does not any more."""
        with self._lock:
            self._failing = is_failing

    def alias_seen(self, now: float) -> None:
        """The registry answered at this time of the monotonic clock."""
        with self._lock:
            self._seen = now

    def text(self) -> str:
        """All figures."""
        with self._lock:
            lines = _family("requests_total", "counter", "HTTP requests answered.")
            lines += [
                f'danceopd_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}'
                for (endpoint, status), count in sorted(self._requests.items())
            ]
            lines += _family("request_seconds", "histogram", "Seconds from a request to its answer.")
            for endpoint, (total, count) in sorted(self._seconds.items()):
                label = f'endpoint="{endpoint}"'
                bounds = [(f"{b:g}", self._buckets[endpoint, b]) for b in BUCKETS] + [("+Inf", count)]
                lines += [f'danceopd_request_seconds_bucket{{{label},le="{b}"}} {n}' for b, n in bounds]
                lines.append(f"danceopd_request_seconds_sum{{{label}}} {total!r}")
                lines.append(f"danceopd_request_seconds_count{{{label}}} {count}")
            for name, kind, what, value in (
                ("pictures_total", "counter", "Pictures drawn.", self._pictures),
                ("drawing_seconds_total", "counter", "Seconds the worker drew.", self._drawing),
                ("queue_waiting", "gauge", "Requests that wait for the worker.", self._waiting),
                ("queue_places", "gauge", "Requests that may wait.", self._places),
                ("ready", "gauge", "Whether the model is loaded and takes requests.", int(self._ready)),
                ("rollovers_total", "counter", "Times that another version took over.", self._rollovers),
                ("rollover_failing", "gauge", "Whether the alias names what cannot be served.", int(self._failing)),
                ("alias_seen_seconds", "gauge", "Seconds since the registry answered; 0: no alias.", self._silence()),
            ):
                lines += [*_family(name, kind, what), f"danceopd_{name} {value!r}"]
            lines += _family("model_info", "gauge", "The registered version that draws; empty: a folder.")
            lines.append(f'danceopd_model_info{{version="{self._version}"}} 1')
        return "\n".join(lines) + "\n"

    def _silence(self) -> float:
        return 0.0 if self._seen is None else round(time.monotonic() - self._seen, 1)


def _family(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP danceopd_{name} {what}", f"# TYPE danceopd_{name} {kind}"]
