"""`~/x` in a recipe, where no shell has put in the home folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from components.checking import inputs_revision
from danceopd.backbones.bases import fetch_base, fetch_configs, fetch_weights
from danceopd.cli.options import open_recipe
from danceopd.config.load import load_recipe
from danceopd.config.recipe import EvaluateRecipe
from danceopd.data.assemble import open_dataset
from danceopd.errors import UserError
from danceopd.evaluation.metrics.tools import lacks, weights_of
from danceopd.files import at_home, output_folder
from danceopd.steps.data import data_revision


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_only_the_own_home_is_put_in(home):
    assert at_home("~/x") == home / "x" and at_home("~") == home
    for plain in ("x/~", "~x", "/~/x", "a~/x", "."):
        assert at_home(plain) == Path(plain)


def test_bases_weights_networks_and_datasets_are_found(home, tiny_base, small_data):
    shutil.copytree(tiny_base, home / "base")
    shutil.copytree(small_data, home / "data")
    assert fetch_base("~/base", None, home / "ws").folder == home / "base" == fetch_configs("~/base", None, home / "ws")
    assert fetch_weights("~/base/transformer", home / "ws", "w") == home / "base" / "transformer"
    spec = EvaluateRecipe(networks={"clip": "~/base"})
    assert lacks("clip", spec) is None and weights_of("clip", spec)
    assert open_dataset(Path("~/data")).folder == home / "data"
    for base in ("~/gone", "~"):
        with pytest.raises(UserError, match=r"not a folder, hub id or URI|no model_index\.json"):
            fetch_base(base, None, home / "ws")


def test_what_changes_there_is_seen(home):
    (home / "in").mkdir()
    (home / "base").mkdir()
    recipe = load_recipe("world", ["data.inputs=[~/in]", "data.world=null", "model.base=~/base"])
    found = [(data_revision(recipe), inputs_revision(recipe))]
    for place in ("in", "base"):
        (home / place / "a").write_text("1")
        found.append((data_revision(recipe), inputs_revision(recipe)))
    assert len({data for data, _ in found}) == 2 and len({all_of for _, all_of in found}) == 3


def test_outputs_and_workspaces_go_there(home):
    (home / "mine.yaml").write_text("name: mine\nbase: {}\n")
    with output_folder(Path("~/out/new")) as scratch:
        (scratch / "a").touch()
    assert (home / "out" / "new" / "a").is_file()
    assert open_recipe("world", [], Path("~/ws"))[1] == home / "ws"
    with pytest.raises(UserError, match=r"recipe ~/mine\.yaml: "):  # it is found and read
        load_recipe("~/mine.yaml")
    assert list(Path().iterdir()) == []
