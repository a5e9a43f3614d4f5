"""DanceOPD: on-policy distillation of many velocity fields into one flow-matching student.

The names below are what a script or a notebook needs; each is imported from its own module when it is first asked for,
so that `import danceopd` costs nothing and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danceopd.backbones import load_backbone as load_backbone
    from danceopd.backbones.base import Condition as Condition
    from danceopd.backbones.bases import fetch_base as fetch_base
    from danceopd.config.load import load_recipe as load_recipe
    from danceopd.config.recipe import Recipe as Recipe
    from danceopd.data.encode import encode_records as encode_records
    from danceopd.data.records import Record as Record
    from danceopd.distill import distill as distill_fields
    from danceopd.errors import UserError as UserError
    from danceopd.evaluation.scoring import draw_field as draw_field
    from danceopd.evaluation.scoring import score_records as score_records
    from danceopd.finetune import finetune as finetune_field
    from danceopd.flow.field_io import load_field as load_field
    from danceopd.flow.field_io import save_field as save_field
    from danceopd.flow.fields import VelocityField as VelocityField
    from danceopd.flow.guidance import GuidedField as GuidedField

__version__ = "0.1.0"

# name -> its module, and what it is called there (`distill` and `finetune` are modules of this package themselves)
_NAMES = {
    "Condition": ("backbones.base", "Condition"),
    "GuidedField": ("flow.guidance", "GuidedField"),
    "Recipe": ("config.recipe", "Recipe"),
    "Record": ("data.records", "Record"),
    "UserError": ("errors", "UserError"),
    "VelocityField": ("flow.fields", "VelocityField"),
    "distill_fields": ("distill", "distill"),
    "draw_field": ("evaluation.scoring", "draw_field"),
    "encode_records": ("data.encode", "encode_records"),
    "fetch_base": ("backbones.bases", "fetch_base"),
    "finetune_field": ("finetune", "finetune"),
    "load_backbone": ("backbones", "load_backbone"),
    "load_field": ("flow.field_io", "load_field"),
    "load_recipe": ("config.load", "load_recipe"),
    "save_field": ("flow.field_io", "save_field"),
    "score_records": ("evaluation.scoring", "score_records"),
}

__all__ = [
    "Condition",
    "GuidedField",
    "Recipe",
    "Record",
    "UserError",
    "VelocityField",
    "__version__",
    "distill_fields",
    "draw_field",
    "encode_records",
    "fetch_base",
    "finetune_field",
    "load_backbone",
    "load_field",
    "load_recipe",
    "save_field",
    "score_records",
]  # spelled out for type checkers


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no {name!r}; it has {', '.join(_NAMES)}, and its own modules")
    module, inner = _NAMES[name]
    return getattr(import_module(f"{__name__}.{module}"), inner)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
