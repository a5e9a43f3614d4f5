"""The cluster: found from inside it (service account) or from outside (kubeconfig), and called with patience."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import urllib3
from kubernetes import client, config
from kubernetes.client import ApiException

from danceopd.errors import UserError

NAMESPACE = "danceopd"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = (10, 60)  # seconds to connect, and between two bytes of an answer
PATIENCE = 900.0  # seconds that an API server may be away
SAID_AFTER = 3  # failed tries in a row, after which the user hears of them
log = logging.getLogger(__name__)
T = TypeVar("T")


class Unreachable(RuntimeError):
    """The API server did not answer for longer than we wait; what runs there runs on."""


@dataclass(frozen=True)
class Cluster:
    """One namespace of one cluster.

    Attributes:
        api: kubernetes' client of it.
        namespace: where everything is made and looked for.
        patience: seconds a call is tried again while the server is away or busy.
        pause: seconds before the first retry; doubled each time, at most 30.
    """

    api: client.ApiClient
    namespace: str
    patience: float = PATIENCE
    pause: float = 1.0

    @property
    def core(self) -> client.CoreV1Api:
        """Pods, events, services."""
        return client.CoreV1Api(self.api)

    @property
    def objects(self) -> client.CustomObjectsApi:
        """Any namespaced kind of a named API group, as plain JSON."""
        return client.CustomObjectsApi(self.api)


def connect(namespace: str | None = None, context: str | None = None) -> Cluster:
    """Find the cluster: the kubeconfig if a context or KUBECONFIG names one, else the pod's own, else the kubeconfig.

    Args:
        namespace: default: the pod's or the context's, else `danceopd`.
        context: of the kubeconfig.

    Raises:
        UserError: if there is no cluster to be found.
    """
    settings = client.Configuration()
    inside = context is None and "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ
    try:
        if inside:
            config.load_incluster_config(client_configuration=settings)
            found = _pod_namespace()
        else:
            config.load_kube_config(context=context, client_configuration=settings)
            found = _context_namespace(context)
    except (config.ConfigException, OSError) as error:
        raise UserError(
            f"no cluster: {error}; run inside one, or name a kubeconfig by KUBECONFIG and a context by --context"
        ) from error
    settings.retries = False  # `persist` does it, and says so
    return Cluster(client.ApiClient(settings), namespace or found or NAMESPACE)


def _pod_namespace() -> str | None:
    path = SERVICE_ACCOUNT / "namespace"
    return path.read_text().strip() if path.is_file() else None


def _context_namespace(context: str | None) -> str | None:
    contexts, current = config.list_kube_config_contexts()
    chosen = next((c for c in contexts if c["name"] == context), current)
    return chosen["context"].get("namespace")


def persist(cluster: Cluster, call: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call the API, again and again while the server is away, restarts or is busy.

    Raises:
        ApiException: if it answers with an error that trying again does not mend.
        Unreachable: if it stays away longer than the cluster's patience.
    """
    started, pause, tries = time.monotonic(), cluster.pause, 0
    while True:
        try:
            answer = call(*args, **{"_request_timeout": TIMEOUT} | options)
            if tries >= SAID_AFTER:
                log.warning("the cluster's API answers again")
            return answer
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            if isinstance(error, ApiException) and not _passing(error):
                raise
            tries, reason = tries + 1, one_line(message_of(error))
            if time.monotonic() - started + pause > cluster.patience:
                raise Unreachable(f"the cluster's API gave no answer for {cluster.patience:.0f} s: {reason}") from error
            if tries == SAID_AFTER:
                minutes = cluster.patience / 60
                log.warning("the cluster's API does not answer (%s); trying again for %.0f min", reason, minutes)
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def _passing(error: ApiException) -> bool:
    return error.status == 0 or error.status == 429 or error.status >= 500


def one_line(text: object, most: int = 300) -> str:
    """A message without its line breaks, and no longer than a person reads."""
    whole = " ".join(str(text).split())
    return whole if len(whole) <= most else f"{whole[: most - 3]}..."


def message_of(error: Exception) -> str:
    """What the server said, without the HTTP around it."""
    if isinstance(error, ApiException) and error.body:
        try:
            return json.loads(error.body)["message"]
        except (ValueError, KeyError, TypeError):  # not the API itself: a proxy, or a path it does not know
            return error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body)
    return str(getattr(error, "reason", None) or error)
