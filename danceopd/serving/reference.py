"""How a registered model is named: `models:/NAME@ALIAS`, as MLflow has it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from danceopd.errors import UserError

SCHEME = "models:"
_REFERENCE = re.compile(r"models:/(?P<model>[^@/]+)@(?P<alias>[\w-]+)")


@dataclass(frozen=True)
class Reference:
    """A registered model's version, by an alias.

    Attributes:
        model: name of the registered model.
        alias: such as champion.
    """

    model: str
    alias: str

    def __str__(self) -> str:
        return f"{SCHEME}/{self.model}@{self.alias}"


def parse_reference(text: str) -> Reference | None:
    """What `models:/NAME@ALIAS` names; None for a folder.

    Raises:
        UserError: if it begins like a reference, and is none.
    """
    if not text.startswith(SCHEME):
        return None
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise UserError(f"{text}: write it as models:/NAME@ALIAS, for example models:/danceopd-world@champion")
    return Reference(found["model"], found["alias"])
