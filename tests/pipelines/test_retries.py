"""Retries as Argo does them: every attempt happens, and has its whole time."""

from __future__ import annotations

import pytest
from kfp.dsl.structures import RetryPolicy
from test_compile import plain, plain_folder, tasks  # noqa: F401

from pipelines.distillation import PAUSE, WAIT_HOURS, retry_window
from pipelines.placement import NEEDS

HOUR = 3600


def attempts(lasts: int, window: int, limit: int, pause: int, factor: int, waits: int = 0) -> list[int]:
    """How long each attempt of a step that always fails may run, in seconds.

    Argo 4.0.8, workflow/controller/operator.go, `processNodeRetries`: nothing is tried again later than `maxDuration`
    after the first attempt's start, an attempt waits `pause * factor^n`, and its pod's deadline is what is left.
    """
    ran, now = [], 0
    for number in range(limit + 1):
        if number:
            now += pause * factor ** (number - 1)
        if number and now > window:
            break
        now += waits
        ran.append(min(lasts, max(0, window - now)))
        now += ran[-1]
    return ran


def test_the_double_shows_what_a_short_window_does():
    assert attempts(lasts=601, window=600, limit=2, pause=30, factor=2) == [600], "ten minutes, and never again"


@pytest.mark.parametrize("step", [name for name, needs in NEEDS.items() if needs.retries != 0])
@pytest.mark.parametrize("waits", [0, WAIT_HOURS * HOUR])
def test_every_attempt_of_every_step_has_its_whole_time(plain, step, waits):  # noqa: F811
    policy = tasks(plain[0])[step]["retryPolicy"]
    window = int(policy["backoffMaxDuration"].removesuffix("s"))
    longest, limit = NEEDS[step].hours * HOUR, policy["maxRetryCount"]
    pause, factor = int(policy["backoffDuration"].removesuffix("s")), int(policy["backoffFactor"])
    assert attempts(longest, window, limit, pause, factor, waits) == [longest] * (limit + 1)


def test_the_arithmetic():
    assert retry_window(0, 1) == (1 + WAIT_HOURS) * HOUR
    assert retry_window(2, 10) == 3 * (10 + WAIT_HOURS) * HOUR + PAUSE + 2 * PAUSE
    sent = RetryPolicy(2, "30s", 2, f"{retry_window(2, 96)}s").to_proto()
    assert sent.backoff_max_duration.seconds == retry_window(2, 96), "kfp hands it on as it is"
