"""The API driven by its own OpenAPI description: whatever a request holds, an answer in OpenAI's shape and no 5xx."""

from __future__ import annotations

import pytest
from test_app import EDITS, GENERATIONS, client_of, png

from danceopd.inference.generate import open_student

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies  # noqa: E402

CHEAP = {"steps": 1, "n": 1, "size": "auto"}


def drive_path(student_pipeline, path, send) -> list[int]:
    """The status of each answer to 60 requests drawn from the server's description of `path`."""
    drawer = open_student(student_pipeline)
    client, worker = client_of(lambda: drawer)
    worker.start()
    assert worker.settled.wait(10)
    operation = schemathesis.openapi.from_asgi("/openapi.json", client.app)[path]["POST"]
    seen = []

    @hypothesis.settings(
        max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=operation.as_strategy(), choices=strategies.tuples(*[strategies.booleans()] * 2))
    def drive(case, choices):
        answer = send(client, case, *choices)
        seen.append(answer.status_code)
        assert answer.status_code in (200, 400, 404), answer.text
        assert answer.status_code == 200 or answer.json()["error"]["message"]

    try:
        drive()
    finally:
        worker.close()
        worker.join(10)
    return seen


def generation(client, case, *_):
    body = case.body if isinstance(case.body, dict) else {"prompt": case.body}
    return client.post(GENERATIONS, json=body | CHEAP)


def edit(client, case, whole, plain):
    """The case's form with its own bytes for pictures, or one whole picture; its own fields, or the prompt alone."""
    body = case.body if isinstance(case.body, dict) else {"prompt": case.body}
    uploads = body.pop("image", [])
    fields = {name: value for name, value in body.items() if name == "prompt" or not plain} | CHEAP
    own = [("image", ("a.png", value if isinstance(value, bytes) else str(value).encode())) for value in uploads]
    files = [("image", ("a.png", png()))] if whole else own or [("image", ("a.png", b""))]
    data = {name: "" if value is None else str(value) for name, value in fields.items()}
    return client.post(EDITS, data=data, files=files)


def test_no_request_breaks_the_server(student_pipeline):
    assert 200 in drive_path(student_pipeline, GENERATIONS, generation)


def test_no_form_breaks_the_server(student_pipeline):
    assert {200, 400} <= set(drive_path(student_pipeline, EDITS, edit))
