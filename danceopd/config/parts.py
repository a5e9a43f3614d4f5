"""What every model of settings shares: strict fields, finite numbers, and names that hold wherever they are used."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

# What a recipe calls things is the name of folders, files, metrics and adapters, and of things in MLflow.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]  # an adapter's takes no dot
StoredName = Annotated[str, Field(min_length=1, max_length=250, pattern=r"^[^\x00-\x1f\x7f]*$")]

# A LoRA is an entry of a torch module's table under its teacher's name, which cannot be one of these words.
MODULE_WORDS = (
    "T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double "
    "dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half "
    "ipu items keys load_state_dict modules mtia named_buffers named_children named_modules named_parameters "
    "parameters pop register_backward_hook register_buffer register_forward_hook register_forward_pre_hook "
    "register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook "
    "register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook "
    "register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule share_memory state_dict to "
    "to_empty train training type update values xpu zero_grad "
)


class Part(BaseModel):
    """A mapping of settings: a field that does not exist is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, data: Any) -> Any:
        """YAML reads `yes`, `on` and `true` as one thing, which pydantic would take for the number 1."""
        for name, field in cls.model_fields.items():
            kinds = _kinds(field.annotation)
            if isinstance(data, dict) and not kinds & {bool, Any, JsonValue} and _holds_truth(data.get(name), kinds):
                raise ValueError(f"{name}: yes, no, on, off, true and false are one thing in YAML, and not taken here")
        return data


def _holds_truth(value: Any, kinds: set[Any]) -> bool:
    if isinstance(value, dict):  # a part looks after its own fields
        parts = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)
        return not parts and any(_holds_truth(inner, kinds) for inner in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_truth(inner, kinds) for inner in value)
    return isinstance(value, bool)


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inner = [kind for argument in get_args(annotation) for kind in _kinds(argument)]
    return {annotation, *inner} if isinstance(annotation, Hashable) else set(inner)
