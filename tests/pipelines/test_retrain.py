"""Whether there is anything to train, against a real registry on SQLite; and runs that start only then."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from kfp_server import DROP, good, invoke, refused

from danceopd.config.load import load_recipe
from danceopd.files import content_key
from danceopd.tracking import mlflow_store
from pipelines import local
from pipelines.retrain import read_inputs

pytestmark = [pytest.mark.usefixtures("no_settings"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="session")
def store(tmp_path_factory, empty_store) -> str:
    """The address of a registry, which many models share."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path_factory.mktemp('store'))}"


class Registry:
    """One model of the store, and the options of a command about it."""

    def __init__(self, uri: str, model: str, data_file):
        self.model, self.client = model, mlflow_store.open_client(uri)
        self.recipe = load_recipe("world", [f"register_as.model={model}"])
        self.data_file = data_file
        self.options = ("--set", f"register_as.model={model}", "--tracking-uri", uri, "--data", str(data_file))

    def track(self, content: str) -> None:
        """Write the data.dvc of other data."""
        key = content_key(self.recipe.data.model_dump(mode="json"))
        out = {"md5": "m.dir", "path": "data"}
        self.data_file.write_text(yaml.safe_dump({"outs": [out], "meta": {"content": content, "recipe_data": key}}))

    def version(self, *aliases: str, **tags: str) -> str:
        """Register a student of the present inputs, with some tags otherwise."""
        if not self.client.search_registered_models(f"name = '{self.model}'"):
            self.client.create_registered_model(self.model)
        now = read_inputs(self.recipe, self.data_file).tags()
        more = {"decision": "x", "reasons": '["looked at"]'}
        made = self.client.create_model_version(self.model, "file:///nowhere", tags=now | more | tags)
        for alias in aliases:
            self.client.set_registered_model_alias(self.model, alias, made.version)
        return str(made.version)


@pytest.fixture
def registered(store, request, tmp_path, no_settings) -> Registry:
    made = Registry(store, request.node.name.removeprefix("test_"), tmp_path / "data.dvc")
    made.track("content-1")
    return made


def changed(registry: Registry, code: int, *more: str) -> str:
    result = invoke("changed", *registry.options, *more)
    assert result.exit_code == code, result.output
    return result.stdout


def test_the_first_student_is_a_change(registered, tmp_path):
    assert "no champion yet" in changed(registered, 0)
    registered.options = (*registered.options[:2], "--workspace", str(tmp_path / "new"))
    assert "no champion yet" in changed(registered, 0)
    assert not (tmp_path / "new").exists(), "asking makes no store"


def test_nothing_changed(registered):
    registered.version("champion")
    assert "nothing changed since the champion (version 1)" in changed(registered, 3)
    found = json.loads(changed(registered, 3, "--json"))
    assert (found["changed"], found["champion"], found["differences"], found["tried"]) == (False, "1", [], "1")


def test_each_change_is_named(registered):
    registered.version("champion", recipe="r0", code="c0")
    registered.track("content-2")
    lines = changed(registered, 0).splitlines()
    inputs = read_inputs(registered.recipe, registered.data_file)
    assert lines == [
        f"since champion (version 1) recipe: r0 -> {inputs.recipe}",
        f"since champion (version 1) code: c0 -> {inputs.code}",
        "since champion (version 1) data: content-1 -> content-2",
    ]
    found = json.loads(changed(registered, 0, "--json"))
    assert [d["what"] for d in found["differences"]] == ["recipe", "code", "data"]


def test_what_was_trained_and_stayed_challenger_is_not_trained_again(registered):
    registered.version("champion", code="c0")
    registered.version("challenger")
    assert "version 2 was trained from just this" in changed(registered, 3)


def test_data_from_files_is_told_by_dvc_or_counts_as_changed(registered):
    registered.recipe = registered.recipe.model_copy(
        update={"data": registered.recipe.data.model_copy(update={"inputs": ("x",), "world": None})}
    )
    assert read_inputs(registered.recipe, registered.data_file).data == ("dvc", "m.dir")
    assert read_inputs(registered.recipe).data == ("dvc", "unknown")
    assert read_inputs(registered.recipe, registered.data_file).known and not read_inputs(registered.recipe).known


def test_a_data_file_of_other_data_or_of_none_is_refused(registered, tmp_path):
    registered.data_file.write_text("outs: []\n")
    assert "not a DVC file with one output" in refused("changed", *registered.options)
    other = (*registered.options, "--set", "data.seed=77")
    registered.track("c")
    assert "not the data of recipe 'world'" in refused("changed", *other)


def test_a_registry_that_is_away_is_an_error(registered, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = (*registered.options, "--tracking-uri", "http://127.0.0.1:9")
    assert "MLflow store http://127.0.0.1:9 does not answer" in refused("changed", *away, code=75)


@pytest.mark.slow
def test_a_retraining_is_tried_again_while_a_server_is_away(registered, kfp, package):
    run = ("run", "--host", kfp.address, "--package", package, "--if-changed", *registered.options)
    refused(*run, "--tracking-uri", "http://127.0.0.1:9", code=75)
    kfp.fail("GET", "healthz", (503, "no healthy upstream"))
    result = invoke(*run)
    assert result.exit_code == 75 and "the server is not well (503" in result.stderr
    kfp.fail("POST", "runs", DROP)
    assert invoke(*run).exit_code == 75
    assert ": was run already" in good(*run) or len(kfp.kept["runs"]) == 1, "it was started, and is found again"


@pytest.mark.slow
def test_a_run_starts_once_and_only_if_something_changed(registered, kfp, package):
    run = ("run", "--host", kfp.address, "--package", package, "--if-changed", *registered.options)
    kfp.progress = [("RUNNING", {})]
    first = good(*run)
    assert "no champion yet" in first and ": started, " in first
    again = good(*run)
    assert ": found under way, " in again and len(kfp.kept["runs"]) == 1
    kfp.progress = [("SUCCEEDED", {})]
    kfp.act = lambda: registered.version("champion")
    followed = good(*run, "--follow")
    assert followed.endswith(f"{registered.model}: registered as version 1 (champion): looked at\n")
    assert len(kfp.kept["runs"]) == 1
    assert good(*run).splitlines() == [f"{registered.model}: nothing changed since the champion (version 1)"]
    registered.track("content-2")
    kfp.act = lambda: None
    assert "no new version, a gate failed" in good(*run, "--follow")
    assert len(kfp.kept["runs"]) == 2
    assert ": was run already, " in good(*run), "though its student was not registered"
    assert len(kfp.kept["runs"]) == 2
    kfp.kept["runs"][-1]["state"] = "FAILED"
    assert ": started, " in good(*run)


def test_a_run_here_starts_only_if_something_changed(registered, monkeypatch):
    monkeypatch.setattr(local, "run_local", lambda *_: pytest.fail("started"))
    registered.version("champion")
    assert "nothing changed" in good("run", "--if-changed", *registered.options)
