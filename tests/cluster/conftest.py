"""A server that behaves like the API, and the real client connected to it."""

from __future__ import annotations

import pytest
from api_server import ApiServer, serve
from kubernetes import client

from pipelines.cluster.connect import Cluster


@pytest.fixture
def api():
    state = ApiServer()
    with serve(state) as address:
        state.address = address
        yield state


@pytest.fixture
def cluster(api) -> Cluster:
    settings = client.Configuration(host=api.address)
    settings.retries = False
    return Cluster(client.ApiClient(settings), "danceopd", patience=3.0, pause=0.02)
