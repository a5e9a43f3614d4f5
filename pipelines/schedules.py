"""Recurring runs of a Kubeflow Pipelines server: made, listed, paused, resumed and deleted by name.

Every run of a schedule has the same arguments: the server fills in no time
(https://github.com/kubeflow/pipelines/issues/12494). What changed in the data, the pipeline's own first step finds out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from danceopd.errors import UserError, unknown_name
from pipelines.submit import PAGE, Server, answers

FIELDS = 6  # Kubeflow's cron begins with seconds


@dataclass(frozen=True)
class Schedule:
    """One recurring run.

    Attributes:
        id: Kubeflow's.
        name: as given.
        cron: when it starts, six fields; empty if it goes by an interval.
        enabled: whether it starts runs.
    """

    id: str
    name: str
    cron: str
    enabled: bool


def check_cron(text: str) -> str:
    """A cron expression in Kubeflow's six fields; one of five starts at second 0.

    Raises:
        UserError: if it has another number of fields.
    """
    fields = text.split()
    if len(fields) == FIELDS - 1:
        fields = ["0", *fields]
    if len(fields) != FIELDS:
        raise UserError(
            f"--cron {text!r}: write minute, hour, day, month and weekday, as in '0 3 * * 1', with seconds "
            "in front if you like"
        )
    return " ".join(fields)


def create(
    server: Server,
    name: str,
    cron: str,
    source: dict[str, Any],
    arguments: dict[str, Any],
    experiment: str,
    service_account: str | None = None,
) -> str:
    """Make a recurring run, one at a time and without catching up, and return its id.

    Raises:
        UserError: if there is one of this name, or the server refuses.
    """
    if any(schedule.name == name for schedule in every(server)):
        raise UserError(f"{server.host}: schedule {name!r} is there already; delete it first, or take another --name")
    with answers(server.host, f"make schedule {name!r}"):
        made = server.client.create_recurring_run(
            experiment,
            name,
            cron_expression=check_cron(cron),
            max_concurrency=1,
            no_catchup=True,
            params=arguments,
            service_account=service_account,
            **source,
        )
        return made.recurring_run_id


def every(server: Server) -> list[Schedule]:
    """All recurring runs, the server's order."""
    found: list[Any] = []
    token = ""
    with answers(server.host, "list schedules"):
        while True:
            page = server.client.list_recurring_runs(token, PAGE, namespace=server.namespace)
            found += page.recurring_runs or []
            token = page.next_page_token or ""
            if not token:
                return [_schedule(run) for run in found]


def _schedule(run: Any) -> Schedule:
    cron = run.trigger.cron_schedule.cron if run.trigger and run.trigger.cron_schedule else ""
    return Schedule(run.recurring_run_id, run.display_name, cron, "ENABLED" in (run.status, f"{run.mode}D"))


def find(server: Server, name: str) -> Schedule:
    """A recurring run by name or id.

    Raises:
        UserError: if there is none, or there are several.
    """
    known = every(server)
    found = [schedule for schedule in known if name in (schedule.name, schedule.id)]
    if not found:
        raise unknown_name(f"{server.host}: schedule", name, [s.name for s in known] or ["(none yet)"])
    if len(found) > 1:
        raise UserError(
            f"{server.host}: {len(found)} schedules are called {name!r}; name one by its id: "
            + ", ".join(schedule.id for schedule in found)
        )
    return found[0]


def pause(server: Server, name: str) -> Schedule:
    """Let it start no more runs; those under way go on."""
    found = find(server, name)
    with answers(server.host, f"pause schedule {name!r}"):
        server.client.disable_recurring_run(found.id)
    return found


def resume(server: Server, name: str) -> Schedule:
    """Let it start runs again."""
    found = find(server, name)
    with answers(server.host, f"resume schedule {name!r}"):
        server.client.enable_recurring_run(found.id)
    return found


def delete(server: Server, name: str) -> Schedule:
    """Remove it; its runs stay."""
    found = find(server, name)
    with answers(server.host, f"delete schedule {name!r}"):
        server.client.delete_recurring_run(found.id)
    return found
