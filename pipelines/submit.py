"""A Kubeflow Pipelines server: runs and uploads through kfp's own client, every refusal as one line.

Inside a cluster the client sends the pod's service account token (a projected volume, read anew for each call); outside
it sends what `KFP_TOKEN` or `KFP_COOKIE` holds. Neither is ever an argument, and neither is shown.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import urllib3
from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH, Client
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials
from kfp_server_api import ApiException

from danceopd.errors import UserError, unknown_name
from danceopd.files import hash_file
from danceopd.text import parse_yaml, parse_yaml_documents, read_text
from danceopd.tracking.mlflow_store import redact
from pipelines.one_line import Away

HOST_ENV, TOKEN_ENV, COOKIE_ENV, CA_ENV = "KF_PIPELINES_ENDPOINT", "KFP_TOKEN", "KFP_COOKIE", "SSL_CERT_FILE"
TIMEOUT = (10, 60)  # seconds to connect, and between two bytes of an answer
PATIENCE, PAUSE = 900.0, 10.0  # seconds a followed server may be away, and between two looks
SUCCEEDED, LOST = "SUCCEEDED", "LOST"
OVER = (SUCCEEDED, "FAILED", "SKIPPED", "CANCELED")
PAGE = 100


class _Client(Client):
    """kfp's client, which asks for the server's health once rather than for half a minute, and writes no file."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        ask = self._healthz_api.healthz_service_get_healthz_with_http_info
        health, _, headers = ask(_request_timeout=TIMEOUT)
        if "json" not in headers.get("Content-Type", ""):
            host = redact(self._existing_config.host)
            raise UserError(f"{host}: answers with a page, not as an API; is it behind a login? {_HOW_TO_LOG_IN}")
        return health

    def set_user_namespace(self, namespace: str) -> None:
        self._context_setting["namespace"] = namespace


_HOW_TO_LOG_IN = f"Put a token into {TOKEN_ENV} or a session's cookie into {COOKIE_ENV}"


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        client: kfp's client of it.
        host: its address, as shown.
        namespace: the user's, on a server with several users; else None.
    """

    client: Client
    host: str
    namespace: str | None

    def link(self, run_id: str) -> str:
        """The run's page."""
        return f"{self.host}/#/runs/details/{run_id}"


