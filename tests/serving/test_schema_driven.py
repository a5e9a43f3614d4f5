"""The API driven by its own OpenAPI description: whatever a request holds, an answer in OpenAI's shape and no 5xx."""

from __future__ import annotations

import pytest
from test_app import GENERATIONS, client_of

from danceopd.inference.generate import open_student

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")


def test_no_request_breaks_the_server(student_pipeline):
    drawer = open_student(student_pipeline)
    client, worker = client_of(lambda: drawer)
    worker.start()
    assert worker.settled.wait(10)
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    operation = schema[GENERATIONS]["POST"]
    seen = []

    @hypothesis.settings(
        max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=operation.as_strategy())
    def drive(case):
        body = case.body if isinstance(case.body, dict) else {"prompt": case.body}
        answer = client.post(GENERATIONS, json=body | {"steps": 1, "n": 1, "size": "auto"})
        seen.append(answer.status_code)
        assert answer.status_code in (200, 400, 404), answer.text
        assert answer.status_code == 200 or answer.json()["error"]["message"]

    try:
        drive()
    finally:
        worker.close()
        worker.join(10)
    assert 200 in seen
