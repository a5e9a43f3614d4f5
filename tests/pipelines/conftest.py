"""A Kubeflow Pipelines server that listens, and a pipeline to send to it."""

from __future__ import annotations

import sys
import traceback
from types import SimpleNamespace

import pytest
from kfp.dsl import pipeline_task
from kfp_server import KfpServer, serve

from pipelines import compile, submit
from pipelines.options import PipelineOptions


def bare_stack() -> list[tuple]:
    """`inspect.stack()` without the frames' source: under pytest that takes most of a second, 60 times a pipeline.

    kfp calls it in each setting of a task, and of what it gives takes one function's name.
    """
    frames = traceback.walk_stack(sys._getframe(1))
    return [(frame, frame.f_code.co_filename, line, frame.f_code.co_name, None, None) for frame, line in frames]


pipeline_task.inspect = SimpleNamespace(stack=bare_stack)


@pytest.fixture
def no_settings(monkeypatch, tmp_path):
    """None of the machine's own: its variables, its kfp context, a data.dvc around the working directory."""
    for name in (submit.HOST_ENV, submit.TOKEN_ENV, submit.COOKIE_ENV, submit.CA_ENV, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(submit.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.setattr(submit, "PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def kfp(no_settings):
    state = KfpServer()
    with serve(state) as state.address:
        yield state


@pytest.fixture(scope="session")
def package(tmp_path_factory) -> str:
    return str(compile.compile_pipeline(tmp_path_factory.mktemp("package") / "pipeline.yaml", PipelineOptions()))
