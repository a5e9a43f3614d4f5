"""What a client may ask for, in OpenAI's words and a few of our own, checked against the server's limits."""

from __future__ import annotations

import base64
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from danceopd.errors import UserError
from danceopd.inference.generate import (
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    Drawer,
    Sample,
    check_prompt,
    encode_picture,
    read_size,
)
from danceopd.serving.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        steps: Euler steps of a request that names none; None: the student's own.
        max_steps: at most.
        max_n: pictures at most.
        max_pixels: of a picture that is drawn, at most; None: as many as the student's own size has.
        max_sources: source images at most.
        max_bytes: of a request's body.
        max_source_pixels: of a source image; larger ones are refused before they are decoded.
    """

    steps: int | None = None
    max_steps: int = 50
    max_n: int = 4
    max_pixels: int | None = None
    max_sources: int = 4
    max_bytes: int = 20_000_000
    max_source_pixels: int = 32_000_000


def _prompt(prompt: str) -> str:
    check_prompt(prompt, "prompt")
    return prompt


class Generation(BaseModel):
    """`POST /v1/images/generations`; `seed`, `steps` and `guidance` are our own.

    What OpenAI's clients send besides is taken where this server does what it says, and refused where it does not.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        """OpenAI's clients may send null for what is not given."""
        if not isinstance(data, dict):
            return data
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {key: value for key, value in data.items() if value is not None or key not in optional}

    prompt: Annotated[str, Field(max_length=32_000), AfterValidator(_prompt)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, description="pictures; their seeds count up from `seed`")] = 1
    size: str = Field("auto", description="WIDTHxHEIGHT, or auto: the student's own")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    stream: Literal[False] = False
    user: str | None = Field(None, description="taken and not used")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(None, description="none: one is drawn and told")
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance: Annotated[float, Field(ge=1, le=MAX_GUIDANCE, allow_inf_nan=False)] | None = None


def generation_body() -> dict:
    """The body of `POST /v1/images/generations`, for OpenAPI."""
    content = {"application/json": {"schema": Generation.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def edit_form() -> dict:
    """The multipart form of `POST /v1/images/edits`, for OpenAPI: a generation's fields and the source images."""
    schema = Generation.model_json_schema()
    picture = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": {"type": "array", "items": picture, "description": "or image[]; repeatable"}}
    schema["required"] = [*schema["required"], "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def samples_of(asked: Generation, sources: int, drawer: Drawer, name: str, limits: Limits) -> list[Sample]:
    """The pictures a request asks for, without their source images.

    Args:
        asked: the request.
        sources: how many source images it has.
        drawer: the student.
        name: of the model, as `GET /v1/models` tells it.
        limits: of the server.

    Raises:
        RequestError: 400 or 404, naming the field.
    """
    if asked.model not in (None, name):
        raise RequestError(404, f"the model {asked.model!r} is not here; this is {name!r}", "model", "model_not_found")
    if asked.n > limits.max_n:
        raise RequestError(400, f"n is {asked.n}; at most {limits.max_n} pictures per request", "n", "too_many")
    if asked.steps is not None and asked.steps > limits.max_steps:
        raise RequestError(400, f"steps is {asked.steps}; at most {limits.max_steps}", "steps", "too_many")
    steps = asked.steps or limits.steps or drawer.sampling.steps
    size = _size(asked.size, drawer, limits)
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    if seed + asked.n - 1 > MAX_SEED:
        raise RequestError(400, f"seed {seed} and {asked.n} pictures pass {MAX_SEED}", "seed", "out_of_range")
    for param, count, wanted in (("image", sources, None), ("size", 0, size)):
        try:
            drawer.check_shape(count, wanted, "request")
        except UserError as error:
            raise RequestError(400, str(error), param, "unsupported") from error
    return [Sample(asked.prompt, (), seed + i, steps, asked.guidance, size) for i in range(asked.n)]


def _size(text: str, drawer: Drawer, limits: Limits) -> tuple[int, int]:
    own = drawer.settings.height, drawer.settings.width
    if text == "auto":
        return own
    try:
        height, width = read_size(text, "size")
    except UserError as error:
        raise RequestError(400, str(error), "size", "invalid_size") from error
    most = limits.max_pixels or own[0] * own[1]
    if height * width > most:
        told = (
            f"size {text} has {height * width} pixels; at most {most} are drawn, {own[1]}x{own[0]} is this model's own"
        )
        raise RequestError(400, told, "size", "too_large")
    return height, width


def answer_of(samples: list[Sample], pictures: list[Image.Image]) -> dict:
    """OpenAI's answer, with each picture's seed beside it."""
    data = [
        {"b64_json": base64.b64encode(encode_picture(picture)).decode(), "seed": sample.seed}
        for sample, picture in zip(samples, pictures, strict=True)
    ]
    width, height = pictures[0].size
    return {
        "created": int(time.time()),
        "data": data,
        "size": f"{width}x{height}",
        "output_format": "png",
        "steps": samples[0].steps,
    }
