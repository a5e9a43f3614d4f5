"""The `check_recipe` step."""

from components.check_recipe.component import check_recipe

__all__ = ["check_recipe"]
