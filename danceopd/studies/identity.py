"""When a result on disk is the one asked for: everything that decides it is equal, however the code has changed.

A name is made of the settings that differ from their defaults: a knob that the code gains later renames nothing.
The full settings lie beside the result and must hold too, so that a default that changes does not pass for the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Section(Protocol):
    """A recipe's section."""

    def decisive(self) -> dict[str, Any]: ...

    def model_dump(self, *, mode: str, exclude_defaults: bool) -> dict[str, Any]: ...


def full(part: Section) -> dict[str, Any]:
    """All that decides what comes out of a recipe's section, as plain data."""
    return part.decisive()


def given(part: Section) -> dict[str, Any]:
    """Of `full`, what differs from its default."""
    return _within(part.decisive(), part.model_dump(mode="json", exclude_defaults=True))


def _within(values: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _within(values[name], inner) if isinstance(inner, dict) else values[name]
        for name, inner in names.items()
        if name in values
    }


def holds(kept: Any, now: Any) -> bool:
    """Whether all that was kept is still so; what `now` has besides came later."""
    if isinstance(kept, Mapping) and isinstance(now, Mapping):
        return all(name in now and holds(value, now[name]) for name, value in kept.items())
    return kept == now
