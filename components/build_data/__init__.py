"""The `build_data` step."""

from components.build_data.component import build_data

__all__ = ["build_data"]
