"""A registered model that is served by its alias: rolled over under load, back again, and kept where it cannot be."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from danceopd.inference.generate import Sample, encode_picture, open_student
from danceopd.serving.follower import Follower
from danceopd.serving.metrics import Metrics
from danceopd.serving.reference import Reference
from danceopd.serving.worker import Worker
from danceopd.tracking import mlflow_store

pytestmark = pytest.mark.slow
ALIAS = "champion"
SAMPLE = Sample("red ring", (), 4, 1)


class Shop:
    """A registry with two versions of a tiny student, and the picture that each draws."""

    def __init__(self, uri: str, model: str, folder: Path, pipeline: Path):
        self.uri, self.model = uri, model
        self.client = mlflow_store.open_client(self.uri)
        self.client.create_registered_model(model)
        self.folders = {"1": folder / "1", "2": folder / "2"}
        for number, place in self.folders.items():
            made = place / "artifacts" / "pipeline"
            shutil.copytree(pipeline, made)
            if number == "2":
                _change(made)
            self.client.create_model_version(model, str(place), tags={"student": number})
        self.name("1")

    def name(self, number: str) -> None:
        """Let the alias name a version."""
        self.client.set_registered_model_alias(self.model, ALIAS, number)

    def picture(self, number: str) -> bytes:
        """What a version draws."""
        [drawn] = open_student(self.folders[number] / "artifacts" / "pipeline").draw_samples([SAMPLE])
        return encode_picture(drawn)


def _change(pipeline: Path) -> None:
    for file in (pipeline / "transformer").glob("*.safetensors"):
        noise = torch.Generator().manual_seed(0)
        weights = {n: w + 0.3 * torch.randn(w.shape, generator=noise).to(w) for n, w in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """The address of an empty registry, which every test puts a model of its own into."""
    return mlflow_store.default_tracking_uri(tmp_path_factory.mktemp("store"))


@pytest.fixture
def shop(store, request, tmp_path, student_pipeline) -> Shop:
    return Shop(store, request.node.name.removeprefix("test_"), tmp_path, student_pipeline)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(4)


@pytest.fixture
def follower(shop, tmp_path, metrics) -> Follower:
    return Follower(Reference(shop.model, ALIAS), shop.uri, tmp_path / "cache", open_student, metrics)


@pytest.fixture
def worker(follower, metrics):
    made = Worker(follower.first, 4, metrics)
    made.start()
    assert made.settled.wait(60) and made.failure is None
    yield made
    made.close()
    made.join(10)


def drawn(worker: Worker) -> bytes:
    [picture] = worker.submit([SAMPLE], worker.admit()).answer.result(60)
    return encode_picture(picture)


def test_another_champion_takes_over_and_a_rollback_brings_the_first_back(shop, follower, worker, metrics, tmp_path):
    assert worker.version == "1" and drawn(worker) == shop.picture("1")
    follower.look(worker)
    assert worker.version == "1", "nothing moved"
    for number in ("2", "1"):
        shop.name(number)
        follower.look(worker)
        assert worker.version == number and drawn(worker) == shop.picture(number)
        assert f'danceopd_model_info{{version="{number}"}} 1' in metrics.text()
    assert "danceopd_rollovers_total 2" in metrics.text()
    assert sorted(p.name for p in (tmp_path / "cache" / shop.model).iterdir()) == ["1", "2"]


def test_what_was_taken_is_drawn_by_the_one_it_was_taken_for(shop, follower, worker):
    admitted = worker.admit()
    shop.name("2")
    follower.look(worker)
    [old] = worker.submit([SAMPLE], admitted).answer.result(60)
    assert encode_picture(old) == shop.picture("1") and drawn(worker) == shop.picture("2")


def test_a_version_that_cannot_be_served_is_said_once_and_the_old_one_goes_on(shop, follower, worker, metrics, caplog):
    (shop.folders["2"] / "artifacts" / "pipeline" / "danceopd.json").unlink()
    shop.name("2")
    follower.look(worker), follower.look(worker)
    assert worker.version == "1" and drawn(worker) == shop.picture("1")
    assert caplog.text.count("version 1 goes on serving") == 1
    assert "danceopd_rollover_failing 1" in metrics.text()
    shop.name("1")
    follower.look(worker)
    assert "danceopd_rollover_failing 0" in metrics.text()


def test_a_registry_that_is_away_or_lost_its_alias_is_said_once_and_counted(shop, follower, worker, metrics, caplog):
    shop.client.delete_registered_model_alias(shop.model, ALIAS)
    follower.look(worker), follower.look(worker)
    assert worker.version == "1" and caplog.text.count("goes on serving") == 1
    time.sleep(0.2)
    [line] = [line for line in metrics.text().splitlines() if line.startswith("danceopd_alias_seen_seconds ")]
    assert float(line.split()[1]) > 0


def test_weights_that_are_not_the_registered_ones_are_not_served(shop, follower, worker, tmp_path):
    shop.client.set_model_version_tag(shop.model, "2", "weights", "another")
    shop.name("2")
    follower.look(worker)
    assert worker.version == "1" and not (tmp_path / "cache" / shop.model / "2").exists(), "whole or not at all"


# ----------------------------------------------------------------------------------------------------------- under load

REQUESTS, AT_ONCE = 200, 8


def ask(url: str) -> tuple[str, bytes]:
    """The version that drew, and the picture."""
    body = json.dumps({"prompt": SAMPLE.prompt, "seed": SAMPLE.seed, "steps": SAMPLE.steps}).encode()
    request = urllib.request.Request(url + "v1/images/generations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        [item] = json.load(answer)["data"]
        return answer.headers["X-Model-Version"], base64.b64decode(item["b64_json"])


def test_two_hundred_requests_during_a_change_none_lost_none_mixed(shop, tmp_path):
    pictures = {number: shop.picture(number) for number in ("1", "2")}
    command = [sys.executable, "-m", "danceopd", "serve", f"models:/{shop.model}@{ALIAS}", "--port", "0"]
    command += ["--tracking-uri", shop.uri, "--follow-every", "1", "--queue", str(2 * AT_ONCE)]
    command += ["--cache", str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ.copy()) as process:
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), "it is ready, after a probe picture"
            answers, moved = [], threading.Event()

            def client(number: int) -> None:
                if number == REQUESTS // 4:
                    shop.name("2")
                    moved.set()
                answers.append(ask(url))  # an error of any kind ends the test

            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(client, range(REQUESTS)))
                late = time.monotonic() + 120
                while answers[-1][0] != "2" and time.monotonic() < late:  # a slow machine's change may come later
                    list(pool.map(client, range(REQUESTS, REQUESTS + AT_ONCE)))
            assert moved.is_set() and len(answers) >= REQUESTS
            assert all(picture == pictures[version] for version, picture in answers), "none mixed"
            assert set(Counter(version for version, _ in answers)) == {"1", "2"}
            shop.name("1")
            late = time.monotonic() + 60
            while ask(url)[0] != "1":
                assert time.monotonic() < late, "rolled back"
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