def open_server(host: str | None, namespace: str | None = None) -> Server:
    """Connect to a server, and check that it answers.

    Args:
        host: its address; default: `KF_PIPELINES_ENDPOINT`.
        namespace: the user's profile, on a server with several users; default: the pod's own.

    Raises:
        UserError: if it is not reachable, refuses, is no Kubeflow Pipelines 2, or needs another namespace.
    """
    host = (host or os.environ.get(HOST_ENV, "")).rstrip("/")
    if not host.startswith(("http://", "https://")):
        raise UserError(f"--host {redact(host)!r}: name the server as https://..., here or in {HOST_ENV}")
    if redact(host) != host:
        raise UserError(f"--host {redact(host)}: no password and no query here. {_HOW_TO_LOG_IN}")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # what it tries again ends in our one line
    token_file = Path(os.environ.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH)
    with answers(host, "connect"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client = _Client(
            host=host,
            existing_token=os.environ.get(TOKEN_ENV) or None,
            cookies=os.environ.get(COOKIE_ENV) or None,
            credentials=ServiceAccountTokenVolumeCredentials() if token_file.is_file() else None,
            ssl_ca_cert=os.environ.get(CA_ENV),
        )
        _limit_time(client)
        many = bool(client.get_kfp_healthz().multi_user)
    namespace = namespace or client.get_user_namespace() or None
    if many and namespace is None:
        raise UserError(f"{host}: serves several users; name your profile's namespace by --namespace")
    if namespace is not None and not many:
        raise UserError(f"--namespace {namespace}: {host} serves one user and knows no namespaces; leave it out")
    return Server(client, host, namespace)


def _limit_time(client: Client) -> None:
    """kfp sets no time limit, so a server that takes a call and says nothing would be waited for forever."""
    rest = client._run_api.api_client.rest_client
    request = rest.request

    def limited(*args: Any, **options: Any) -> Any:
        return request(*args, **options | {"_request_timeout": options.get("_request_timeout") or TIMEOUT})

    rest.request = limited


class BrokenOff(UserError):
    """The connection broke after something was sent; it may have been done."""


@contextmanager
def answers(host: str, what: str) -> Iterator[None]:
    """Within the block the client's errors become one line, and what it prints goes nowhere.

    Args:
        host: whose answers.
        what: what was asked, after "to".

    Raises:
        UserError: that line; `Away` if the same may do later, `BrokenOff` if it may have been done.
    """
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except UserError:
        raise
    except ApiException as error:
        kind = Away if error.status and (error.status >= 500 or error.status == 429) else UserError
        raise kind(f"{host}: {_refusal(error, what)}") from error
    except urllib3.exceptions.ProtocolError as error:
        raise BrokenOff(
            f"{host}: the connection broke when asked to {what}; it may have been done all the same, so "
            "look at the server before you try again"
        ) from error
    except urllib3.exceptions.HTTPError as error:
        raise Away(
            f"{host}: not reachable ({_reason(error)}); check the address, a port-forward, VPN or proxy"
        ) from error
    except ValueError as error:  # the client's own: two things of one name
        raise UserError(f"{host}: {error}") from error


def _reason(error: urllib3.exceptions.HTTPError) -> str:
    inner = getattr(error, "reason", None) or error
    return _short(str(getattr(inner, "_message", None) or inner).split(">: ")[-1])


def _refusal(error: ApiException, what: str) -> str:
    text = _message(error)
    if error.status == 0:
        return f"no secure connection ({text}); name its certificate authority's file in {CA_ENV}"
    if error.status in (401, 403):
        return f"refuses to {what} ({error.status}: {text}); check the right to do so and --namespace. {_HOW_TO_LOG_IN}"
    if what == "connect":
        version = "there is no Kubeflow Pipelines 2 API" if error.status == 404 else "the server is not well"
        return f"{version} ({error.status}: {text}); check the address and the server's version"
    return f"could not {what} ({error.status}: {text})"


def _message(error: ApiException) -> str:
    """What the server said, without the HTTP around it, and without what was told it in secret."""
    try:
        told = json.loads(error.body)
        text = told.get("message") or told.get("error") or error.reason
    except (ValueError, TypeError, AttributeError):  # a proxy's page
        text = error.reason
    return _short(str(text))


def _short(text: str) -> str:
    for name in (TOKEN_ENV, COOKIE_ENV):
        if secret := os.environ.get(name):
            text = text.replace(secret, "(hidden)")
    return " ".join(redact(text).split())[:300]


# ---------------------------------------------------------------------------------------------------------- parameters


def load_package(path: Path) -> dict[str, Any]:
    """A compiled pipeline's specification.

    Raises:
        UserError: if the file is none.
    """
    try:
        spec = parse_yaml_documents(read_text(Path(path)), f"--package {path}")[0]
        declared(spec)
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--package {path}: not a compiled pipeline; make one by: danceopd pipeline compile") from error
    return spec


def declared(spec: Mapping[str, Any]) -> dict[str, dict]:
    """The parameters that a pipeline takes, with their types and defaults."""
    return spec.get("pipeline_spec", spec)["root"].get("inputDefinitions", {}).get("parameters", {})


def fill_in(parameters: Mapping[str, dict], ours: Mapping[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """The arguments of a run: what we know, where the pipeline asks for it, and what was given by `--param`.

    Args:
        parameters: that the pipeline takes, see `declared`.
        ours: arguments we know; those it does not take are left out.
        given: `name=value`; values of parameters that are no text are read as YAML.

    Raises:
        UserError: for one it does not take, or one that is lacking.
    """
    arguments = {name: value for name, value in ours.items() if name in parameters}
    for setting in given:
        name, sign, value = setting.partition("=")
        if not sign:
            raise UserError(f"--param {setting!r}: write it as name=value")
        if name not in parameters:
            raise unknown_name("--param", name, parameters)
        text = parameters[name].get("parameterType", "STRING") == "STRING"
        arguments[name] = value if text else parse_yaml(value, f"--param {setting!r}")
    needed = [n for n, p in parameters.items() if not p.get("isOptional") and "defaultValue" not in p]
    if lacking := [name for name in needed if name not in arguments]:
        raise UserError(f"the pipeline also needs {', '.join(lacking)}; give each by --param name=value")
    return arguments


# ------------------------------------------------------------------------------------------------------------ pipelines


def upload(server: Server, package: Path, name: str, version: str | None = None) -> tuple[str, str]:
    """Upload a compiled pipeline, as a new one or as a new version of the one of this name.

    Returns:
        The ids of the pipeline and of the version; the first version of a new pipeline is named after it.
    """
    with answers(server.host, f"upload pipeline {name!r}"):
        pipeline = _pipeline_id(server, name)
        if pipeline is None:
            made = server.client.upload_pipeline(str(package), name, namespace=server.namespace)
            return made.pipeline_id, newest_version(server, name)[1]
        version = version or f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{hash_file(package)[:8]}"
        made = server.client.upload_pipeline_version(str(package), version, pipeline_id=pipeline)
        return pipeline, made.pipeline_version_id


def newest_version(server: Server, name: str) -> tuple[str, str, dict[str, Any]]:
    """The ids of a pipeline and of its newest version, and that version's specification.

    Raises:
        UserError: if there is no such pipeline.
    """
    with answers(server.host, f"look for pipeline {name!r}"):
        pipeline = _pipeline_id(server, name)
        if pipeline is None:
            known = [p.display_name for p in _pipelines(server)]
            raise unknown_name(f"{server.host}: pipeline", name, known or ["(none yet: danceopd pipeline upload)"])
        page = server.client.list_pipeline_versions(pipeline, page_size=1, sort_by="created_at desc")
        if not page.pipeline_versions:
            raise UserError(f"{server.host}: pipeline {name!r} has no version; upload one by: danceopd pipeline upload")
        [version] = page.pipeline_versions
        return pipeline, version.pipeline_version_id, version.pipeline_spec


def _pipeline_id(server: Server, name: str) -> str | None:
    found = _pipelines(server, _named(name))
    return found[0].pipeline_id if found else None


def _pipelines(server: Server, only: str | None = None) -> list:
    return server.client.list_pipelines(page_size=PAGE, filter=only, namespace=server.namespace).pipelines or []


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": 1, "key": "display_name", "stringValue": name}]})  # 1: EQUALS


# ----------------------------------------------------------------------------------------------------------------- runs


def source_of(server: Server, package: Path | None, pipeline: str | None) -> tuple[dict[str, Any], dict[str, dict]]:
    """What a run is made from, in the words of kfp's client, and the parameters it takes.

    Args:
        server: that has the pipeline.
        package: a compiled file, sent along with the run.
        pipeline: or the name of an uploaded one, of which the newest version is taken.
    """
    if pipeline is None:
        assert package is not None  # one of the two is given
        return {"pipeline_package_path": str(package)}, declared(load_package(package))
    pipeline_id, version_id, spec = newest_version(server, pipeline)
    return {"pipeline_id": pipeline_id, "version_id": version_id}, declared(spec)


def open_experiment(server: Server, name: str) -> str:
    """The id of an experiment, which is made if it is missing."""
    with answers(server.host, f"open experiment {name!r}"):
        return server.client.create_experiment(name, namespace=server.namespace).experiment_id


def start_run(
    server: Server,
    source: dict[str, Any],
    arguments: dict[str, Any],
    experiment: str,
    name: str,
    service_account: str | None = None,
) -> str:
    """Start a run and return its id.

    Raises:
        UserError: if the server refuses, or its answer is lost.
    """
    with answers(server.host, f"start run {name!r}"):
        made = server.client.run_pipeline(experiment, name, params=arguments, service_account=service_account, **source)
        return made.run_id


def find_run(server: Server, experiment: str, name: str) -> tuple[str, str] | None:
    """The id and the state of the newest run of this name, or None."""
    with answers(server.host, "list runs"):
        found = server.client.list_runs("", 1, "created_at desc", experiment_id=experiment, filter=_named(name)).runs
    return (found[0].run_id, found[0].state) if found else None


@dataclass(frozen=True)
class Outcome:
    """How a followed run ended.

    Attributes:
        state: in Kubeflow's words, or `LOST` if the server stayed away.
        reasons: what failed, a line each.
    """

    state: str
    reasons: list[str]


def follow(server: Server, run_id: str, say: Callable[[str], None], patience: float, pause: float) -> Outcome:
    """Say each step's state when it changes, until the run is over; an absent server is waited for.

    Args:
        server: that runs it.
        run_id: of the run.
        say: takes a line.
        patience: seconds without an answer after which we stop watching.
        pause: seconds between two looks.

    Raises:
        UserError: if the server refuses; the run goes on.
    """
    seen: dict[str, str] = {}
    answered = time.monotonic()
    while True:
        try:
            run = server.client.get_run(run_id)
            answered = time.monotonic()
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            if isinstance(error, ApiException) and 0 < error.status < 500 and error.status != 429:
                raise UserError(f"{server.host}: {_refusal(error, 'show the run')}; the run goes on") from error
            if time.monotonic() - answered > patience:
                return Outcome(LOST, [f"{server.host} gave no answer for {patience:.0f} s; the run goes on"])
        else:
            for task in _steps(run):
                if task.state and seen.get(task.task_id) != task.state:
                    seen[task.task_id] = task.state
                    say(f"{task.display_name}: {task.state.lower()}")
            if run.state in OVER:
                return Outcome(run.state, [] if run.state == SUCCEEDED else _reasons(run))
        time.sleep(pause)


# What Argo calls the pods that Kubeflow puts between the steps; a retried one is numbered, as in executor(0) (4.0.8,
# workflow/controller/operator.go).
_BETWEEN = re.compile(r"(root|driver|executor|.*-driver)(\(\d+\))?")


def _steps(run: Any) -> list:
    """The run's own steps, without the pods that Kubeflow puts between them."""
    tasks = run.run_details.task_details if run.run_details else None
    return [t for t in tasks or [] if t.display_name and not _BETWEEN.fullmatch(t.display_name)]


def _reasons(run: Any) -> list[str]:
    failed = [t for t in _steps(run) if t.state == "FAILED"]
    lines = [f"{t.display_name}: {_short((t.error and t.error.message) or 'failed; its log says why')}" for t in failed]
    return lines or [_short((run.error and run.error.message) or run.state.lower())]
