"""Fixtures every room shares: a tiny random base of the real classes, and a small world on disk."""

from __future__ import annotations

import copy
import os
from pathlib import Path

# Tests hold sums to their last bits, and make tensors of their own: on the CPU, also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from judge_server import serve_judge

torch.set_num_threads(1)
LONG = 2.0  # seconds


def pytest_terminal_summary(terminalreporter):
    """Name what `make unit` had to wait for. It fails nothing: a busy machine is no fault of a test's."""
    if terminalreporter.config.option.markexpr == "not slow":
        calls = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
        if long := sorted((r for r in calls if r.duration > LONG), key=lambda r: -r.duration):
            terminalreporter.section(f"over {LONG:.0f} s and not marked slow")
            for report in long:
                terminalreporter.line(f"{report.duration:6.1f} s  {report.nodeid}")


@pytest.fixture(autouse=True)
def one_thread():
    """Sums depend on how many threads share them, and a test may have changed that for those behind it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A Flux2KleinPipeline folder with random weights (a 50,000-parameter transformer) and the world's tokenizer."""
    from danceopd.pretraining import world_base as wb

    torch.manual_seed(0)
    transformer = wb.new_transformer(192, 16, heads=2, head_dim=16, doubles=1, singles=1)
    folder = tmp_path_factory.mktemp("base") / "tiny"
    pipeline = wb.new_pipeline(wb.new_vae().eval(), transformer)
    pipeline.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def backbone(tiny_base):
    """The tiny base, loaded. Do not change it."""
    from danceopd.backbones import load_backbone
    from danceopd.pretraining.world_base import SHAPE

    return load_backbone(tiny_base, SHAPE)


@pytest.fixture
def own_backbone(backbone):
    """A copy of the tiny base for a test that changes it; loading one takes three times as long."""
    return copy.deepcopy(backbone)


@pytest.fixture(scope="session")
def training_set(backbone, small_data):
    """The small world's training records with their targets, encoded. Do not change it."""
    from danceopd.data.assemble import open_dataset
    from danceopd.data.encode import encode_records

    return encode_records(backbone, open_dataset(small_data).records("train"), 64, 64, None, "k", targets=True)


@pytest.fixture(scope="session")
def student_pipeline(backbone, tmp_path_factory) -> Path:
    """The tiny base exported as a student's pipeline folder. Do not change it."""
    folder = tmp_path_factory.mktemp("student") / "pipeline"
    backbone.save(folder, backbone.transformer)
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A dataset folder of the small world: 12 train, 6 val and 6 test records per task."""
    from danceopd.data import world
    from danceopd.data.assemble import assemble

    folder = tmp_path_factory.mktemp("data") / "world"
    assemble(world.world_records({t: {"train": 12, "val": 6, "test": 6} for t in world.TASKS}), folder)
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An empty MLflow store's SQLite file, to be copied: to make one is a hundred migrations of a schema."""
    from danceopd.tracking.mlflow_store import DATABASE, open_client

    database = tmp_path_factory.mktemp("empty_store") / DATABASE
    open_client(f"sqlite:///{database}")
    return database


@pytest.fixture
def judge_server(monkeypatch):
    """A judge over HTTP; see `judge_server.Server` for what it says."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve_judge() as server:
        yield server
