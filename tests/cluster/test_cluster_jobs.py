"""Jobs against a server that behaves like the API: one of each, whatever breaks, and a reason for what does not run."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from api_server import DROP
from kubernetes.client import ApiException

from danceopd.errors import UserError
from pipelines.cluster import jobs
from pipelines.cluster.connect import Unreachable
from pipelines.cluster.objects import JobPlan, manifests

NAME = "danceopd-distill"
PLAN = JobPlan("distill", gpus=8)


def submit(cluster, plan: JobPlan = PLAN, **options) -> jobs.Handle:
    document, *services = manifests(plan)
    return jobs.submit(cluster, document, services, **options)


def wait(cluster, handle, **options) -> tuple[jobs.Status, list[str]]:
    said: list[str] = []
    last = jobs.wait(cluster, handle, said.append, **{"start_within": 30, "look_every": 1} | options)
    return last, said


def states(said: list[str]) -> list[str]:
    return [line.split(": ")[1].split(" ")[0] for line in said]


# ---------------------------------------------------------------------------------------------------------- submitting


def test_a_job_is_made_with_what_it_is_found_by(api, cluster):
    handle = submit(cluster)
    [made] = api.of("jobs")
    assert (made["metadata"]["name"], made["metadata"]["namespace"]) == (NAME, "danceopd")
    assert made["metadata"]["uid"] == handle.uid and not handle.adopted
    assert made["metadata"]["labels"].items() >= jobs.PART_OF.items()
    assert jobs.find(cluster, NAME).uid == handle.uid
    assert [h.name for h in jobs.find_all(cluster)] == [NAME]


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_submitting_again_adopts_what_runs(api, cluster, kind):
    plan = replace(PLAN, kind=kind)
    first, second = submit(cluster, plan), submit(cluster, plan)
    assert (first.uid, first.adopted) == (second.uid, False) and second.adopted
    assert len(api.of("jobs") + api.of("trainjobs")) == 1


def test_an_answer_that_got_lost_makes_no_second_job(api, cluster):
    api.fail("create", "jobs", DROP)
    handle = submit(cluster)
    assert len(api.of("jobs")) == 1 and handle.uid == api.of("jobs")[0]["metadata"]["uid"]


def test_submitting_from_many_places_at_once_makes_one_job(api, cluster):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(submit(cluster).uid)) for _ in range(6)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(found) == 6 and len(set(found)) == 1


def test_another_specification_under_the_same_name_is_refused_while_it_runs(api, cluster):
    submit(cluster)
    with pytest.raises(UserError, match=rf"Job {NAME} is under way with another specification; cancel it first"):
        submit(cluster, replace(PLAN, memory=17))
    api.condition(NAME, "Complete")
    submit(cluster, replace(PLAN, memory=17))
    assert api.of("jobs")[0]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "17Gi"


def test_what_succeeded_is_not_run_again_unless_asked(api, cluster):
    first = submit(cluster)
    api.condition(NAME, "Complete")
    assert submit(cluster).uid == first.uid
    assert submit(cluster, again=True).uid != first.uid


def test_what_failed_is_replaced_but_bad_input_is_not_tried_again(api, cluster):
    first = submit(cluster)
    api.ended(NAME, 1)
    api.condition(NAME, "Failed")
    second = submit(cluster)
    assert second.uid != first.uid and not second.adopted and len(api.of("jobs")) == 1
    api.ended(NAME, 2, message="danceopd: recipe: no such field")
    api.condition(NAME, "Failed", reason="PodFailurePolicy")
    third = submit(cluster)
    assert third.uid == second.uid
    status = jobs.look(cluster, third)
    assert status.user_error and status.reason == "recipe: no such field"


def test_one_that_is_being_deleted_is_waited_for(api, cluster):
    first = submit(cluster)
    api.lingering = 4
    api.objects["jobs", NAME]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    second = submit(cluster)
    assert second.uid != first.uid and not second.adopted


def test_services_belong_to_their_job_and_go_with_it(api, cluster):
    plan = replace(PLAN, nodes=2)
    handle = submit(cluster, plan)
    submit(cluster, plan)
    [service] = api.of("services")
    assert service["metadata"]["ownerReferences"][0]["uid"] == handle.uid
    jobs.cancel(cluster, handle)
    assert api.of("services") == api.of("jobs") == []


def test_a_service_that_a_broken_off_submission_left_out_is_made_at_the_next(api, cluster):
    api.forbid("create", "services")
    with pytest.raises(UserError, match=r"Service danceopd-distill: forbidden"):
        submit(cluster, replace(PLAN, nodes=2))
    submit(cluster, replace(PLAN, nodes=2))
    assert len(api.of("jobs")) == len(api.of("services")) == 1


# ------------------------------------------------------------------------------------------------------------- waiting


def test_a_job_is_followed_to_its_end(api, cluster):
    handle = submit(cluster)
    api.acts = [
        lambda: api.pod(NAME, phase="Pending") and api.job(NAME, active=1),
        lambda: api.pod(NAME) and api.job(NAME, ready=1),
        lambda: api.pod(NAME, phase="Succeeded") and api.condition(NAME, "Complete"),
    ]
    last, said = wait(cluster, handle)
    assert last.state == jobs.SUCCEEDED
    assert states(said) == ["pending", "running", "succeeded"]


TROUBLES = {
    "dropped watch": ("watch", "jobs", [DROP, DROP]),
    "watch cut off in a line": ("watch", "jobs", ["half a line"] * 2),
    "gone, as an event": ("watch", "jobs", ["gone", "gone"]),
    "gone, at once": ("watch", "jobs", [(410, "too old resource version")] * 2),
    "restart of the API": ("get", "jobs", [DROP, (503, "apiserver not ready"), DROP, (500, "etcd leader changed")]),
    "busy": ("list", "pods", [(429, "too many requests")] * 3),
}


@pytest.mark.parametrize(("verb", "plural", "faults"), TROUBLES.values(), ids=TROUBLES)
def test_following_survives(api, cluster, verb, plural, faults):
    handle = submit(cluster)
    api.fail(verb, plural, *faults)
    api.acts = [lambda: None, lambda: api.pod(NAME) and api.job(NAME, ready=1), lambda: api.condition(NAME, "Complete")]
    last, said = wait(cluster, handle)
    assert last.state == jobs.SUCCEEDED and states(said)[-2:] == ["running", "succeeded"]
    assert api.faults[verb, plural] == []


def test_an_api_that_stays_away_is_given_up_and_the_job_is_left_alone(api, cluster):
    handle = submit(cluster)
    api.fail("get", "jobs", *[DROP] * 100)
    with pytest.raises(Unreachable, match="gave no answer for 0 s"):
        jobs.look(replace(cluster, patience=0.2), handle)
    assert len(api.of("jobs")) == 1


def test_a_pod_that_was_deleted_is_no_end(api, cluster):
    handle = submit(cluster)
    api.acts = [
        lambda: api.pod(NAME) and api.job(NAME, ready=1),
        lambda: api.remove("pods", f"{NAME}-0") and api.job(NAME, ready=0),
        lambda: api.pod(NAME, name="second") and api.job(NAME, ready=1),
        lambda: api.condition(NAME, "Complete"),
    ]
    _, said = wait(cluster, handle)
    assert states(said) == ["pending", "running", "interrupted", "pending", "running", "succeeded"]


@pytest.mark.parametrize("then", [None, "another"])
def test_a_job_that_someone_deleted_is_gone_even_if_another_took_its_name(api, cluster, then):
    handle = submit(cluster)
    api.remove("jobs", NAME)
    if then:
        submit(cluster)
    last, _ = wait(cluster, handle)
    assert last == jobs.Status(jobs.GONE, "it was deleted")


def test_a_train_job_is_followed_too(api, cluster):
    handle = submit(cluster, replace(PLAN, kind="TrainJob", nodes=2))
    api.acts = [
        lambda: [api.pod(NAME, i, plural="trainjobs") for i in (0, 1)] and api.job(NAME, "trainjobs", x=1),
        lambda: api.condition(NAME, "Complete", "trainjobs"),
    ]
    last, said = wait(cluster, handle)
    assert last.state == jobs.SUCCEEDED and said[1] == f"TrainJob {NAME}: running (2 of 2 pods)"


def test_a_queued_job_may_queue_as_long_as_it_takes(api, cluster):
    handle = submit(cluster, replace(PLAN, queue="training"))
    api.objects["jobs", NAME]["spec"]["suspend"] = True

    def admit():
        api.objects["jobs", NAME]["spec"].pop("suspend")
        api.pod(NAME)
        api.job(NAME, ready=1)

    api.acts = [lambda: None, admit, lambda: api.condition(NAME, "Complete")]
    _, said = wait(cluster, handle, start_within=0.5)
    assert states(said) == ["queued", "running", "succeeded"]
    assert "its queue has not admitted it" in said[0]


def test_a_job_that_does_not_start_in_time_is_deleted_and_the_reason_given(api, cluster):
    handle = submit(cluster)
    api.pod(NAME, phase="Pending", conditions=[unscheduled("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")])
    with pytest.raises(UserError, match=r"did not run within 0 min and was deleted: no node has 8 free nvidia.com/gpu"):
        wait(cluster, handle, start_within=0.1)
    assert api.of("jobs") == api.of("pods") == []


def test_cancelling_waits_until_nothing_is_left_and_may_be_done_twice(api, cluster):
    handle = submit(cluster)
    api.pod(NAME)
    api.lingering = 3
    jobs.cancel(cluster, handle)
    jobs.cancel(cluster, handle)
    assert api.of("jobs") == api.of("pods") == []


def test_cancelling_spares_a_later_job_of_the_same_name(api, cluster):
    old = submit(cluster)
    api.remove("jobs", NAME)
    new = submit(cluster)
    jobs.cancel(cluster, old)
    assert api.of("jobs")[0]["metadata"]["uid"] == new.uid


# ------------------------------------------------------------------------------------------------------------- reasons


def unscheduled(message: str) -> dict:
    return {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}


def waiting(reason: str, message: str) -> dict:
    state = {"waiting": {"reason": reason, "message": message}}
    return {
        "containerStatuses": [
            {
                "name": "danceopd",
                "image": "example.com/d:1",
                "imageID": "",
                "ready": False,
                "restartCount": 0,
                "state": state,
            }
        ]
    }


def plays(api) -> dict:
    """What may keep a pod from running, and what is said of it."""
    taken = [{"type": "DisruptionTarget", "status": "True", "message": "preempted by a more important pod"}]
    return {
        "no GPU node": (
            lambda: api.pod(NAME, phase="Pending", conditions=[unscheduled("0/5: 5 Insufficient nvidia.com/gpu.")]),
            "no node has 8 free nvidia.com/gpu; the scheduler says: 0/5: 5 Insufficient nvidia.com/gpu.",
        ),
        "unschedulable": (
            lambda: api.pod(NAME, phase="Pending", conditions=[unscheduled("0/5: 5 Insufficient memory.")]),
            "no node takes the pod; the scheduler says: 0/5: 5 Insufficient memory.",
        ),
        "image": (
            lambda: api.pod(NAME, phase="Pending", **waiting("ImagePullBackOff", "not found")),
            "image example.com/d:1 cannot be pulled: not found; mend the name, or add a pull secret",
        ),
        "missing secret": (
            lambda: api.pod(NAME, phase="Pending", **waiting("CreateContainerConfigError", 'secret "x" not found')),
            'the container cannot be made: secret "x" not found',
        ),
        "volume": (
            lambda: (api.pod(NAME, phase="Pending"), api.event(f"{NAME}-0", "FailedMount", "claim not bound")),
            "a volume cannot be mounted: claim not bound",
        ),
        "quota": (
            lambda: api.event(NAME, "FailedCreate", 'pods "x" is forbidden: exceeded quota: gpus, requested: 8'),
            "over the namespace's quota: "
            'pods "x" is forbidden: exceeded quota: gpus, requested: 8; ask for less, or wait',
        ),
        "pod security": (
            lambda: api.event(NAME, "FailedCreate", 'violates PodSecurity "restricted:v1.30"'),
            'the namespace admits only restricted pods: violates PodSecurity "restricted:v1.30"',
        ),
        "preempted": (
            lambda: api.ended(NAME, 143, conditions=taken),
            "interrupted (preempted by a more important pod); it goes on from its last checkpoint",
        ),
        "exit code 75": (
            lambda: api.ended(NAME, 75, message="danceopd: stopped at step 40"),
            "interrupted (it was asked to end); it goes on from its last checkpoint",
        ),
    }


@pytest.mark.parametrize("play", plays(None))
def test_why_a_job_does_not_run(api, cluster, play):
    handle = submit(cluster)
    act, reason = plays(api)[play]
    act()
    api.event("another-job", "FailedCreate", "not about this one")
    status = jobs.look(cluster, handle)
    assert (status.state, status.reason) == (jobs.PENDING, reason)


@pytest.mark.parametrize(
    ("code", "how", "reason"),
    [
        (137, {"reason": "OOMKilled"}, "out of memory: the container was OOM-killed at its limit of 16Gi"),
        (2, {"message": "line\ndanceopd: recipe: bad\nnoise"}, "recipe: bad"),
        (1, {"message": "Traceback\nRuntimeError: no\n"}, "RuntimeError: no"),
        (1, {}, "the container ended with exit code 1"),
    ],
)
def test_why_a_job_failed(api, cluster, code, how, reason):
    handle = submit(cluster)
    api.ended(NAME, code, **how)
    api.condition(NAME, "Failed", reason="BackoffLimitExceeded")
    status = jobs.look(cluster, handle)
    assert status.state == jobs.FAILED and status.reason.startswith(reason)
    assert status.user_error == (code == 2)


def test_a_job_that_ran_too_long_says_so(api, cluster):
    handle = submit(cluster)
    api.condition(NAME, "Failed", reason="DeadlineExceeded")
    assert "it ran longer than it may" in jobs.look(cluster, handle).reason


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, "Unauthorized"), "the cluster does not know who asks"),
        ((403, 'jobs.batch is forbidden: User "x" cannot create'), "forbidden in namespace danceopd: .*bind the role"),
        ((403, "exceeded quota: jobs, limited: count/jobs.batch=1"), "over the quota of namespace danceopd"),
        ((403, "unable to create: namespace is being terminated"), "namespace danceopd is being deleted"),
        ((422, 'Job.batch "x" is invalid: spec.completions'), "the cluster says 422: Job.batch"),
        ((400, "admission webhook denied the request"), "the cluster says 400: admission webhook"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(api, cluster, answer, message):
    api.fail("create", "jobs", answer)
    with pytest.raises(UserError, match=message) as refusal:
        submit(cluster)
    assert "\n" not in str(refusal.value) and isinstance(refusal.value.__cause__, ApiException)
    assert api.of("jobs") == []


def test_no_such_namespace(cluster):
    with pytest.raises(UserError, match=r"namespace nowhere: no such namespace; .*the overlay of your platform"):
        submit(replace(cluster, namespace="nowhere"))


def test_a_cluster_without_kubeflow_trainer(api, cluster):
    api.kinds.discard("trainjobs")
    with pytest.raises(UserError, match="the cluster does not know this kind; install Kubeflow Trainer, or use"):
        submit(cluster, replace(PLAN, kind="TrainJob"))
    submit(cluster)
    assert [h.name for h in jobs.find_all(cluster)] == [NAME]


def test_no_such_job(cluster):
    with pytest.raises(UserError, match="job nope: not in namespace danceopd; `danceopd job status` lists what is"):
        jobs.find(cluster, "nope")


def test_watching_that_is_forbidden_says_so(api, cluster):
    handle = submit(cluster)
    api.forbid("watch", "jobs")
    with pytest.raises(UserError, match="watching jobs: forbidden"):
        wait(cluster, handle)


@pytest.mark.parametrize(
    "document", [{"kind": "Pod", "apiVersion": "v1"}, {"kind": "Job", "apiVersion": "batch/v1beta1"}]
)
def test_what_is_not_a_job_is_refused(cluster, document):
    with pytest.raises(UserError, match=r"is not a job; give a Job \(batch/v1\) or TrainJob"):
        jobs.submit(cluster, document | {"metadata": {"name": "x"}})
