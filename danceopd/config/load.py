"""Reading a recipe: YAML that ships or is a user's own, overrides, and errors that name the right names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from danceopd.config.recipe import Recipe
from danceopd.config.shipped import read_settings
from danceopd.errors import UserError
from danceopd.text import parse_yaml

RECIPES = "danceopd.config.recipes"  # the package of those that ship


def say_invalid(error: ValidationError, model: type[BaseModel], where: str) -> UserError:
    """The first thing that does not fit a model, as one line."""
    first = error.errors()[0]
    path = ".".join(str(p) for p in first["loc"] if "[" not in str(p))  # pydantic names a union's branches, too
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"no such field; here are: {', '.join(_fields_at(model, first['loc'][:-1]))}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return UserError(f"{where}: {path or 'recipe'}: {message}{more}")


def _fields_at(model: Any, path: tuple) -> list[str]:
    schema = model.model_json_schema()
    node = schema
    for part in path:
        node = _resolve(node, schema)
        options = [_resolve(o, schema) for o in node.get("anyOf", []) + node.get("oneOf", [])]
        for option in [node, *options]:
            if part in option.get("properties", {}):
                node = option["properties"][part]
                break
            tag = option.get("properties", {}).get("kind", {})
            if part == tag.get("const") or part in tag.get("enum", []):
                node = option
                break
            values = [option.get("additionalProperties"), *option.get("patternProperties", {}).values()]
            if mappings := [value for value in values if isinstance(value, dict)]:
                node = mappings[0]
                break
    return sorted(_resolve(node, schema).get("properties", {})) or ["(none)"]


def _resolve(node: dict, schema: dict) -> dict:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def parse_recipe(data: Any, where: str) -> Recipe:
    """Check a mapping against the recipe's models.

    Raises:
        UserError: one line that names the field and the right values.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: a recipe is a YAML mapping, this is {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise say_invalid(error, Recipe, where) from error


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by the name of a shipped one or from a YAML file, then apply `key.sub=value` overrides.

    Raises:
        UserError: if it cannot be found or read, or does not fit the models.
    """
    data = read_settings("recipe", RECIPES, name_or_path)
    return parse_recipe(apply_overrides(data, overrides), f"recipe {name_or_path}")


def apply_overrides(data: Any, overrides: Sequence[str]) -> Any:
    """A copy of a plain tree with `a.b.c=value` settings applied; values are read as YAML.

    Raises:
        UserError: if a setting has no `=`, or its path runs through something that is no mapping.
    """
    data = copy.deepcopy(data)
    for setting in overrides:
        path, sign, value = setting.partition("=")
        if not sign or not path:
            raise UserError(f"--set {setting!r}: write it as key.sub=value, for example distill.steps=200")
        *parents, last = path.split(".")
        node = data
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                raise UserError(f"--set {setting!r}: {part!r} is not a section of the recipe")
        node[last] = parse_yaml(value, f"--set {setting[:200]!r}")
    return data
