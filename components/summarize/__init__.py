"""The `summarize` step."""

from components.summarize.component import summarize

__all__ = ["summarize"]
