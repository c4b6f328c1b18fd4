"""From the bytes of a request to a validated body, or an error that names the parameter."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from nybble.server.api.schema import Body
from nybble.server.http.errors import ApiError

BodyT = TypeVar("BodyT", bound=Body)

# How long a client may take to send a body.
_READ_SECONDS = 60
_LARGE_BODY = 64 << 10
_LARGE_PLACES = 16
_RETRY_AFTER_SECONDS = 5


class LargeBodies:
    """So many are read at a time, and one parsed: a small list takes 30 times its text's memory."""

    def __init__(self) -> None:
        self.taken = 0
        self.parser = ThreadPoolExecutor(1, thread_name_prefix="nybble-parse")


LARGE_BODIES = web.AppKey("large_bodies", LargeBodies)


async def read_body(request: web.Request, kind: type[BodyT]) -> BodyT:
    """Raises ApiError: 400 for what is not JSON or not valid, 408 for a body that does not come,
    503 where many large ones are being read."""
    size = request.content_length
    if size is not None and size <= _LARGE_BODY:
        return parse_body(await _read(request), kind)
    large = request.app[LARGE_BODIES]
    if large.taken >= _LARGE_PLACES:
        raise ApiError(
            503,
            "many large requests are being read",
            code="overloaded",
            retry_after=_RETRY_AFTER_SECONDS,
        )
    large.taken += 1
    try:
        data = await _read(request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(large.parser, parse_body, data, kind)
    finally:
        large.taken -= 1


async def _read(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_READ_SECONDS):
            return await request.read()
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_READ_SECONDS} seconds") from None


def parse_body(data: bytes, kind: type[BodyT]) -> BodyT:
    """Raises ApiError 400."""
    try:
        # Refuses NaN, invalid UTF-8, lone surrogates, deep nesting and endless digits.
        body = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(body)
    except ValidationError as invalid:
        raise _api_error(invalid, body) from None


def _api_error(invalid: ValidationError, body: dict[str, Any]) -> ApiError:
    """The error that lies deepest: of a union's branches, the one the value was meant for.

    A wrong value goes before a missing one, which may be missing because of it.
    """
    errors = invalid.errors(include_url=False, include_input=False)
    error = max(errors, key=lambda error: (len(_path(error, body)), error["type"] != "missing"))
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
