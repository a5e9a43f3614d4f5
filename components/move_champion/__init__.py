"""The `move_champion` step."""

from components.move_champion.component import move_champion

__all__ = ["move_champion"]
