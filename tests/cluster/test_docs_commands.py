"""Every `danceopd` command in the pages about clusters is run, against servers that behave like the real ones."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from test_cluster_cli import kubeconfig  # noqa: F401
from test_manifests import ROOT, needs_kustomize
from typer.testing import CliRunner

from danceopd.tracking import mlflow_store

sys.path.append(str(Path(__file__).parents[1] / "pipelines"))
from kfp_server import KfpServer, serve

from pipelines import submit

PAGES = ("README.md", "docs/operator.md", "docs/submitting.md", "docs/pipeline.md", "manifests/README.md")
GROUPS = ("pipeline", "job", "cluster")
DIGEST = "@sha256:" + 64 * "0"
MAKES_NOTHING = "not run: installs, reaches or builds something outside of the project"
TOOLS = {"kubectl", "kind", "gcloud", "docker", "make", "python", "cp", "COMPILED_PIPELINE_SPEC_PATCH"}


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks, continued ones joined, without comments."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def ours() -> list[str]:
    """Those of the groups that speak to servers, each once."""
    found = [line for page in PAGES for line in commands(page)]
    named = {line for line in found if line.split()[:1] == ["danceopd"] and line.split()[1] in GROUPS}
    here = {line for line in named if line.startswith("danceopd pipeline run") and "--host" not in line}  # trains
    return sorted(named - here)


def group_of(name: str):
    with (ROOT / "pyproject.toml").open("rb") as file:
        entries = tomllib.load(file)["project"]["entry-points"]["danceopd.commands"]
    return EntryPoint(name, entries[name], "danceopd.commands").load()


@pytest.fixture
def kfp(monkeypatch, tmp_path):
    """A server of several users, in which everything the docs name is there."""
    for name in (submit.TOKEN_ENV, submit.COOKIE_ENV, submit.CA_ENV):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(submit.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.setattr(submit, "PAUSE", 0.01)
    state = KfpServer()
    with serve(state) as address:
        monkeypatch.setenv(submit.HOST_ENV, address)
        state.address = address
        yield state


def prepared(line: str, kfp, tmp_path: Path) -> list[str]:
    """The command as it is run here: with the servers' addresses, a digest, and files of the test."""
    line = line.replace("@sha256:...", DIGEST)
    line = re.sub(r"(--host) http://\S+", rf"\1 {kfp.address}", line)
    store = mlflow_store.default_tracking_uri(tmp_path)
    line = re.sub(r"(--tracking-uri) http://\S+", rf"\1 {store}", line)
    line = re.sub(r"(--out|--package) (\S+)", rf"\1 {tmp_path}/\2", line)
    return shlex.split(line)[1:]


def finished(api, name: str) -> None:
    """Let a job that is submitted run to its end, with a line of log."""

    def act():
        [plural] = [plural for plural in ("jobs", "trainjobs") if (plural, name) in api.objects]
        api.say(f"{name}-0", "step 1")
        api.pod(name, phase="Succeeded", plural=plural)
        api.condition(name, "Complete", plural)

    api.acts = [act]


@needs_kustomize
@pytest.mark.slow
@pytest.mark.parametrize("line", ours())
def test_a_command_of_the_docs_runs(line, api, kubeconfig, kfp, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    words = prepared(line, kfp, tmp_path)
    runner = CliRunner()
    if "--package" in words:
        made = runner.invoke(group_of("pipeline"), ["compile", "--out", words[words.index("--package") + 1]])
        assert made.exit_code == 0
    if words[:2] == ["pipeline", "schedule"] and words[2] not in ("create", "list"):
        created = runner.invoke(group_of("pipeline"), ["schedule", "create", "--name", "weekly", "--cron", "0 3 * * 1"])
        assert created.exit_code == 0, created.output
    allowed = {0}
    if words[0] == "cluster":
        api.namespace = words[words.index("--namespace") + 1] if "--namespace" in words else api.namespace
        api.kinds |= {"namespaces", "nodes", "configmaps", "secrets", "serviceaccounts", "priorityclasses"}
        api.kinds |= {"persistentvolumeclaims"}
        allowed = {2}  # an empty namespace
    if words[:2] == ["pipeline", "changed"]:
        allowed = {0, 3}
    if words[:2] == ["job", "submit"]:
        finished(api, words[words.index("--only") + 1])
    if words[:2] in (["job", "logs"], ["job", "status"], ["job", "cancel"]):
        api.put("jobs", {"metadata": {"name": words[2]}, "spec": {}})
        finished(api, words[2])
    result = runner.invoke(group_of(words[0]), words[1:])
    assert result.exit_code in allowed, result.output


def test_the_pages_name_commands_of_every_group():
    assert {line.split()[1] for line in ours()} == set(GROUPS) and len(ours()) >= 15


@pytest.mark.parametrize("page", PAGES[1:])
def test_what_is_not_run_is_of_a_tool_that_stands_outside(page):
    rest = [line for line in commands(page) if not line.startswith(("danceopd ", "."))]
    strange = [line for line in rest if re.split(r"[ =]", line)[0] not in TOOLS]
    assert strange == [], MAKES_NOTHING


def test_the_operators_page_says_which_are_not_run():
    text = (ROOT / "docs" / "operator.md").read_text()
    said = " ".join(text.split("## The image")[0].split())
    assert "are not run by the tests; every `danceopd` command is" in said
