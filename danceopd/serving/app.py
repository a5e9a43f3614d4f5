"""The routes: OpenAI's images API, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from jinja2 import Environment
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from danceopd import __version__
from danceopd.errors import UserError
from danceopd.inference.generate import Sample, decode_picture, to_fitted
from danceopd.serving.errors import RequestError
from danceopd.serving.guard import BodyTooLarge, Guard
from danceopd.serving.metrics import CONTENT_TYPE, Metrics
from danceopd.serving.schema import Generation, Limits, answer_of, edit_form, generation_body, samples_of
from danceopd.serving.worker import Served, Worker

log = logging.getLogger(__name__)
VERSION = "X-Model-Version"  # of an answer: the registered version that drew it
IMAGE_FIELDS = ("image", "image[]")
DECODERS = 2  # uploads that are decoded at once
PATIENCE = 1.0  # seconds between looks at whether a client is still there


def build_app(
    worker: Worker, metrics: Metrics, name: str, limits: Limits, key: str | None, hosts: list[str] | None = None
) -> FastAPI:
    """The ASGI app.

    Args:
        worker: draws; started by who serves.
        metrics: the worker's too.
        name: of the model, for `GET /v1/models`.
        limits: of one request.
        key: bearer key that `/v1/...` asks for; None: no key.
        hosts: names the server answers to, against pages that rebind theirs to this machine; None: any.
    """
    app = FastAPI(title=f"{name}, by danceopd", version=__version__, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_images(app, worker, name, limits)
    _add_watching(app, worker, metrics)
    _add_page(app, worker, name, limits, key is not None)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(Guard, key=key, max_bytes=limits.max_bytes, metrics=metrics, refuse=_refuse)
    return app


# -------------------------------------------------------------------------------------------------------------- errors


def _answer(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    await _answer(error)(scope, receive, send)


def _field_error(errors: Sequence[Any]) -> RequestError:
    """The first of pydantic's complaints."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON ({first.get('ctx', {}).get('error', first['msg'])})")
    if first["type"] == "extra_forbidden":
        return RequestError(400, f"unknown parameter: {param!r}", param, "unknown_parameter")
    if first["type"] == "value_error":  # our own words
        return RequestError(400, str(first["ctx"]["error"]), param, "invalid_value")
    given = "" if first["type"] == "missing" or "input" not in first else f", got {str(first['input'])[:80]!r}"
    return RequestError(400, f"{param or 'body'}: {first['msg']}{given}", param, first["type"])


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def misread(_: Request, error: RequestValidationError) -> JSONResponse:
        return _answer(_field_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, BodyTooLarge):
            return _answer(error.error)
        told = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        return _answer(RequestError(error.status_code, told.get(error.status_code, str(error.detail))))


# -------------------------------------------------------------------------------------------------------------- images


def _add_images(app: FastAPI, worker: Worker, name: str, limits: Limits) -> None:
    decoding = asyncio.Semaphore(DECODERS)

    @app.post("/v1/images/generations", openapi_extra=generation_body())
    async def generations(request: Request, response: Response) -> dict:
        """Draw pictures from a prompt."""
        asked = await _read_json(request)
        served = worker.admit()
        _name_version(response, served)
        return await _draw(request, worker, served, samples_of(asked, 0, served.drawer, name, limits))

    @app.post("/v1/images/edits", openapi_extra=edit_form())
    async def edits(request: Request, response: Response) -> dict:
        """Edit one or more source images: a multipart form with `image` (or `image[]`, repeatable) and `prompt`."""
        served = worker.admit()  # before an upload is read
        _name_version(response, served)
        asked, uploads = await _read_form(request, limits)
        samples = samples_of(asked, len(uploads), served.drawer, name, limits)
        size = samples[0].size
        assert size is not None  # `samples_of` gives every sample its size
        async with decoding:
            sources = await asyncio.to_thread(_decode, uploads, size, limits)
        return await _draw(request, worker, served, [replace(sample, sources=sources) for sample in samples])

    @app.get("/v1/models")
    def models() -> dict:
        """The one model that is served."""
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "danceopd"}]}


