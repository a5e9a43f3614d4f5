"""The `resolve_base` step."""

from components.resolve_base.component import resolve_base

__all__ = ["resolve_base"]
