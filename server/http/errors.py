"""Every failure as OpenAI's clients expect it: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import errno
import logging
import sqlite3
from typing import Any

from aiohttp import web
from pydantic_core import to_json

from nybble.engine import (
    AdapterConflictError,
    AdapterError,
    AdapterReplacedError,
    AdapterUnavailableError,
    ContextLengthError,
    DisallowedTokenError,
    EngineFailedError,
    EngineOverloadedError,
    EngineStoppedError,
    GuideError,
    NotANumberError,
    NothingAllowedError,
    OutOfMemoryError,
    ParameterError,
    UnknownAdapterError,
)
from nybble.server.http import retry_after
from nybble.server.lifecycle.flag_names import in_flags
from nybble.server.observability.logs import LogEvent

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = _TYPES | {
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}
_MAX_MESSAGE = 500
# EFBIG: a file-size limit of the process or of the file system.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_PARAM = 100


class ApiError(Exception):
    """An error response.

    param: the request's parameter at fault.
    code: a stable name for programs.
    retry_after: for the Retry-After header, in seconds.
    allow: the allowed methods, for a 405.
    close: whether the connection must be closed after the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
        close: bool = False,
    ) -> None:
        # The message may quote the request: make it one line of bounded length.
        message = without_surrogates(" ".join(message.split())[:_MAX_MESSAGE])
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = None if param is None else without_surrogates(param[:_MAX_PARAM])
        self.code = code
        self.retry_after = retry_after
        self.allow = allow
        self.close = close

    @property
    def cause(self) -> str:
        """The value of the metrics' ``cause`` label, one of a few."""
        return self.code or f"http_{self.status}"

    def about(self, param: str) -> ApiError:
        """The same error, with the parameter that is at fault if the request is."""
        return ApiError(
            self.status,
            self.message,
            param=param if self.status < 500 else None,
            code=self.code,
            retry_after=self.retry_after,
        )

    def body(self) -> dict[str, Any]:
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic_body(self) -> dict[str, Any]:
        """As the clients of /v1/messages expect it."""
        fallback = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(self.status, fallback)
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, *, anthropic: bool = False) -> web.Response:
        """anthropic: whether the body has Anthropic's shape."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        response = web.Response(
            status=self.status,
            body=to_json(self.anthropic_body() if anthropic else self.body()),
            content_type="application/json",
            headers=headers,
        )
        if self.close:
            response.force_close()
        return response


def without_surrogates(text: str) -> str:
    """The text, with ``?`` in place of what Python makes of invalid UTF-8 in headers, which can be
    written nowhere."""
    return text.encode(errors="replace").decode()


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """The response for ``error``; an unexpected error is logged and becomes a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), param=error.parameter, code="context_length_exceeded")
    if isinstance(error, UnknownAdapterError):  # unloaded since the request's names were looked at
        return ApiError(404, str(error), param=error.parameter, code="model_not_found")
    if isinstance(error, ParameterError):
        return ApiError(400, in_flags(error), param=error.parameter, code="invalid_value")
    if isinstance(error, GuideError):
        return ApiError(400, str(error), param=error.parameter, code="guide_failed")
    if isinstance(error, DisallowedTokenError):
        return ApiError(500, str(error), code="guide_not_followed")
    if isinstance(error, NothingAllowedError):
        return ApiError(400, str(error), code="nothing_allowed")
    if isinstance(error, NotANumberError):
        return ApiError(500, str(error), code="not_a_number")
    if isinstance(error, AdapterConflictError):
        return ApiError(409, str(error), param="expected_version", code="version_conflict")
    if isinstance(error, AdapterError):
        return ApiError(400, in_flags(error), param="lora_path", code="invalid_adapter")
    if isinstance(error, AdapterUnavailableError):
        return ApiError(503, str(error), code="adapter_unavailable")
    if isinstance(error, AdapterReplacedError):  # clients try again after a 5xx by themselves
        return ApiError(503, str(error), code="adapter_replaced")
    if isinstance(error, EngineOverloadedError):
        return ApiError(429, str(error), code="overloaded", retry_after=retry_after.BUSY)
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, str(error), code="out_of_memory", retry_after=retry_after.BUSY)
    if isinstance(error, EngineFailedError):
        return ApiError(500, str(error), code="engine_failed")
    if isinstance(error, EngineStoppedError):
        return ApiError(
            503, str(error), code="engine_unavailable", retry_after=retry_after.UNAVAILABLE
        )
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return ApiError(413, "the request body is too large", code="request_too_large")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return ApiError(
            405,
            f"{error.method} is not allowed here, only {allowed}",
            code="method_not_allowed",
            allow=allowed,
        )
    if isinstance(error, web.HTTPNotFound):
        return ApiError(404, "there is nothing at this path", code="not_found")
    if isinstance(error, web.HTTPException):
        return ApiError(error.status, error.reason)
    if is_full_disk(error):
        logger.error(LogEvent(f"the disk is full: {error}", {"request_id": request_id}))
        return ApiError(507, "the server's disk is full", code="disk_full")
    logger.error(LogEvent("a request failed", {"request_id": request_id}), exc_info=error)
    return ApiError(500, "internal error: the server's log has the details", code="internal_error")


def is_full_disk(error: Exception) -> bool:
    """Whether a file or a database could not grow."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in _DISK_FULL
