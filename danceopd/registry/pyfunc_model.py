"""The student as MLflow serves it: this file is logged as code beside the pipeline folder, so nothing is pickled.

One row of the input table is one picture: `prompt`, perhaps `image` (PNG or JPEG bytes, or base64 text of them) and
`seed`. The answer has one column, `image`, of PNG bytes.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType
from PIL import Image

from danceopd.config.sampling import Sampling
from danceopd.errors import UserError
from danceopd.inference.generate import Drawer, decode_picture, encode_picture, open_student

COLUMNS = ("prompt", "image", "seed")
T = TypeVar("T")


def signature(sampling: Sampling) -> ModelSignature:
    """What goes in and comes out. `image` and `seed` are of any type so that a row may leave them empty.

    Args:
        sampling: the student's own steps and guidance, the defaults of the two parameters.
    """
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.string, "prompt"),
                ColSpec(AnyType(), "image", required=False),
                ColSpec(AnyType(), "seed", required=False),
            ]
        ),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema(
            [
                ParamSpec("steps", DataType.long, sampling.steps),
                ParamSpec("guidance", DataType.double, sampling.guidance),
            ]
        ),
    )


def _is_missing(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def read_prompt(value: Any, where: str) -> str:
    """The prompt of a row.

    Raises:
        UserError: if it is no text.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: no text; say what to draw or to change")
    return value


def read_image(value: Any, where: str) -> Image.Image | None:
    """The picture of a row, or None.

    Raises:
        UserError: if there is something, but no picture.
    """
    if _is_missing(value):
        return None
    if isinstance(value, str):
        text = "".join(value.partition(";base64,")[2].split() if value.startswith("data:") else value.split())
        try:
            value = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{where}: text, but not base64; give image bytes, base64 text of them, or None") from error
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise UserError(f"{where}: {type(value).__name__}; give image bytes, base64 text of them, or None")
    return decode_picture(bytes(value), where)


def read_seed(value: Any, where: str) -> int:
    """The seed of a row; 0 if there is none.

    Raises:
        UserError: if it is no whole number.
    """
    if _is_missing(value):
        return 0
    whole = pd.api.types.is_integer(value) or (pd.api.types.is_float(value) and float(value).is_integer())
    if not whole or value < 0:
        raise UserError(f"{where}: {value!r}; give a whole number of 0 or more, or None")
    return int(value)


def read_rows(table: pd.DataFrame) -> tuple[list[str], list[Image.Image | None], list[int]]:
    """Prompts, pictures and seeds of an input table.

    Raises:
        UserError: naming the row, counted from 0, and the column.
    """
    if "prompt" not in table.columns:
        raise UserError(f"column 'prompt' is missing; columns are: {', '.join(COLUMNS)}")

    def column(name: str, read: Callable[[Any, str], T]) -> list[T]:
        values = list(table[name]) if name in table.columns else [None] * len(table)
        return [read(value, f"row {row}, column '{name}'") for row, value in enumerate(values)]

    return column("prompt", read_prompt), column("image", read_image), column("seed", read_seed)


class StudentModel(PythonModel):
    """Draws and edits pictures with the student in artifact `pipeline`."""

    drawer: Drawer

    def load_context(self, context: Any) -> None:
        """Load the student."""
        self.drawer = open_student(Path(context.artifacts["pipeline"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Pictures as PNG bytes in column `image`, in the rows' order.

        `params["steps"]` Euler steps each, guided at `params["guidance"]` (1: not); default: the student's own.

        Raises:
            UserError: naming the row and the column of bad input.
        """
        asked = params or {}
        rows = read_rows(model_input)
        pictures = self.drawer.draw(*rows, asked.get("steps"), guidance=asked.get("guidance"))
        return pd.DataFrame({"image": [encode_picture(p) for p in pictures]}, index=model_input.index)


mlflow.models.set_model(StudentModel())
