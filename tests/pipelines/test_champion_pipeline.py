"""The second pipeline, compiled: one step that is neither cached nor tried again."""

from __future__ import annotations

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from typer.testing import CliRunner

from pipelines.cli import app


def test_it_compiles_to_one_step_that_is_done_once(tmp_path):
    out = tmp_path / "champion.yaml"
    done = CliRunner().invoke(app, ["champion", "compile", "--out", str(out), "--image", "registry.example.com/d@1"])
    assert (done.exit_code, done.output.strip()) == (0, str(out))
    pipeline, platform = yaml.safe_load_all(out.read_text())
    assert json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec()).pipeline_info.name == "danceopd-champion"
    [(name, task)] = pipeline["root"]["dag"]["tasks"].items()
    assert name == "move-champion" and "retryPolicy" not in task and not task["cachingOptions"].get("enableCache")
    parameters = pipeline["root"]["inputDefinitions"]["parameters"]
    assert {n for n, p in parameters.items() if "defaultValue" not in p} == {"recipe", "action"}
    assert all(parameter["description"] for parameter in parameters.values())
    [executor] = pipeline["deploymentSpec"]["executors"].values()
    assert executor["container"]["image"] == "registry.example.com/d@1"
    [placed] = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    user = {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
    assert placed["pvcMount"] and placed["securityContext"] == user


def test_its_step_gets_the_placements_volume_and_the_secrets_of_all_steps(tmp_path):
    out, placement = tmp_path / "champion.yaml", tmp_path / "placement.yaml"
    secrets = [
        {"name": "store", "env": {"AWS_ACCESS_KEY_ID": "id"}},
        {"name": "hub", "env": {"HF_TOKEN": "token"}, "steps": ["resolve_base"]},
    ]
    placement.write_text(yaml.safe_dump({"claim": "elsewhere", "secrets": secrets}))
    chosen = ["--image", "registry.example.com/d@1", "--placement", str(placement)]
    assert CliRunner().invoke(app, ["champion", "compile", "--out", str(out), *chosen]).exit_code == 0
    _, platform = yaml.safe_load_all(out.read_text())
    [placed] = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    assert [mount["constant"] for mount in placed["pvcMount"]] == ["elsewhere"]
    assert [secret["secretName"] for secret in placed["secretAsEnv"]] == ["store"]


def test_a_wrong_recipe_is_one_line():
    done = CliRunner().invoke(app, ["champion", "rollback", "--recipe", "nowhere"])
    assert done.exit_code == 2 and "neither a file nor a shipped recipe" in done.output
