"""Settings that are named: YAML files that ship in a package, or a user's own."""

from __future__ import annotations

from importlib import resources

from danceopd.errors import UserError
from danceopd.files import at_home
from danceopd.text import parse_yaml, read_text


def shipped_names(package: str) -> list[str]:
    """Names of the YAML files in a package, without `.yaml`."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files(package).iterdir() if p.name.endswith(".yaml"))


def _is_file(name: str) -> bool:
    try:
        return at_home(name).is_file()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, or holds a NUL
        return False


def read_settings(kind: str, package: str, name_or_path: str) -> dict:
    """The mapping in a YAML file that ships with a package, or in a file.

    Args:
        kind: what it is called in messages, such as "recipe".
        package: where the shipped ones lie.
        name_or_path: a shipped one's name goes before a file's.

    Raises:
        UserError: if there is neither, or it cannot be read, or is no mapping.
    """
    names, where = shipped_names(package), f"{kind} {name_or_path}"
    if name_or_path in names:
        text = resources.files(package).joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    elif _is_file(name_or_path):
        text = read_text(at_home(name_or_path), where)
    else:
        shown = name_or_path if len(name_or_path) <= 100 else f"{name_or_path[:100]}..."
        raise UserError(f"{kind} {shown!r}: neither a file nor a shipped {kind}; shipped: {', '.join(names)}")
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise UserError(f"{where}: a {kind} is a YAML mapping, this is {type(data).__name__}")
    return data
