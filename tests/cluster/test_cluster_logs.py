"""Logs: whole, in order, once, through drops and new pods."""

from __future__ import annotations

import threading

import pytest
from api_server import DROP

from danceopd.errors import UserError
from pipelines.cluster import jobs, logs
from pipelines.cluster.objects import JobPlan, manifests

NAME = "danceopd-distill"


@pytest.fixture
def handle(api, cluster) -> jobs.Handle:
    return jobs.submit(cluster, manifests(JobPlan("distill"))[0])


def follow(cluster, handle, rank: int = 0) -> tuple[list[str], threading.Event, threading.Thread]:
    said, over = [], threading.Event()
    thread = threading.Thread(target=logs.follow, args=(cluster, handle, said.append, rank, over, 0.02))
    thread.start()
    return said, over, thread


def end(api, over, thread, *pods: str) -> None:
    api.condition(NAME, "Complete")
    over.set()
    thread.join(timeout=10)
    assert not thread.is_alive()


def until(check) -> None:
    for _ in range(500):
        if check():
            return
        threading.Event().wait(0.01)
    raise AssertionError("did not happen within 5 s")


def test_lines_come_as_they_are_written(api, cluster, handle):
    api.pod(NAME)
    said, over, thread = follow(cluster, handle)
    api.say(f"{NAME}-0", "step 1", "", "step 2")
    until(lambda: said == ["step 1", "", "step 2"])
    api.say(f"{NAME}-0", "step 3")
    api.pod(NAME, phase="Succeeded")
    end(api, over, thread)
    assert said == ["step 1", "", "step 2", "step 3"]


def test_a_dropped_stream_loses_nothing_and_repeats_nothing(api, cluster, handle):
    api.pod(NAME)
    lines = [f"line {n}" for n in range(20)]
    api.say(f"{NAME}-0", *lines)
    api.fail("get", "log line", None, None, DROP, None, DROP, None, None, None, DROP)
    said, over, thread = follow(cluster, handle)
    until(lambda: said == lines)
    api.pod(NAME, phase="Succeeded")
    end(api, over, thread)
    assert said == lines


def test_a_new_pod_is_taken_up_and_the_old_one_not_said_again(api, cluster, handle):
    api.pod(NAME, name="first")
    api.say("first", "step 1")
    said, over, thread = follow(cluster, handle)
    until(lambda: said == ["step 1"])
    api.pod(
        NAME,
        name="first",
        phase="Failed",
        containerStatuses=api.objects["pods", "first"]["status"]["containerStatuses"],
    )
    api.pod(NAME, name="second")
    api.say("second", "resumed")
    until(lambda: said == ["step 1", "resumed"])
    api.pod(NAME, name="second", phase="Succeeded")
    end(api, over, thread)
    assert said == ["step 1", "resumed"]


def test_what_is_left_when_the_job_ends_is_still_said(api, cluster, handle):
    api.pod(NAME, phase="Succeeded")
    api.say(f"{NAME}-0", "the last words")
    said: list[str] = []
    with logs.streaming(cluster, handle, said.append):
        api.condition(NAME, "Complete")
    assert said == ["the last words"]


def test_one_rank_speaks(api, cluster, handle):
    for index in (0, 1):
        api.pod(NAME, index, phase="Succeeded")
        api.say(f"{NAME}-{index}", f"rank {index}")
    assert list(logs.read(cluster, handle)) == ["rank 0"]
    assert list(logs.read(cluster, handle, rank=1)) == ["rank 1"]


def test_no_log_yet(api, cluster, handle):
    api.pod(NAME, phase="Pending")
    with pytest.raises(UserError, match=rf"Job {NAME}: no pod of rank 0 has run yet; .* status {NAME}` says why"):
        list(logs.read(cluster, handle))


def test_logs_that_may_not_be_read_do_not_stop_the_job(api, cluster, handle, caplog):
    api.pod(NAME)
    api.forbid("get", "log", "pods/log")
    with logs.streaming(cluster, handle, lambda line: None):
        until(lambda: "pods/log is forbidden" in caplog.text)
    assert api.of("jobs")


def test_reading_logs_that_are_forbidden_is_one_line(api, cluster, handle):
    api.pod(NAME)
    api.forbid("get", "log", "pods/log")
    with pytest.raises(UserError, match=rf"the log of pod {NAME}-0: forbidden in namespace danceopd"):
        list(logs.read(cluster, handle))


def test_a_log_that_cannot_be_opened_is_said_once(api, cluster, handle, caplog):
    api.pod(NAME)
    api.say(f"{NAME}-0", "step 1")
    api.fail("get", "log", *[(500, "dial tcp 10.0.0.1:10250: connect: connection refused")] * 8)
    said, over, thread = follow(cluster, handle)
    until(lambda: said == ["step 1"])
    api.pod(NAME, phase="Succeeded")
    end(api, over, thread)
    assert caplog.text.count("cannot be read at present") == 1
