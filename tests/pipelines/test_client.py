"""The commands of the client image run with what that image holds, and with nothing that trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from danceopd.config.load import load_recipe
from danceopd.tracking import mlflow_store
from pipelines.retrain import read_inputs

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
import api_server

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "python-multipart": "multipart"}
SCRIPT = """
import contextlib, io, json, sys

class Absent:
    names = set(json.loads(sys.argv[1]))
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} in the client image", name=name)

sys.meta_path.insert(0, Absent())
import danceopd.evaluation.statistics  # what `registry compare` and `promote` count with
from danceopd.cli.main import main
results = []
for arguments in json.loads(sys.argv[2]):
    out = io.StringIO()
    sys.argv = ["danceopd", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    results.append((code, out.getvalue()))
print(json.dumps(results))
"""


def groups() -> tuple[set[str], set[str]]:
    """Names of what the whole package needs, and of what its client does."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        read = tomllib.load(file)
    whole, client = read["project"]["dependencies"], read["dependency-groups"]["client"]
    return {Requirement(r).name for r in whole}, {Requirement(r).name for r in client}


def absent() -> list[str]:
    """Modules that the client image lacks. What its own packages bring along is there."""
    whole, client = groups()
    brought = {"mlflow", "fsspec", "fastapi", "uvicorn", "python-multipart", "psutil"}  # skinny's, the hub's
    return sorted({MODULES.get(name, name) for name in whole - client - brought} | {"pandas", "sklearn", "dvc_data"})


def run(tmp_path: Path, commands: list[list[str]], **variables: str) -> list[tuple[int, str]]:
    """Exit code and output of each command, all in one process without the absent modules."""
    (tmp_path / "here-0.dist-info").mkdir(exist_ok=True)
    with (ROOT / "pyproject.toml").open("rb") as file:  # an older installation may not have every command
        entries = tomllib.load(file)["project"]["entry-points"]["danceopd.commands"]
    written = "\n".join(["[danceopd.commands]", *(f"{name} = {place}" for name, place in entries.items())])
    (tmp_path / "here-0.dist-info" / "entry_points.txt").write_text(written)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **variables}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(absent()), json.dumps(commands)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def test_nothing_of_the_client_is_heavy():
    whole, client = groups()
    assert {"torch", "diffusers", "transformers"} <= whole and "torch" in absent()
    assert not client & {"torch", "diffusers", "transformers", "pyarrow", "pandas", "scipy", "dvc"}


def test_every_pin_of_the_client_is_the_projects():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").open() if "==" in line
    }
    assert {name.lower().replace("_", "-") for name in groups()[1]} <= pinned


@pytest.mark.slow
def test_commands_of_a_server_run(kfp, package, tmp_path):
    out = str(tmp_path / "p.yaml")
    there = ["--host", kfp.address]
    store = f"sqlite:///{tmp_path / 'none.db'}"
    commands = {
        "compile": ["pipeline", "compile", "--out", out, "--placement", "gpu"],
        "champion": ["pipeline", "champion", "compile", "--out", str(tmp_path / "c.yaml")],
        "upload": ["pipeline", "upload", *there],
        "run": ["pipeline", "run", *there, "--follow"],
        "again": ["pipeline", "run", *there, "--if-changed", "--follow", "--tracking-uri", store],
        "changed": ["pipeline", "changed", "--tracking-uri", store],
        "schedule": ["pipeline", "schedule", "create", *there, "--cron", "0 3 * * 1"],
        "schedules": ["pipeline", "schedule", "list", *there],
        "render": ["job", "render", "distill"],
    }
    for name, (code, text) in zip(commands, run(tmp_path, list(commands.values())), strict=True):
        assert code == 0, f"{name}: {text}"


@pytest.mark.slow
def test_commands_of_a_cluster_run(tmp_path):
    state = api_server.ApiServer()
    with api_server.serve(state) as address:
        cluster = {"name": "here", "cluster": {"server": address}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "danceopd"}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "here", "clusters": [cluster]}
        config |= {"users": [{"name": "me", "user": {}}], "contexts": [context]}
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        state.kinds |= {"namespaces", "nodes", "configmaps", "secrets", "serviceaccounts", "priorityclasses"}
        state.kinds |= {"persistentvolumeclaims"}
        job = str(tmp_path / "job.yaml")
        commands = {
            "render": ["job", "render", "distill", "--out", job],
            "submit": ["job", "submit", job],
            "status": ["job", "status"],
            "cancel": ["job", "cancel", "danceopd-distill"],
            "check": ["cluster", "check"],
        }
        results = run(tmp_path, list(commands.values()), KUBECONFIG=str(tmp_path / "kubeconfig"))
    codes = dict(zip(commands, [code for code, _ in results], strict=True))
    assert codes == dict.fromkeys(commands, 0) | {"check": 2}, results
    assert "claim danceopd-workspace: not there" in results[-1][1]


@pytest.mark.slow
def test_commands_of_the_registry_run(tmp_path):
    uri = mlflow_store.default_tracking_uri(tmp_path)
    client, recipe = mlflow_store.open_client(uri), load_recipe("world")
    client.create_registered_model(recipe.register_as.model)
    for _ in range(2):
        tags = read_inputs(recipe).tags() | {"decision": "x", "reasons": "[]"}
        client.create_model_version(recipe.register_as.model, "file:///nowhere", tags=tags)
    commands = [["registry", "list", "--tracking-uri", uri], ["registry", "promote", "1", "--tracking-uri", uri]]
    (listed, text), (_, promoted) = run(tmp_path, commands)
    assert listed == 0 and "in the client image" not in text + promoted, text + promoted
