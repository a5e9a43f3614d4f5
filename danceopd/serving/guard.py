"""What stands before the routes: who may ask, how much of a body is read, and how each request went."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danceopd.serving.errors import RequestError, too_large
from danceopd.serving.metrics import Metrics

log = logging.getLogger(__name__)
KNOWN = {
    "/v1/images/generations": "generations",
    "/v1/images/edits": "edits",
    "/v1/models": "models",
    "/healthz": "healthz",
    "/readyz": "readyz",
    "/metrics": "metrics",
    "/": "page",
}


class BodyTooLarge(HTTPException):
    """Raised while a body is read; FastAPI lets this kind through from where it parses."""

    def __init__(self, limit: int):
        super().__init__(413)
        self.error = too_large(limit)


Refuse = Callable[[RequestError, Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware around the whole app.

    Args:
        app: what it guards.
        key: bearer key that `/v1/...` asks for; None: no key.
        max_bytes: of a request's body, counted while it is read.
        metrics: told of every answer.
        refuse: answers a refused request: (error, scope, receive, send).
    """

    def __init__(self, app: ASGIApp, key: str | None, max_bytes: int, metrics: Metrics, refuse: Refuse):
        self.app, self.key, self.max_bytes, self.metrics, self.refuse = app, key, max_bytes, metrics, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, read = time.monotonic(), 500, 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise BodyTooLarge(self.max_bytes)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._objection(scope)
            if error is not None:
                await self.refuse(error, scope, receive, noted)
            else:
                await self.app(scope, counted, noted)
        finally:
            seconds = time.monotonic() - started
            self.metrics.request(KNOWN.get(scope["path"], "other"), status, seconds)
            level = logging.INFO if scope["path"].startswith("/v1/images/") else logging.DEBUG
            log.log(level, "%s %s %d, %.2f s", scope["method"], KNOWN.get(scope["path"], "other"), status, seconds)

    def _objection(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        if scope["path"].startswith("/v1/") and self.key is not None:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
                return RequestError(401, "send this server's key as Authorization: Bearer KEY", None, "invalid_api_key")
        if scope["method"] == "POST" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return RequestError(403, "pages of other sites may not ask this server", None, "cross_site")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_bytes:
            return too_large(self.max_bytes)
        return None
