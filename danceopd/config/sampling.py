"""How a field is drawn unless someone says otherwise: a student states it beside its pipeline."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from danceopd.config.parts import Part
from danceopd.errors import UserError
from danceopd.files import read_json, write_json

SAMPLING = "sampling.json"  # beside model_index.json


class Sampling(Part):
    """Steps and guidance. Without a statement: 8 steps, no guidance."""

    steps: int = Field(8, gt=0, description="Euler steps")
    guidance: float = Field(1.0, ge=1, description="scale of classifier-free guidance; 1: none")
    fixed: bool = Field(False, description="whether the field is made for this number of steps alone")


def write_sampling(pipeline: Path, sampling: Sampling) -> None:
    """State in a pipeline folder how it is drawn."""
    write_json(Path(pipeline) / SAMPLING, sampling.model_dump(mode="json"))


def read_sampling(pipeline: Path) -> Sampling | None:
    """What a pipeline folder states; None for one that states nothing.

    Raises:
        UserError: if its statement does not fit.
    """
    path = Path(pipeline) / SAMPLING
    if not path.is_file():
        return None
    try:
        return Sampling.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        told = f'{where}: {first["msg"]}; write {{"steps": 8, "guidance": 1.0, "fixed": false}}, or remove the file'
        raise UserError(f"{path}: {told}") from error
