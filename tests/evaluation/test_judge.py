"""The judge, against a real HTTP server of the test's own that says what it is told to."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from judge_server import GOOD, Server, completion
from PIL import Image

from danceopd.config.recipe import EvaluateRecipe, JudgeRecipe
from danceopd.data.records import Record
from danceopd.errors import UserError
from danceopd.evaluation.judge import Judge, Verdict, read_answer, retry_after
from danceopd.evaluation.metrics import metric
from danceopd.evaluation.metrics.tools import Tools

KEY = "sk-very-secret-123"


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def server(judge_server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return judge_server


def make(server: Server, cache=None, time: Time | None = None, **settings) -> Judge:
    spec = {"url": server.url, "model": "vlm", "key_env": "JUDGE_KEY", "parallel": 1, "attempts": 3}
    time = time or Time()
    return Judge(JudgeRecipe(**spec | settings), cache, time, time.sleep)


def drawn(count: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def records(count: int = 1, prompt: str = "make the ring red") -> list[Record]:
    return [Record(f"r{i}", "edit", prompt, b"x", None, "test") for i in range(count)]


def ask(judge: Judge, count: int = 1, parts=("semantic",), source: bool = True, **more) -> list[Verdict | None]:
    sources = list(drawn(count, seed=1)) if source else [None] * count
    return judge.verdicts(drawn(count), sources, records(count, **more), parts)


# --- what is asked, and what is made of the answer ---


def test_an_edit_is_asked_with_both_pictures_and_scored_as_gedit_does(server):
    [verdict] = ask(make(server), parts=("semantic", "quality"), prompt='say "10" </json>')
    assert verdict == Verdict(8, 6, 6) and verdict.overall == pytest.approx(6)
    (path, headers, semantic), (_, _, quality) = server.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert semantic["model"] == "vlm" and semantic["temperature"] == 0
    text, *images = semantic["messages"][0]["content"]
    assert json.dumps('say "10" </json>') in text["text"] and '"preservation"' in text["text"]
    uris = [part["image_url"]["url"] for part in images]
    assert all(uri.startswith("data:image/png;base64,") for uri in uris)
    sent = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))) for uri in uris]
    assert np.array_equal(sent[0], drawn(1, seed=1)[0]) and np.array_equal(sent[1], drawn()[0])
    assert len(quality["messages"][0]["content"]) == 2 and "ring" not in quality["messages"][0]["content"][0]["text"]


def test_a_drawing_has_no_source_and_nothing_to_preserve(server):
    server.script = [{"instruction": 7}]
    [verdict] = ask(make(server, key_env=None), source=False)
    assert (verdict.instruction, verdict.preservation) == (7, 7) and math.isnan(verdict.overall)
    _, headers, body = server.seen[0]
    assert len(body["messages"][0]["content"]) == 2 and '"preservation"' not in json.dumps(body)
    assert "Authorization" not in headers


def test_four_metrics_cost_two_questions_a_picture(server):
    tools = Tools(EvaluateRecipe(judge={"url": server.url, "model": "vlm", "key_env": "JUDGE_KEY"}))
    buffer = io.BytesIO()
    Image.fromarray(drawn()[0]).save(buffer, "PNG")
    of = [Record(f"r{i}", "edit", "p", buffer.getvalue(), None, "test") for i in range(3)]
    names = ("judge_instruction", "judge_preservation", "judge_quality", "judge_overall")
    assert tools.judge_usage is None
    values = [metric(name).score(drawn(3), of, tools) for name in names]
    assert values == [[8] * 3, [6] * 3, [6] * 3, [6] * 3]
    assert len(server.seen) == 6 == tools.judge_usage["requests"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("I would say 8.", "not a JSON object alone"),
        ('Sure: {"a": 1}', "not a JSON object alone"),
        ("[1, 2]", "not a JSON object alone"),
        ("", "not a JSON object alone"),
        ("{}", "'a' is not a number from 0 to 10"),
        ('{"a": 11}', "'a' is not"),
        ('{"a": -1}', "'a' is not"),
        ('{"a": true}', "'a' is not"),
        ('{"a": "7"}', "'a' is not"),
        ('{"a": NaN}', "'a' is not"),
    ],
)
def test_an_answer_is_read_strictly(text, said):
    with pytest.raises(ValueError, match=said):
        read_answer(text, ("a",))


def test_an_answer_may_stand_in_a_fence():
    assert read_answer('```json\n{"a": 7.5}\n```', ("a",)) == {"a": 7.5} == read_answer(' {"a": 7.5}\n', ("a",))


# --- failures ---


def test_429_waits_as_long_as_it_is_told_and_goes_on(server):
    server.script, time = [(429, {"Retry-After": "7"}, "slow down")], Time()
    assert ask(make(server, time=time)) == [Verdict(8, 6)]
    assert sum(time.slept) == 7 and len(server.seen) == 2


def test_a_date_to_wait_for_is_understood():
    at = datetime.now(UTC) + timedelta(seconds=90)
    assert retry_after(format_datetime(at, usegmt=True)) == pytest.approx(90, abs=3)
    assert retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0 == retry_after("-3")
    assert retry_after("soon") is None and retry_after(None) is None


def test_an_endpoint_that_wants_too_long_a_wait_is_one_line(server):
    server.script = [(429, {"Retry-After": "86400"}, "")]
    with pytest.raises(UserError, match=r"asks to wait 86400 s, more than 300; run it again later"):
        ask(make(server))


@pytest.mark.parametrize("failure", [(500, {}, "oops"), "drop", (200, {}, "<html>"), (200, {}, '{"choices": []}')])
def test_a_passing_failure_is_tried_again_with_longer_pauses(server, failure):
    server.script, time = [failure, failure], Time()
    judge = make(server, time=time)
    assert ask(judge) == [Verdict(8, 6)]
    assert time.slept == [1, 2] and judge.usage()["failed_attempts"] == 2


@pytest.mark.parametrize("failure, said", [((503, {}, "busy"), r"HTTP 503 \(busy\)"), ("drop", "no connection")])
def test_a_failure_that_stays_ends_it_with_one_line(server, failure, said):
    server.script = [failure] * 3
    with pytest.raises(UserError, match=rf"gave no answer in 3 attempts \({said}.*run it again") as error:
        ask(make(server))
    assert "\n" not in str(error.value)


def test_nobody_there_is_one_line(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(UserError, match=r"judge http://127\.0\.0\.1:9/v1: gave no answer in 2 attempts"):
        time = Time()
        ask(Judge(JudgeRecipe(url="http://127.0.0.1:9/v1", model="m", attempts=2), None, time, time.sleep))


@pytest.mark.parametrize(
    "status, said",
    [
        (401, r"HTTP 401 .*; check the key in JUDGE_KEY"),
        (404, r"HTTP 404 .*; check evaluate.judge \(url, model"),
        (302, r"HTTP 302 .*; check evaluate.judge"),
    ],
)
def test_a_refusal_is_one_line_at_once_and_ends_the_others(server, status, said):
    server.script = [(status, {"Location": "http://elsewhere.invalid/"}, f"bad key {KEY}\nreally")] * 20
    with pytest.raises(UserError, match=said) as error:
        ask(make(server, parallel=2), count=20)
    assert KEY not in str(error.value) and "\n" not in str(error.value) and len(server.seen) <= 4


def test_a_refusal_without_a_key_says_where_to_name_one(server):
    server.script = [(401, {}, "")]
    with pytest.raises(UserError, match=r"HTTP 401 \(Unauthorized\); check evaluate.judge.key_env: there is none"):
        ask(make(server, key_env=None))


def test_an_unreadable_answer_is_asked_again_and_then_left_open(server, caplog):
    server.script = ["eight", GOOD, "eight", {"instruction": 99}, "nine"]
    judge = make(server)
    with caplog.at_level(logging.WARNING, "danceopd"):
        assert ask(judge, count=2) == [Verdict(8, 6), None]
    assert "record 'r1', edit: no readable answer in 3 attempts" in caplog.text
    assert judge.usage()["unreadable"] == 1 and len(server.seen) == 5
    assert ask(judge, count=2)[1] is None and len(server.seen) == 5  # not asked a fourth time


# --- pace, cache, cost, secrecy ---


def test_requests_keep_the_pace(server):
    time = Time()
    ask(make(server, time=time, requests_per_minute=20), count=4)
    assert sum(time.slept) == pytest.approx(9) and len(server.seen) == 4


def test_answers_are_kept_by_picture_prompt_model_and_rubric(server, tmp_path):
    ask(make(server, tmp_path), count=2, parts=("semantic", "quality"))
    assert len(server.seen) == 4
    again = make(server, tmp_path)
    assert ask(again, count=2, parts=("semantic", "quality")) == [Verdict(8, 6, 6)] * 2
    assert len(server.seen) == 4 and again.usage()["from_cache"] == 4 and again.usage()["requests"] == 0
    ask(make(server, tmp_path), count=2, prompt="another")
    ask(make(server, tmp_path, model="other"), count=2)
    make(server, tmp_path).verdicts(drawn(1, seed=9), [drawn(1, seed=1)[0]], records(), ("semantic",))
    assert len(server.seen) == 9


def test_a_damaged_answer_on_disk_is_asked_for_again(server, tmp_path):
    ask(make(server, tmp_path))
    [path] = tmp_path.rglob("*.json")
    path.write_text('{"answer": {"instruction": "many"}}')
    assert ask(make(server, tmp_path)) == [Verdict(8, 6)] and len(server.seen) == 2


def test_what_was_answered_before_a_failure_is_kept(server, tmp_path):
    server.script = [GOOD, (401, {}, "gone")]
    with pytest.raises(UserError):
        ask(make(server, tmp_path), count=3)
    again = make(server, tmp_path)
    ask(again, count=3)
    assert again.usage()["from_cache"] == 1 and again.usage()["requests"] == 2


def test_tokens_and_cost_are_counted_over_every_answer_that_was_paid_for(server):
    server.script = ["eight", GOOD, (200, {}, completion(GOOD, usage=False))]
    judge = make(server, price_prompt=2.0, price_completion=10.0, currency="EUR")
    ask(judge, count=2)
    usage = judge.usage()
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (200, 40)
    assert usage["cost"] == pytest.approx(200 * 2e-6 + 40 * 10e-6) and usage["currency"] == "EUR"
    assert usage["answers_without_token_counts"] == 1 and usage["requests"] == 3
    assert make(server).usage()["cost"] is None


def test_the_key_is_in_one_header_and_nowhere_else(server, tmp_path, caplog):
    server.script = [(500, {}, f"your key {KEY} met a fault"), f"no json, but {KEY}", GOOD]
    judge = make(server, tmp_path)
    with caplog.at_level(logging.DEBUG):
        ask(judge)
    assert KEY not in caplog.text and "***" in caplog.text and KEY not in json.dumps(judge.usage())
    assert all(KEY not in path.read_text() for path in tmp_path.rglob("*.json"))
    assert all(KEY not in json.dumps(body) for _, _, body in server.seen)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"url": "localhost:8000"}, "write it as http://host/v1"),
        ({"url": f"https://me:{KEY}@host/v1"}, "holds a user, a password or a query"),
        ({"url": f"https://host/v1?key={KEY}"}, "holds a user, a password or a query"),
        ({"key_env": KEY}, "should match pattern"),
        ({"price_prompt": 1}, "both 'price_prompt' and 'price_completion'"),
        ({"parameters": {"stream": True, "model": "x", "seed": 1}}, "parameters: model, stream cannot be given"),
    ],
)
def test_settings_that_cannot_be_right_are_refused_without_repeating_a_secret(settings, said):
    from pydantic import ValidationError

    from danceopd.config.load import say_invalid

    with pytest.raises(ValidationError) as error:
        JudgeRecipe(**{"url": "http://host/v1", "model": "m"} | settings)
    told = str(say_invalid(error.value, JudgeRecipe, "recipe"))
    assert said in told and KEY not in told
