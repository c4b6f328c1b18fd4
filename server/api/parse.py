"""From the bytes of a request to a validated body, or an error that names the parameter."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from nybble.server.api.body import Body
from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError

logger = logging.getLogger(__name__)

BodyT = TypeVar("BodyT", bound=Body)

# How long a client may take to send a body.
_READ_SECONDS = 60
_LARGE_BODY = 64 << 10
_LARGE_PLACES = 16
# Unknown fields of one request that are left out, and of all whose names are logged.
_MAX_LEFT_OUT = 64
_MAX_NAMES = 1000


class LargeBodies:
    """So many are read at a time, and one parsed: a small list takes 30 times its text's memory."""

    def __init__(self) -> None:
        self.taken = 0
        self.parser = ThreadPoolExecutor(1, thread_name_prefix="nybble-parse")


LARGE_BODIES = web.AppKey("large_bodies", LargeBodies)


class UnknownFields:
    """What is made of fields that are not known.

    refuse: an error. warn, ignore: they are left out, and with ``warn`` each name is logged once.
    """

    def __init__(self, policy: Literal["refuse", "warn", "ignore"] = "refuse") -> None:
        self.refused = policy == "refuse"
        self._warns = policy == "warn"
        self._seen: set[str] = set()

    def leave_out(self, name: str) -> None:
        """Tell of a field that is left out."""
        if self._warns and name not in self._seen and len(self._seen) < _MAX_NAMES:
            self._seen.add(name)
            logger.warning("requests have a field that is not known, and left out: %s", name)


UNKNOWN_FIELDS = web.AppKey("unknown_fields", UnknownFields)
_REFUSE = UnknownFields()


async def read_body(request: web.Request, kind: type[BodyT]) -> BodyT:
    """Raises ApiError: 400 for what is not JSON or not valid, 408 for a body that does not come,
    503 where many large ones are being read."""
    unknown = request.app.get(UNKNOWN_FIELDS, _REFUSE)
    size = request.content_length
    if size is not None and size <= _LARGE_BODY:
        return parse_body(await _read(request), kind, unknown)
    large = request.app[LARGE_BODIES]
    if large.taken >= _LARGE_PLACES:
        raise ApiError(
            503,
            "many large requests are being read",
            code="overloaded",
            retry_after=retry_after.BUSY,
        )
    large.taken += 1
    try:
        data = await _read(request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(large.parser, parse_body, data, kind, unknown)
    finally:
        large.taken -= 1


async def _read(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_READ_SECONDS):
            return await request.read()
    except web.RequestPayloadError as error:
        request.content.feed_eof()  # there is no rest that could be read
        raise ApiError(
            400,
            "the body is not what its Content-Encoding or Transfer-Encoding says: "
            f"{str(error) or type(error).__name__}",
            code="invalid_encoding",
            close=True,
        ) from None
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_READ_SECONDS} seconds") from None


def parse_body(data: bytes, kind: type[BodyT], unknown: UnknownFields = _REFUSE) -> BodyT:
    """Raises ApiError 400."""
    try:
        # Refuses NaN, invalid UTF-8, lone surrogates, deep nesting and endless digits.
        body = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    for _ in range(1 if unknown.refused else _MAX_LEFT_OUT):
        try:
            return kind.model_validate(body)
        except ValidationError as invalid:
            found = _deepest(invalid, body)
        if unknown.refused or found["type"] != "extra_forbidden":
            raise _api_error(found, body)
        path = _path(found, body)
        unknown.leave_out(_join(path))
        _leave_out(body, path)
    raise ApiError(400, f"more than {_MAX_LEFT_OUT} fields are not known", code="unknown_parameter")


def _leave_out(body: Any, path: list[str | int]) -> None:
    *outer, last = path
    for key in outer:
        body = body[key]
    del body[last]


def _deepest(invalid: ValidationError, body: dict[str, Any]) -> ErrorDetails:
    """The error that lies deepest: of a union's branches, the one the value was meant for.

    A wrong value goes before a missing one, which may be missing because of it.
    """
    errors = invalid.errors(include_url=False, include_input=False)
    return max(errors, key=lambda error: (len(_path(error, body)), error["type"] != "missing"))


def _api_error(error: ErrorDetails, body: dict[str, Any]) -> ApiError:
    kind, path = error["type"], _path(error, body)
    param = _join(path)
    if kind == "missing":
        message, code = f"missing required parameter: {param}", "missing_required_parameter"
    elif kind == "extra_forbidden":
        message, code = f"unknown parameter: {param}", "unknown_parameter"
    elif kind == "unsupported_parameter":
        message, code = error["msg"], "unsupported_parameter"
    else:
        message, code = f"{param}: {error['msg']}" if param else error["msg"], "invalid_value"
    return ApiError(400, message, param=param or None, code=code)


def _path(error: ErrorDetails, body: Any) -> list[str | int]:
    """An error's place in the body, without the names of union branches pydantic puts into it."""
    path: list[str | int] = []
    node = body
    for key in error["loc"]:
        missing = error["type"] == "missing" and key == error["loc"][-1]
        if _has(node, key):
            node = node[key]
        elif not missing:
            continue
        path.append(key)
    named = error.get("ctx", {}).get("param")
    return path if named is None else [*path, named]


def _has(node: Any, key: str | int) -> bool:
    if isinstance(node, list):
        return isinstance(key, int) and key < len(node)
    return isinstance(node, dict) and key in node


def _join(path: list[str | int]) -> str:
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}"
    return text.removeprefix(".")
