"""The server's routes, on the tiny student: pictures, limits, refusals, health, metrics, page."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from danceopd.inference.generate import Drawer, Sample, encode_picture, open_student
from danceopd.serving import app as app_module
from danceopd.serving.app import build_app
from danceopd.serving.metrics import Metrics
from danceopd.serving.schema import Limits
from danceopd.serving.worker import Served, Worker

LIMITS = Limits(steps=2, max_steps=4, max_n=3, max_sources=2, max_bytes=200_000, max_source_pixels=100_000)
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def png(seed: int = 0, size: tuple[int, int] = (64, 64)) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return encode_picture(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


@pytest.fixture(scope="module")
def drawer(student_pipeline) -> Drawer:
    return open_student(student_pipeline)


def client_of(load, places: int = 2, **settings) -> tuple[TestClient, Worker]:
    metrics = Metrics(places)
    worker = Worker(lambda: Served(load()), places, metrics)
    settings = {"name": "tiny", "limits": LIMITS, "key": None} | settings
    return TestClient(build_app(worker, metrics, **settings)), worker


@pytest.fixture(scope="module")
def client(drawer):
    client, worker = client_of(lambda: drawer)
    worker.start()
    assert worker.settled.wait(10)
    yield client
    worker.close()
    worker.join(10)


class Gate:
    """A student that draws when it is let."""

    def __init__(self, drawer: Drawer):
        self._drawer, self.begun, self.let = drawer, threading.Event(), threading.Event()
        self.field, self.settings, self.check_shape = drawer.field, drawer.settings, drawer.check_shape

    def draw_samples(self, samples):
        self.begun.set()
        assert self.let.wait(20)
        if samples[0].prompt == "break":
            raise RuntimeError("out of paint")
        return self._drawer.draw_samples(samples)


@pytest.fixture
def gated(drawer):
    gate = Gate(drawer)
    client, worker = client_of(lambda: gate)
    worker.start()
    assert worker.settled.wait(10)
    yield gate, client, worker
    gate.let.set()
    worker.close()
    worker.join(10)


def pictures(response) -> list[bytes]:
    assert response.status_code == 200, response.text
    return [base64.b64decode(item["b64_json"]) for item in response.json()["data"]]


def same_picture(data: bytes, other: bytes) -> bool:
    """Pixel by pixel; a file that `generate` wrote is marked as its own besides."""
    one, two = (np.asarray(Image.open(io.BytesIO(file))) for file in (data, other))
    return np.array_equal(one, two)


def test_a_picture_is_the_one_generate_draws(client, student_pipeline, tmp_path, monkeypatch):
    import sys

    from danceopd.cli import main as cli

    body = {"prompt": "red ring", "seed": 5, "n": 2, "steps": 3, "size": "48x32", "guidance": 2.0, "model": "tiny"}
    answer = client.post(GENERATIONS, json=body)
    (tmp_path / "in.png").write_bytes(png())
    edited = client.post(EDITS, data={"prompt": "mix", "seed": "6"}, files={"image": png()})
    for name, arguments in {
        "a.png": ["red ring", "--seed", 6, "--steps", 3, "--size", "48x32", "--guidance", 2],
        "b.png": ["mix", "--seed", 6, "--steps", 2, "--image", tmp_path / "in.png"],
    }.items():
        line = ["danceopd", "generate", student_pipeline, *arguments, "--out", tmp_path / name]
        monkeypatch.setattr(sys, "argv", [*map(str, line)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
    assert same_picture(pictures(answer)[1], (tmp_path / "a.png").read_bytes())
    assert same_picture(pictures(edited)[0], (tmp_path / "b.png").read_bytes()) and len(pictures(edited)) == 1
    told = answer.json()
    assert [item["seed"] for item in told["data"]] == [5, 6]
    assert (told["size"], told["steps"], told["output_format"]) == ("48x32", 3, "png") and told["created"] > 0


def test_a_seed_decides_and_one_that_was_drawn_is_told(client):
    first = client.post(GENERATIONS, json={"prompt": "red ring"})
    seed = first.json()["data"][0]["seed"]
    assert pictures(client.post(GENERATIONS, json={"prompt": "red ring", "seed": seed})) == pictures(first)
    assert pictures(client.post(GENERATIONS, json={"prompt": "red ring", "seed": seed + 1})) != pictures(first)


def test_several_source_images_are_taken_in_order(client, drawer):
    form = {"prompt": "mix", "seed": "1", "n": "1", "size": "auto", "stream": "false", "user": ""}
    both = [("image[]", ("a.png", png(1))), ("image[]", ("b.png", png(2)))]
    sources = tuple(Image.open(io.BytesIO(png(seed))) for seed in (1, 2))
    [wanted] = drawer.draw_samples([Sample("mix", sources, 1, 2)])
    assert pictures(client.post(EDITS, data=form, files=both)) == [encode_picture(wanted)]
    assert pictures(client.post(EDITS, data=form, files=both[::-1])) != [encode_picture(wanted)]


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"prompt": " "}, 400, "prompt", "the prompt is empty"),
        ({"prompt": "a" * 32_001}, 400, "prompt", "at most 32000 characters"),
        ({"guidance": "nan"}, 400, "guidance", "finite number"),
        ({"prompt": None}, 400, "prompt", "prompt: Input should be a valid string"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 4}, 400, "n", "n is 4; at most 3"),
        ({"steps": 5}, 400, "steps", "steps is 5; at most 4"),
        ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"seed": 2**63 - 1, "n": 2}, 400, "seed", "pass 9223372036854775807"),
        ({"seed": 1.5}, 400, "seed", "valid integer"),
        ({"guidance": 0.5}, 400, "guidance", "greater than or equal to 1"),
        ({"size": "big"}, 400, "size", "write WIDTHxHEIGHT"),
        ({"size": "1024x1024"}, 400, "size", "at most 4096 are drawn, 64x64 is this model's own"),
        ({"size": "40x64"}, 400, "size", "both sides must be multiples of 16"),
        ({"response_format": "url"}, 400, "response_format", "b64_json"),
        ({"stream": True}, 400, "stream", "False"),
        ({"quality": "hd"}, 400, "quality", "auto"),
        ({"colour": "red"}, 400, "colour", "unknown parameter: 'colour'"),
        ({"model": "gpt-image-1"}, 404, "model", "the model 'gpt-image-1' is not here; this is 'tiny'"),
    ],
)
def test_bad_parameters_are_refused_in_openais_shape(client, change, status, param, words):
    answer = client.post(GENERATIONS, json={"prompt": "a ring"} | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 20000 pixels wide and high."""
    head = b"IHDR" + (20000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    chunk = (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + png()[33:]


@pytest.mark.parametrize(
    ("form", "files", "status", "words"),
    [
        ({"prompt": "a"}, {}, 415, "multipart/form-data"),
        ({"prompt": "a"}, [("x", ("a.png", png()))], 400, "x: not a file field"),
        ({"prompt": "a"}, [("image", ("a.png", b"no picture"))], 400, "image 1: not a readable image"),
        ({"prompt": "a"}, [("image", ("a.png", png()[:200]))], 400, "image 1: not a readable image (cut short"),
        ({"prompt": "a"}, [("image", ("a.png", bomb()))], 400, "at most 100000 are decoded"),
        ({"prompt": "a"}, [("image", ("a.png", png(0, (400, 300))))], 400, "300x400 pixels, at most 100000"),
        ({"prompt": "a"}, [("image", ("a.png", png()))] * 3, 400, "at most 2 source images"),
        ({"prompt": "a"}, [("image", ("a.png", png()))] * 4, 400, "Too many files"),
        ({"prompt": "a"}, [("image", ("a.png", png())), ("mask", ("m.png", png()))], 400, "masks are not supported"),
        ({"prompt": "a", "image[]": "text"}, [("image", ("a.png", png()))], 400, "image[]: text; upload"),
        ({"prompt": ["a", "b"]}, [("image", ("a.png", png()))], 400, "prompt: given twice"),
        ({"prompt": "a", "n": "x"}, [("image", ("a.png", png()))], 400, "n: Input should be a valid integer"),
        ({"n": "1"}, [("image", ("a.png", png()))], 400, "prompt: Field required"),
        ({"prompt": "a", "seed": "1"}, [("image", ("a.png", b"\0" * 300_000))], 413, "larger than 200000 bytes"),
    ],
)
def test_bad_edits_are_refused(client, form, files, status, words):
    answer = client.post(EDITS, data=form, files=files)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_body_is_counted_while_it_is_read_whatever_it_says(client):
    def chunks():
        for _ in range(30):
            yield b" " * 10_000

    for path, kind in ((GENERATIONS, "application/json"), (EDITS, "multipart/form-data; boundary=x")):
        answer = client.post(path, content=chunks(), headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_what_is_no_json_or_no_route_is_said(client):
    answer = client.post(GENERATIONS, content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"][:20]) == (400, "the body is not JSON")
    assert client.get("/v1/nowhere").json()["error"]["message"] == "no such path: /v1/nowhere"
    answer = client.get(GENERATIONS)
    assert (answer.status_code, answer.json()["error"]["message"]) == (405, f"GET is not for {GENERATIONS}")


OPTIONAL = ["model", "n", "size", "response_format", "output_format", "quality", "background", "stream", "user"]


@pytest.mark.parametrize("names", [*([name] for name in OPTIONAL), [*OPTIONAL, "seed", "steps", "guidance"]])
def test_null_is_what_is_not_given(client, names):
    answer = client.post(GENERATIONS, json={"prompt": "red ring", "seed": 1} | dict.fromkeys(names))
    assert len(pictures(answer)) == 1


def test_null_is_no_prompt_and_no_unknown_parameter(client):
    for body, param in (({"prompt": None}, "prompt"), ({"prompt": "a", "moderation": None}, "moderation")):
        answer = client.post(GENERATIONS, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("kind", [None, "", "application/json", "Application/JSON; charset=utf-8", "APPLICATION/JSON"])
def test_a_body_without_a_type_or_in_other_letters_is_json(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post(GENERATIONS, content=b'{"prompt": "red ring", "seed": 1}', headers=headers)
    assert len(pictures(answer)) == 1


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
def test_a_body_of_another_type_is_refused_without_its_text(client, kind):
    answer = client.post(GENERATIONS, content=b'{"prompt": "a secret"}', headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert "secret" not in answer.text
    for body in (b"a secret", b"\xff\xfe", b"[" * 5000, b'"a secret"'):
        answer = client.post(GENERATIONS, content=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["Multipart/Form-Data", "MULTIPART/FORM-DATA"])
def test_a_form_in_other_letters_is_one(client, kind):
    body = b"\r\n".join(
        [
            b"--x",
            b'Content-Disposition: form-data; name="prompt"',
            b"",
            b"make it red",
            b"--x",
            b'Content-Disposition: form-data; name="image"; filename="a.png"',
            b"Content-Type: image/png",
            b"",
            png(),
            b"--x--",
            b"",
        ]
    )
    answer = client.post(EDITS, content=body, headers={"content-type": f"{kind}; boundary=x"})
    assert len(pictures(answer)) == 1


def test_openais_own_client_draws_and_edits(client):
    openai = pytest.importorskip("openai")
    asked = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)
    drawn = asked.images.generate(prompt="red ring", model="tiny", n=2, response_format="b64_json", size="auto")
    assert len(drawn.data) == 2 and base64.b64decode(drawn.data[0].b64_json)[:4] == b"\x89PNG"
    edited = asked.images.edit(prompt="make it red", image=("a.png", png()), model="tiny")
    assert base64.b64decode(edited.data[0].b64_json)[:4] == b"\x89PNG"
    with pytest.raises(openai.BadRequestError, match="at most"):
        asked.images.generate(prompt="red ring", n=100)


def test_half_a_character_is_refused(client):
    answer = client.post(GENERATIONS, content=b'{"prompt": "a \\ud800"}', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt"), answer.text


def test_openapi_knows_the_form(client):
    form = client.get("/openapi.json").json()["paths"][EDITS]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert form["schema"]["required"] == ["prompt", "image"] and "steps" in form["schema"]["properties"]


def test_a_student_that_cannot_edit_says_so(client, drawer, monkeypatch):
    monkeypatch.setattr(drawer.field.backbone, "most_sources", 0)
    answer = client.post(EDITS, data={"prompt": "a"}, files={"image": png()})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
    assert "draws only" in answer.json()["error"]["message"]
    assert '<div class="source" hidden>' in client.get("/").text


def test_the_queue_is_bounded_and_one_draws_at_a_time(gated):
    gate, client, worker = gated
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, GENERATIONS, json={"prompt": "a", "seed": 1})
        assert gate.begun.wait(10)
        others = [pool.submit(client.post, GENERATIONS, json={"prompt": "a", "seed": seed}) for seed in (2, 3)]
        while len(worker._jobs) < 2:
            threading.Event().wait(0.01)
        assert "danceopd_queue_waiting 2\n" in client.get("/metrics").text
        for refused in (
            client.post(GENERATIONS, json={"prompt": "a"}),
            client.post(EDITS, data={"prompt": "a"}, files={"image": png()}),
        ):
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
            assert int(refused.headers["retry-after"]) >= 1
        gate.let.set()
        assert [one.result().status_code for one in (first, *others)] == [200] * 3
    text = client.get("/metrics").text
    assert "danceopd_pictures_total 3\n" in text and "danceopd_queue_waiting 0\n" in text


def test_closing_finishes_what_is_in_work_and_refuses_the_rest(gated):
    gate, client, worker = gated
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, GENERATIONS, json={"prompt": "a"})
        assert gate.begun.wait(10)
        waiting = pool.submit(client.post, GENERATIONS, json={"prompt": "a"})
        while not worker._jobs:
            threading.Event().wait(0.01)
        worker.close()
        refused = waiting.result()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        assert client.post(GENERATIONS, json={"prompt": "a"}).json()["error"]["code"] == "shutting_down"
        gate.let.set()
        assert first.result().status_code == 200


def test_a_job_that_is_withdrawn_is_not_drawn(gated):
    gate, _, worker = gated
    first = worker.submit([Sample("a", steps=1)], worker.admit())
    assert gate.begun.wait(10)
    second = worker.submit([Sample("b", steps=1)], worker.admit())
    assert worker.withdraw(second) and not worker.withdraw(second) and not worker.withdraw(first)
    gate.let.set()
    assert len(first.answer.result(10)) == 1 and not second.answer.done()


def test_a_client_that_goes_away_frees_its_place(gated, monkeypatch):
    gate, client, worker = gated
    monkeypatch.setattr(app_module, "PATIENCE", 0.02)
    first = worker.submit([Sample("a", steps=1)], worker.admit())
    assert gate.begun.wait(10)
    body = b'{"prompt": "b"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http",
        "method": "POST",
        "path": GENERATIONS,
        "headers": headers,
        "query_string": b"",
        "http_version": "1.1",
        "scheme": "http",
        "server": ("x", 80),
        "root_path": "",
    }
    messages = iter([{"type": "http.request", "body": body}])
    sent = []

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    asyncio.run(client.app(scope, receive, send))  # ends while the first is in work
    assert sent[0]["status"] == 499 and not worker._jobs and not first.answer.done()


def test_a_failure_while_drawing_is_told_without_its_details(gated):
    gate, client, _ = gated
    gate.let.set()
    answer = client.post(GENERATIONS, json={"prompt": "break"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "paint" not in answer.text
    assert client.post(GENERATIONS, json={"prompt": "go on"}).status_code == 200


def test_before_the_model_is_there(drawer):
    let = threading.Event()

    def load():
        let.wait(10)
        return drawer

    client, worker = client_of(load)
    worker.start()
    try:
        assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (200, 503)
        answer = client.post(GENERATIONS, json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
        assert answer.headers["retry-after"] == "5"
        assert client.get("/").status_code == 200
        let.set()
        assert worker.settled.wait(10)
        assert client.get("/readyz").status_code == 200
    finally:
        let.set()
        worker.close()
        worker.join(10)


def test_a_key_is_asked_of_the_api_alone(drawer):
    client, _ = client_of(lambda: drawer, key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        answer = client.get("/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert client.post(EDITS, headers=headers, content=b"x").status_code == 401
    answer = client.get("/v1/models", headers={"authorization": "Bearer secret"})
    assert [model["id"] for model in answer.json()["data"]] == ["tiny"]
    assert [client.get(path).status_code for path in ("/healthz", "/metrics", "/")] == [200, 200, 200]
    assert 'id="key"' in client.get("/").text and "secret" not in client.get("/").text


def test_other_sites_and_other_host_names_are_refused(drawer):
    client, _ = client_of(lambda: drawer, hosts=["127.0.0.1"])
    local = {"host": "127.0.0.1:8000"}
    assert client.get("/healthz", headers=local).status_code == 200
    assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 400
    answer = client.post(GENERATIONS, json={"prompt": "a"}, headers=local | {"sec-fetch-site": "cross-site"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


def test_metrics_are_prometheus_text(client):
    client.get("/nowhere")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    sample = re.compile(r'danceopd_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+')
    assert all(line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line) for line in lines)
    assert 'danceopd_requests_total{endpoint="other",status="404"}' in answer.text
    assert "danceopd_ready 1" in lines
    buckets = [int(line.split()[-1]) for line in lines if '_bucket{endpoint="generations"' in line]
    assert buckets == sorted(buckets)
    assert f'danceopd_request_seconds_count{{endpoint="generations"}} {buckets[-1]}' in lines


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    [nonce] = set(re.findall(r"'nonce-([^']+)'", policy))
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.text.count(f'nonce="{nonce}"') == 2 == answer.text.count("nonce=")
    assert not re.search(r"https?://|//[a-z]|style=\"| on[a-z]+=\"", answer.text)
    assert client.get("/").headers["content-security-policy"] != policy
