"""What an import does, as one pydantic model: a YAML file, or the command's options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from danceopd.config.load import apply_overrides, say_invalid
from danceopd.config.parts import Part
from danceopd.data.importers.layouts import LAYOUTS, Layout
from danceopd.data.pictures import MAX_PIXELS, WHITE
from danceopd.errors import UserError, unknown_name
from danceopd.files import content_key
from danceopd.text import read_yaml

Byte = Annotated[int, Field(ge=0, le=255)]
ANY = "*"


class Buckets(Part):
    """Every picture is resized to the bucket nearest its own ratio (see `danceopd.data.buckets`)."""

    area: int = Field(1024 * 1024, gt=0, description="pixels of a picture")
    step: int = Field(32, gt=0, description="both sides are multiples of it")
    max_ratio: float = Field(2.0, ge=1, description="of the longest bucket's sides")


class FixedSize(Part):
    """Every picture is cropped and resized to one size."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)


class ImportSpec(Part):
    """One import: what is read, which task each kind of edit is, and what is done to the pictures."""

    layout: str
    inputs: tuple[str, ...] = Field(min_length=1, description="files, folders or globs, here or in an object store")
    images: str | None = Field(None, description="folder that path columns start from; default: the file's own folder")
    name: str | None = Field(None, description="what ids begin with; default: the layout's name")
    columns: dict[Literal["id", "prompt", "source", "target", "kind"], str] = Field(
        {}, description="columns named otherwise than in the layout"
    )
    tasks: dict[str, str | None] = Field(
        {}, description=f"kind of edit -> task, before the layout's rules; null: leave it out; {ANY}: every other kind"
    )
    license: str | None = Field(None, description="of rows that name none")
    min_scores: dict[str, float] = Field({}, description="score column -> least value a row must have")
    max_scores: dict[str, float] = Field({}, description="score column -> greatest value (`nsfw: 0` for flags)")
    choose_prompt: Literal["first", "last", "longest"] = Field("first", description="of a row with several wordings")
    max_prompt: int = Field(2000, gt=0, description="characters of a prompt")
    resize: Buckets | FixedSize | None = Field(None, description="none: pictures keep their size")
    encode: Literal["png", "jpeg"] = Field("png", description="of pictures that were changed; others keep their bytes")
    jpeg_quality: int = Field(95, ge=50, le=100)
    matte: tuple[Byte, Byte, Byte] = Field(WHITE, description="colour behind transparent pictures")
    min_side: int = Field(64, gt=0, description="pixels of the shorter side, as it comes")
    max_pixels: int = Field(MAX_PIXELS, gt=0)
    max_ratio: float = Field(4.0, ge=1, description="of the longer side to the shorter, as it comes")
    tolerance: float = Field(0.02, ge=0, le=0.5, description="share by which the ratios of a pair may differ")
    duplicates: int | None = Field(0, ge=0, le=16, description="bits by which near-duplicates differ; null: keep all")
    shard_rows: int = Field(1000, gt=0)
    shard_mb: int = Field(256, gt=0, description="megabytes of pictures after which a shard is closed")
    examples: int = Field(5, gt=0, description="first examples listed of each refusal")

    @model_validator(mode="after")
    def _known_layout(self) -> Self:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is not known; choose one of: {', '.join(sorted(LAYOUTS))}")
        return self

    @property
    def form(self) -> Layout:
        """The layout."""
        return LAYOUTS[self.layout]

    @property
    def scores(self) -> tuple[str, ...]:
        """The score columns that rows are chosen by."""
        return tuple(dict.fromkeys((*self.min_scores, *self.max_scores)))

    @property
    def label(self) -> str:
        """What ids begin with."""
        return self.name or self.layout

    def column(self, role: str) -> tuple[str, ...]:
        """The columns a role may have, the user's own first."""
        return (self.columns[role],) if role in self.columns else self.form.columns[role]

    def task_of(self, kind: str) -> str | None:
        """The task of a kind of edit, or None if it is left out or there is no rule for it."""
        for table, entry in ((self.tasks, kind), (self.tasks, ANY), (self.form.rules, kind)):
            if entry in table:
                return table[entry]
        return None

    def has_rule(self, kind: str) -> bool:
        """Whether a kind is decided on, be it to leave it out."""
        return kind in self.tasks or kind in self.form.rules or ANY in self.tasks

    def key(self) -> str:
        """A name for the settings: equal settings, equal name."""
        return content_key(self.model_dump(mode="json"))


def load_spec(
    layout: str | None, inputs: list[str], file: Path | None, overrides: list[str], tasks: list[str]
) -> ImportSpec:
    """Put an import's settings together: a YAML file, then the command line.

    Raises:
        UserError: one line that names the field and the right values.
    """
    data: dict[str, Any] = {}
    if file is not None:
        data = read_yaml(Path(file), f"import settings {file}") or {}
        if not isinstance(data, dict):
            raise UserError(f"import settings {file}: a YAML mapping is expected, this is {type(data).__name__}")
    if layout is not None:
        if layout not in LAYOUTS:
            raise unknown_name("layout", layout, LAYOUTS)
        data["layout"] = layout
    if inputs:
        data["inputs"] = list(inputs)
    data = apply_overrides(data, overrides)
    for pair in tasks:
        kind, sign, task = pair.partition("=")
        if not sign or not kind:
            raise UserError(f"--task {pair!r}: write it as KIND=TASK, for example --task 'style=global_style'")
        data.setdefault("tasks", {})[kind] = task or None
    try:
        return ImportSpec.model_validate(data)
    except ValidationError as error:
        raise say_invalid(error, ImportSpec, f"import settings {file}" if file else "import settings") from error
