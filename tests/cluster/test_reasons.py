"""What keeps a job from running is told as it is, once, and in time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from kubernetes.client import ApiException

from danceopd.errors import UserError
from pipelines.cluster import jobs
from pipelines.cluster.objects import JobPlan, manifests
from pipelines.cluster.reasons import refused

NAME = "danceopd-distill"


@pytest.fixture(params=["Job", "TrainJob"])
def kind(request) -> str:
    return request.param


def submit(cluster, **plan) -> jobs.Handle:
    return jobs.submit(cluster, manifests(JobPlan("distill", gpus=8, **plan))[0])


def followed(cluster, handle, **options) -> list[str]:
    said: list[str] = []
    jobs.wait(cluster, handle, said.append, **{"start_within": 30, "look_every": 1} | options)
    return said


# ------------------------------------------------------------------------------------------------------------ refusals

WEBHOOK = 'admission webhook "validate.kyverno.svc" denied the request: no limits'  # apiserver, webhook/errors
POLICY = "jobs.batch \"x\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: too many GPUs"
RIGHT = 'jobs.batch is forbidden: User "me" cannot create resource "jobs" in API group "batch" in the namespace "d"'


@pytest.mark.parametrize(("said", "right"), [(WEBHOOK, False), (POLICY, False), (RIGHT, True)])
def test_only_a_missing_right_is_told_as_one(said, right):
    error = ApiException(status=403)
    error.body = json.dumps({"message": said})
    text = str(refused(error, "danceopd", "Job x"))
    assert said in text and ("bind the role" in text) == right and ("refused by a rule" in text) != right


# ------------------------------------------------------------------------------------------------------------- queueing


def suspended(api, cluster, kind: str) -> tuple[jobs.Handle, str]:
    handle = submit(cluster, kind=kind, queue="gpus")
    api.objects[handle.kind.plural, NAME]["spec"]["suspend"] = True
    held = {"type": "Suspended", "status": "True", "reason": "JobSuspended", "message": "Job suspended"}
    api.job(NAME, handle.kind.plural, conditions=[held])
    return handle, handle.kind.plural


@pytest.mark.parametrize(
    "message", ["LocalQueue gpus doesn't exist", "couldn't assign flavors to pod set main: insufficient quota"]
)
def test_a_queued_job_says_why(api, cluster, kind, message):
    handle, plural = suspended(api, cluster, kind)
    api.workload(NAME, plural, message=message)
    assert str(jobs.look(cluster, handle)) == f"queued: queue gpus: {message}"


def test_who_may_not_list_workloads_still_hears_the_event(api, cluster, kind):
    handle, _ = suspended(api, cluster, kind)
    api.forbid("list", "workloads")
    api.event(f"{kind.lower()}-{NAME}-0a1b2", "Pending", "couldn't assign flavors")
    assert str(jobs.look(cluster, handle)) == "queued: queue gpus: couldn't assign flavors"


def test_a_cluster_without_kueue_leaves_the_job_where_it_is(api, cluster, kind):
    handle, _ = suspended(api, cluster, kind)
    api.kinds.discard("workloads")
    assert str(jobs.look(cluster, handle)) == "queued: queue gpus: its queue has not admitted it"


def test_one_that_somebody_suspended_says_that_no_queue_will_start_it(api, cluster):
    handle = submit(cluster)
    api.objects["jobs", NAME]["spec"]["suspend"] = True
    assert "suspended, and no queue will start it" in jobs.look(cluster, handle).reason


# -------------------------------------------------------------------------------------------------------------- silence


def test_an_api_that_stays_away_is_said_before_patience_ends(api, cluster, caplog):
    handle = submit(cluster)
    api.fail("get", "jobs", *[(500, 'failed calling webhook "quota": connection refused')] * 4)
    jobs.look(cluster, handle)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 2 and 'does not answer (failed calling webhook "quota"' in lines[0]
    assert "answers again" in lines[1]


def test_one_hiccup_is_not_worth_a_line(api, cluster, caplog):
    handle = submit(cluster)
    api.fail("get", "jobs", (500, "etcd leader changed"))
    jobs.look(cluster, handle)
    assert not caplog.records


# ---------------------------------------------------------------------------------------------------- pods that wait


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("FailedAttachVolume", "a volume cannot be mounted: "),
        ("FailedMount", "a volume cannot be mounted: "),
        ("FailedCreatePodSandBox", "its node cannot start it (FailedCreatePodSandBox): "),
        ("NetworkNotReady", "its node cannot start it (NetworkNotReady): "),
    ],
)
def test_what_the_node_warns_of_is_the_reason(api, cluster, reason, said):
    handle = submit(cluster)
    api.pod(NAME, phase="Pending")
    api.event(f"{NAME}-0", reason, "the message")
    assert jobs.look(cluster, handle).reason == f"{said}the message"


def test_a_warning_of_the_scheduler_is_past_once_the_pod_has_a_node(api, cluster):
    handle = submit(cluster)
    api.pod(NAME, phase="Pending")
    api.event(f"{NAME}-0", "FailedScheduling", "0/5 nodes are available")
    assert jobs.look(cluster, handle).reason == ""


@pytest.mark.parametrize(
    ("message", "own"),
    [  # the kubelet's words (1.34, pkg/kubelet/eviction/helpers.go)
        ('Usage of EmptyDir volume "tmp" exceeds the limit "20Gi". ', True),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ", True),
        ('Container danceopd exceeded its local ephemeral storage limit "1Gi". ', True),
        ("The node was low on resource: ephemeral-storage. ", False),
    ],
)
def test_an_overflowing_tmp_is_no_interruption(api, cluster, message, own):
    handle = submit(cluster)
    api.ended(NAME, 143, reason="Evicted", message="")
    api.objects["pods", f"{NAME}-0"]["status"] |= {"reason": "Evicted", "message": message}
    reason = jobs.look(cluster, handle).reason
    assert reason.startswith("out of scratch space: " if own else "interrupted (") and message.strip() in reason


def test_a_reason_is_said_once_though_names_and_numbers_in_it_change(api, cluster):
    handle = submit(cluster)
    quota = 'pods "danceopd-distill-%s" is forbidden: exceeded quota: gpus, used: %d'
    api.acts = [
        lambda: api.event(NAME, "FailedCreate", quota % ("k7x2p", 8)) or api.job(NAME, failed=0),
        lambda: api.event(NAME, "FailedCreate", quota % ("w9q4z", 16)) or api.job(NAME, failed=0),
        lambda: api.pod(NAME) and api.job(NAME, ready=1),
        lambda: api.pod(NAME, phase="Succeeded") and api.condition(NAME, "Complete"),
    ]
    said = followed(cluster, handle)
    assert sum("exceeded quota" in line for line in said) == 1 and len(said) == 4


def test_a_reason_is_one_line_of_a_readable_length(api, cluster):
    handle = submit(cluster)
    api.pod(NAME, phase="Pending")
    api.event(f"{NAME}-0", "FailedMount", "MountVolume.SetUp failed\n" * 200)
    reason = jobs.look(cluster, handle).reason
    assert len(reason) <= 300 and "\n" not in reason


# ------------------------------------------------------------------------------------------------------- interruptions

DRAINED = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API"}


def test_a_drain_is_said_while_the_pod_saves_itself(api, cluster):
    handle = submit(cluster)

    def drain():
        api.pod(NAME, conditions=[DRAINED])["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
        api.job(NAME, terminating=1)

    api.acts = [
        lambda: api.pod(NAME) and api.job(NAME, ready=1),
        drain,
        lambda: api.remove("pods", f"{NAME}-0") and api.pod(NAME, name="second") and api.job(NAME, ready=1),
        lambda: api.condition(NAME, "Complete"),
    ]
    said = followed(cluster, handle)
    [line] = [line for line in said if "interrupted" in line]
    assert line == f"Job {NAME}: running (1 of 1 pods): interrupted (Eviction API); it goes on from its last checkpoint"


def test_a_pod_that_failed_between_two_looks_says_why(api, cluster):
    handle = submit(cluster)
    api.acts = [
        lambda: api.pod(NAME) and api.job(NAME, ready=1),
        lambda: api.ended(NAME, 1, message="RuntimeError: no") or (api.pod(NAME, name="second") and api.job(NAME, x=1)),
        lambda: api.condition(NAME, "Complete"),
    ]
    assert f"Job {NAME}: RuntimeError: no" in followed(cluster, handle)


# ---------------------------------------------------------------------------------------------------------- cancelling


def test_a_cancelled_job_is_not_made_anew_and_its_pods_are_waited_for(api, cluster, kind):
    handle = submit(cluster, kind=kind)
    api.pod(NAME, plural=handle.kind.plural)
    api.dying = 3  # looks at pods that still save themselves
    jobs.cancel(cluster, handle)
    assert api.of("pods") == api.of(handle.kind.plural) == []


def test_a_pod_that_does_not_go_is_named(api, cluster):
    handle = submit(cluster, kind="TrainJob")
    api.pod(NAME, plural="trainjobs")
    api.dying = 10**6
    with pytest.raises(UserError, match=rf"TrainJob {NAME}'s pod {NAME}-0 is being deleted, but does not go"):
        jobs.cancel(replace(cluster, patience=0.2), handle)
