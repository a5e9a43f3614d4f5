"""A student's model card: Hugging Face's README.md with YAML front matter, through huggingface_hub's own classes.

It lies in the student's pipeline folder: without figures when the student is exported, with them once it is evaluated
and registered.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.files import read_json, write_atomic

CARD = "README.md"
_TEMPLATE = "model_card.md.j2"
_INDEX = "model_index.json"


def write_card(
    recipe: Recipe, pipeline: Path, lora: bool, origins: Mapping[str, Any], metrics: Mapping | None = None
) -> Path:
    """Write a student's card into its pipeline folder.

    Args:
        recipe: names the base, the teachers, the tasks and the licence.
        pipeline: the exported folder.
        lora: whether a LoRA file lies beside it, in `lora/`.
        origins: short facts for the table of origins (data revision, digests); None as a value: left out.
        metrics: the evaluation's `metrics.json`, or None while there is none.

    Raises:
        UserError: if the folder is no pipeline's.
    """
    return write_atomic(Path(pipeline) / CARD, render_card(recipe, pipeline, lora, origins, metrics))


def render_card(recipe: Recipe, pipeline: Path, lora: bool, origins: Mapping[str, Any], metrics: Mapping | None) -> str:
    """The card as text; see `write_card`."""
    index = Path(pipeline) / _INDEX
    if not index.is_file():
        raise UserError(f"{pipeline}: no {_INDEX}; a model card describes an exported pipeline folder")
    loader = read_json(index)["_class_name"]
    rows = [] if metrics is None else _rows(recipe, metrics)
    view = {
        "front": _front(recipe, metrics).to_yaml(),
        "recipe": recipe,
        "loader": loader,
        "lora": lora,
        "call": _call(recipe),
        "sampling": recipe.sampling("student"),
        "teachers": [(name, _teacher(spec), _taught(recipe, name)) for name, spec in recipe.teachers.items()],
        "rows": rows,
        "base": _base(recipe),
        "split": None if metrics is None else metrics["split"],
        "confidence": f"{100 * recipe.evaluate.confidence:g} %",
        "origins": [(name, value) for name, value in origins.items() if value is not None],
    }
    environment = Environment(autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    text = resources.files(__package__).joinpath(_TEMPLATE).read_text()
    return environment.from_string(text).render(view).rstrip() + "\n"


def _call(recipe: Recipe) -> str:
    """The stock pipeline's arguments that draw as the student is drawn here."""
    from danceopd.backbones import stock_guidance

    sampling = recipe.sampling("student")
    arguments = {"num_inference_steps": sampling.steps} | stock_guidance(recipe.model, sampling.guidance)
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _front(recipe: Recipe, metrics: Mapping | None) -> ModelCardData:
    edits = any(task.needs_source for task in recipe.tasks.values())
    results: list[EvalResult] = []
    for task, spec in recipe.tasks.items():
        if metrics is None:
            break
        results += [
            EvalResult(
                task_type="image-to-image" if spec.needs_source else "text-to-image",
                task_name=task,
                dataset_type=recipe.name,
                dataset_name=recipe.name,
                dataset_split=metrics["split"],
                metric_type=name,
                metric_value=value,
            )
            for name, value in metrics["scores"]["student"].get(task, {}).items()
            if value is not None
        ]
    return ModelCardData(
        license=recipe.register_as.license,
        base_model=_base(recipe),
        library_name="diffusers",
        pipeline_tag="image-to-image" if edits else "text-to-image",
        tags=["danceopd", "on-policy-distillation", "flow-matching"],
        model_name=recipe.register_as.model,
        eval_results=results or None,
    )


def _base(recipe: Recipe) -> str:
    """The base's name: a folder's last part only, since paths are nobody else's business."""
    base = recipe.model.base
    return Path(base).name if Path(base).is_absolute() or base.startswith(".") or "://" in base else base


def _teacher(spec: Any) -> str:
    """A teacher's origin in a few words."""
    origin = {
        "base": "the base itself",
        "finetune": "fine-tuned from the base in this run",
        "champion": "the champion this student was added to",
    }.get(spec.kind)
    origin = origin or f"{'LoRA' if spec.kind == 'lora' else 'checkpoint'} {Path(spec.path).name}"
    return origin + (f", guidance {spec.guidance:g}" if spec.guidance is not None else "")


def _taught(recipe: Recipe, teacher: str) -> str:
    return ", ".join(task for task, spec in recipe.tasks.items() if spec.teacher == teacher) or "nothing"


def _rows(recipe: Recipe, metrics: Mapping) -> list[dict[str, str]]:
    """The table of figures; what an older evaluation did not measure stays unknown."""

    def find(*path: str) -> Any:
        node: Any = metrics
        for part in path:
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    return [
        {
            "task": task,
            "metric": name,
            "student": _number(find("scores", "student", task, name)),
            "interval": _span(find("intervals", "student", task, name)),
            "teacher": _number(find("scores", spec.teacher, task, name)),
            "verdict": find("comparisons", "teacher", task, name, "verdict") or "",
            "unit": find("units", name) or "",
        }
        for task, spec in recipe.tasks.items()
        for name in spec.metrics
    ]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _span(interval: list[float] | None) -> str:
    return "unknown" if interval is None else " to ".join(map(_number, interval))


def _cell(text: object) -> str:
    """Text that cannot break out of a table's cell or bring markup along."""
    plain = str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(plain.split())
