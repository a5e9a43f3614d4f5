"""`danceopd register` twice, at the smallest scale: more training data, the same held-out records, and no person."""

from __future__ import annotations

from dataclasses import replace

import pytest

from danceopd.cli.main import root_command
from danceopd.data import world
from danceopd.data.assemble import assemble
from danceopd.registry.versions import RegisteredModel
from danceopd.tracking import mlflow_store

pytestmark = pytest.mark.slow

SMALL = [
    "data.world=null",
    "tasks={t2i: {teacher: base, needs_source: false, metrics: [psnr],"
    " gates: [{metric: psnr, max_drop: 60, champion_margin: 60}]}}",
    "teachers={base: {kind: base}}",
    "distill={method: joint, start: base, steps: 1, lr: 0.001, batch: 2, warmup: 1, rollout_steps: 2}",
    "evaluate={per_task: 3, steps: 2, drift: null, worst: 0, pictures: 1, resamples: 100}",
    "register_as.model=grown",
]


def test_a_student_of_more_data_takes_over_by_itself(tiny_base, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(mlflow_store.ENVIRONMENT, raising=False)
    assemble(world.world_records({"t2i": {"train": 4, "val": 2, "test": 3}}), tmp_path / "first")
    more = world.world_records({"t2i": {"train": 6}}, seed=1)
    assemble((replace(record, id=f"more-{record.id}") for record in more), tmp_path / "more")
    workspace = tmp_path / "work"

    def register(*inputs: str) -> str:
        given = ", ".join(str(tmp_path / name) for name in inputs)
        settings = [f"model.base={tiny_base}", *SMALL, f"data.inputs=[{given}]"]
        line = ["register", "--workspace", str(workspace), *(part for of in settings for part in ("--set", of))]
        root_command().main(line, standalone_mode=False)
        return capsys.readouterr().out

    assert "grown version 1 (champion)" in register("first")
    told = register("first", "more")
    assert "grown version 2 (champion)" in told and "measured otherwise" not in told
    model = RegisteredModel(mlflow_store.open_client(mlflow_store.default_tracking_uri(workspace)), "grown")
    one, two = (model.version(number) for number in "12")
    assert one.tags["data"] != two.tags["data"] and str(model.champion().version) == "2"
    assert not (workspace / "champions").exists()  # by its own figures: the held-out records are the same