def _media_type(request: Request) -> str:
    """What a body says that it is, without parameters; letters of either size are one."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_json(request: Request) -> Generation:
    """A body that says it is JSON, or says nothing."""
    kind = _media_type(request)
    if kind and kind != "application/json":
        raise RequestError(415, "send application/json with a prompt", None, "unsupported_media_type")
    try:
        return Generation.model_validate(json.loads(await request.body()))
    except ValidationError as error:
        raise _field_error(error.errors()) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON ({' '.join(str(error).split())[:80]})") from error


def _name_version(response: Response, served: Served) -> None:
    if served.version:
        response.headers[VERSION] = served.version


async def _read_form(request: Request, limits: Limits) -> tuple[Generation, list[bytes]]:
    if _media_type(request) != "multipart/form-data":
        raise RequestError(415, "send a multipart/form-data form with image and prompt", None, "unsupported_media_type")
    fields, uploads = {}, []
    async with request.form(max_files=limits.max_sources + 1, max_fields=32, max_part_size=200_000) as form:
        for key, value in form.multi_items():
            if key in IMAGE_FIELDS:
                if not isinstance(value, UploadFile):
                    raise RequestError(400, f"{key}: text; upload a picture's bytes", "image", "invalid_image")
                uploads.append(await value.read())
            elif isinstance(value, UploadFile):
                told = (
                    "masks are not supported; say in the prompt what to change" if key == "mask" else "not a file field"
                )
                raise RequestError(400, f"{key}: {told}", key, "unknown_parameter")
            elif key in fields:
                raise RequestError(400, f"{key}: given twice", key, "repeated_parameter")
            else:
                fields[key] = value
    if not uploads:
        raise RequestError(400, "image: missing; upload the picture to edit", "image", "missing")
    if len(uploads) > limits.max_sources:
        raise RequestError(400, f"at most {limits.max_sources} source images", "image", "too_many")
    if fields.get("stream") == "false":  # a form knows no booleans
        del fields["stream"]
    try:
        return Generation.model_validate({k: v for k, v in fields.items() if v != ""}), uploads
    except ValidationError as error:
        raise _field_error(error.errors()) from error


def _decode(uploads: list[bytes], size: tuple[int, int], limits: Limits) -> tuple[Image.Image, ...]:
    """Source images at the picture's size, so that what waits in the queue is small."""
    try:
        return tuple(
            to_fitted(decode_picture(data, f"image {number}", limits.max_source_pixels), *size)
            for number, data in enumerate(uploads, start=1)
        )
    except UserError as error:
        raise RequestError(400, str(error), "image", "invalid_image") from error


async def _draw(request: Request, worker: Worker, served: Served, samples: list[Sample]) -> dict:
    """Wait for the worker; a client that went away frees its place in the queue."""
    job = worker.submit(samples, served)
    waiting = asyncio.wrap_future(job.answer)
    while not waiting.done():
        await asyncio.wait({waiting}, timeout=PATIENCE)
        if not waiting.done() and await request.is_disconnected() and worker.withdraw(job):
            raise RequestError(499, "the client went away")
    try:
        pictures = waiting.result()
    except RequestError:
        raise
    except UserError as error:
        raise RequestError(400, str(error)) from error
    except Exception as error:
        log.exception("drawing failed")
        raise RequestError(500, "the server failed to draw this; its log says why", None, "internal_error") from error
    return await asyncio.to_thread(answer_of, samples, pictures)


# ------------------------------------------------------------------------------------------------------ watching, page


def _add_watching(app: FastAPI, worker: Worker, metrics: Metrics) -> None:
    @app.get("/healthz")
    def healthz() -> PlainTextResponse:
        """Whether the process answers."""
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    def readyz() -> PlainTextResponse:
        """Whether the model is loaded and takes requests."""
        return PlainTextResponse("ready\n") if worker.ready else PlainTextResponse("not ready\n", 503)

    @app.get("/metrics")
    def figures() -> Response:
        """Figures in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI, worker: Worker, name: str, limits: Limits, needs_key: bool) -> None:
    source = resources.files("danceopd.serving").joinpath("page.html.j2").read_text()
    template = Environment(autoescape=True).from_string(source)

    @app.get("/", response_class=HTMLResponse)
    def page() -> HTMLResponse:
        """A page to try the model in the browser; it loads nothing from elsewhere."""
        nonce, served = secrets.token_urlsafe(16), worker.served
        facts: dict = {"edits": True, "size": "", "sources": limits.max_sources, "steps": limits.steps or 8}
        if served is not None:
            drawer = served.drawer
            most = drawer.field.backbone.most_sources
            facts = {
                "edits": most != 0,
                "size": f"{drawer.settings.width}x{drawer.settings.height}",
                "steps": limits.steps or drawer.sampling.steps,
                "sources": limits.max_sources if most is None else min(most, limits.max_sources),
            }
        text = template.render(name=name, nonce=nonce, limits=limits, needs_key=needs_key, version=__version__, **facts)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(text, headers=headers)
