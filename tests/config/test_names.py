"""Names are checked against every place they are used in, first; so are numbers that are none."""

from __future__ import annotations

import copy

import pytest
import torch

from danceopd.config.load import load_recipe, parse_recipe
from danceopd.config.parts import MODULE_WORDS
from danceopd.config.shipped import shipped_names
from danceopd.data.importers.spec import load_spec
from danceopd.errors import UserError
from danceopd.studies.plan import load_study

WORLD = load_recipe("world").model_dump(mode="json")


def changed(path: str, value):
    data = copy.deepcopy(WORLD)
    *parents, last = path.split(".")
    node = data
    for part in parents:
        node = node[part]
    node[last] = value
    return data


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "../../evil",
        "a/b",
        "/etc",
        ".",
        "..",
        ".hidden",
        "a b",
        "a\nb",
        "a\0b",
        "café",
        "x" * 101,
        "-x",
        "a:b",
        7,
        None,
    ],
)
def test_a_recipes_name_is_a_folders(name):
    with pytest.raises(UserError, match=r"^recipe: name: "):
        parse_recipe(changed("name", name), "recipe")


@pytest.mark.parametrize("place", ["tasks", "teachers", "evaluate.benchmarks"])
@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "x" * 101, "."])
def test_names_of_parts_are_folders_files_and_metrics(place, name):
    entry = {
        "tasks": WORLD["tasks"]["t2i"],
        "teachers": {"kind": "base"},
        "evaluate.benchmarks": {"input": "x", "task": "t2i", "metrics": ["psnr"]},
    }[place]
    node = WORLD
    for part in place.split("."):
        node = node[part]
    with pytest.raises(UserError, match=f"^recipe: {place}"):
        parse_recipe(changed(place, node | {name: entry}), "recipe")


@pytest.mark.parametrize("name", ["a.b", "train", "half", "type", "keys"])
def test_a_teachers_name_is_an_adapters(name):
    with pytest.raises(UserError, match="teachers"):
        parse_recipe(changed("teachers", WORLD["teachers"] | {name: {"kind": "base", "guidance": 2}}), "recipe")
    with pytest.raises(KeyError):
        torch.nn.ModuleDict({name: torch.nn.Identity()})


def test_the_words_are_those_of_torchs_modules():
    names = {name for name in dir(torch.nn.ModuleDict()) if not name.startswith("_")}
    lent = {
        name
        for name in names
        if "torch." not in getattr(getattr(torch.nn.ModuleDict, name, None), "__module__", "torch.")
    }
    assert names - lent == set(MODULE_WORDS.split())  # another library may lend one


@pytest.mark.parametrize("name", ["", "  ", "a/b", "a:b", "..", ".", "a%2fb", "a\nb", "x" * 251, "a?b", "a\\b"])
def test_a_models_name_is_one_that_mlflow_takes(name):
    with pytest.raises(UserError, match="register_as"):
        parse_recipe(changed("register_as.model", name), "recipe")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 251])
def test_an_experiments_name_is_one_that_mlflow_takes(name):
    with pytest.raises(UserError, match="register_as"):
        parse_recipe(changed("register_as.experiment", name), "recipe")


@pytest.mark.parametrize("name", ["one", "danceopd world 2", "café-модель", "a.b_c"])
def test_what_mlflow_takes_is_taken(name):
    from mlflow.utils.validation import _validate_experiment_name, _validate_model_name

    _validate_model_name(name)
    _validate_experiment_name(name)
    recipe = parse_recipe(changed("register_as", {"model": name, "experiment": name}), "recipe")
    assert recipe.register_as.model == name


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "path", ["seed", "distill.steps", "distill.lr", "model.height", "distill.window", "evaluate.split"]
)
def test_yes_is_no_number(path, value):
    with pytest.raises(UserError, match=path.partition(".")[0]):
        parse_recipe(changed(path, [value, 1] if path == "distill.window" else value), "recipe")


@pytest.mark.parametrize("text", ["yes", "on", "true", "no"])
def test_yes_of_a_setting_is_no_number(text):
    with pytest.raises(UserError, match="seed: yes, no, on, off"):
        load_recipe("world", [f"seed={text}"])
    with pytest.raises(UserError, match="min_side: yes, no, on, off"):
        load_spec("folder", ["x"], None, [f"min_side={text}"], [])
    with pytest.raises(UserError, match="records: yes, no, on, off"):
        load_study(sorted(shipped_names("danceopd.studies"))[0], [f"records={text}"])
    assert load_recipe("world", [f"distill.activation_checkpointing={text}"])  # a boolean it is


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("path", ["distill.lr", "distill.max_grad_norm", "distill.weight_decay", "distill.lora.alpha"])
def test_what_is_not_finite_is_refused(path, value):
    with pytest.raises(UserError, match=path):
        parse_recipe(changed(path, value), "recipe")


def test_a_name_of_no_recipe_is_one_short_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("x" * 300, "a\0b", "folder", "", "world.yaml"):
        with pytest.raises(UserError, match="neither a file nor a shipped recipe; shipped: ") as caught:
            load_recipe(name)
        assert len(str(caught.value)) < 500
