"""Rows of the served model's input table: every accepted form, and a clear line for every other."""

from __future__ import annotations

import base64
import io

import numpy as np
import pandas as pd
import pytest
from mlflow.models import validate_schema
from PIL import Image

from danceopd.config.sampling import Sampling, write_sampling
from danceopd.errors import UserError
from danceopd.inference.generate import encode_picture
from danceopd.registry.pyfunc_model import StudentModel, read_rows, signature

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
PNG = encode_picture(PICTURE)
TEXT = base64.b64encode(PNG).decode()


def test_every_form_of_a_row_is_read():
    wrapped = TEXT[:76] + "\n" + TEXT[76:]
    forms = [None, float("nan"), PNG, bytearray(PNG), TEXT, f"data:image/png;base64,{TEXT}", wrapped]
    table = pd.DataFrame({"prompt": ["a"] * 7, "image": forms, "seed": [None, 1, 2.0, np.int64(3), 4, 5, 6]})
    prompts, images, seeds = read_rows(table)
    assert prompts == ["a"] * 7
    assert seeds == [0, 1, 2, 3, 4, 5, 6]
    assert images[:2] == [None, None]
    assert all(np.array_equal(np.asarray(image), np.asarray(PICTURE)) for image in images[2:])


def test_optional_columns_may_be_missing():
    assert read_rows(pd.DataFrame({"prompt": ["a", "b"]})) == (["a", "b"], [None, None], [0, 0])


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("prompt", None, "row 1, column 'prompt': no text"),
        ("prompt", "  ", "row 1, column 'prompt': no text"),
        ("prompt", 5, "row 1, column 'prompt': no text"),
        ("image", "cat.png", "row 1, column 'image': text, but not base64"),
        ("image", "data:image/png," + TEXT, "row 1, column 'image': not a readable image"),
        ("image", b"GIF", "row 1, column 'image': not a readable image"),
        ("image", PNG[:500], "row 1, column 'image': not a readable image"),
        ("image", 7, "row 1, column 'image': int; give image bytes"),
        ("image", [1, 2], "row 1, column 'image': list; give image bytes"),
        ("seed", 1.5, "row 1, column 'seed': 1.5; give a whole number"),
        ("seed", -1, "row 1, column 'seed': -1; give a whole number"),
        ("seed", float("inf"), "row 1, column 'seed': inf; give a whole number"),
        ("seed", "1", "row 1, column 'seed': '1'; give a whole number"),
        ("seed", True, "row 1, column 'seed': True; give a whole number"),
    ],
)
def test_a_bad_row_is_named(column, value, words):
    good = {"prompt": "a", "image": PNG, "seed": 0}
    table = pd.DataFrame({name: pd.Series([v, v], dtype=object) for name, v in good.items()})
    table.at[1, column] = value
    with pytest.raises(UserError, match=words):
        read_rows(table)


def test_a_table_without_prompts_is_refused():
    with pytest.raises(UserError, match="column 'prompt' is missing"):
        read_rows(pd.DataFrame({"text": ["a"]}))


def test_the_signature_takes_every_form():
    inputs = signature(Sampling()).inputs
    validate_schema(pd.DataFrame({"prompt": ["a"]}), inputs)
    validate_schema(pd.DataFrame({"prompt": ["a", "b"], "image": [PNG, None], "seed": [1, None]}), inputs)
    validate_schema(pd.DataFrame({"prompt": ["a"], "image": [TEXT]}), inputs)
    known = {p.name: p.default for p in signature(Sampling(steps=4, guidance=3.5)).params.params}
    assert known == {"steps": 4, "guidance": 3.5}


def test_the_model_keeps_the_rows_index(backbone, tmp_path):
    class Context:
        artifacts = {"pipeline": str(tmp_path)}  # noqa: RUF012

    backbone.save(tmp_path, backbone.transformer)
    model = StudentModel()
    model.load_context(Context)
    table = pd.DataFrame({"prompt": ["a", "b"], "image": [None, PNG]}, index=[7, 3])
    drawn = model.predict(Context, table, {"steps": 1})
    assert list(drawn.index) == [7, 3] and list(drawn.columns) == ["image"]
    assert [Image.open(io.BytesIO(data)).size for data in drawn["image"]] == [(64, 64)] * 2
    with pytest.raises(UserError, match="steps is 0"):
        model.predict(Context, table, {"steps": 0})
    assert bytes(drawn["image"][7]) != bytes(model.predict(Context, table, {"steps": 1, "guidance": 90.0})["image"][7])
    write_sampling(tmp_path, Sampling(steps=1))
    model.load_context(Context)
    assert [bytes(data) for data in model.predict(Context, table)["image"]] == [bytes(data) for data in drawn["image"]]
