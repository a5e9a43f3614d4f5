"""What a request is refused with: an HTTP status, and OpenAI's error object as its body."""

from __future__ import annotations


class RequestError(Exception):
    """A request that gets no picture.

    Attributes:
        status: HTTP status.
        param: the field at fault, or None.
        code: short name for programs, or None.
        retry_after: seconds after which to come again, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict:
        """{"error": {"message", "type", "param", "code"}}."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def too_large(limit: int) -> RequestError:
    """For a body of more than `limit` bytes."""
    return RequestError(
        413, f"the request is larger than {limit} bytes; send smaller images", None, "request_too_large"
    )
