"""From the bytes of a request to a validated body, or an error that names the parameter."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from nybble.server.api.body import Body
from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError

logger = logging.getLogger(__name__)

T = TypeVar("T")
BodyT = TypeVar("BodyT", bound=Body)

# How long a client may take to send a body, in seconds.
_READ_SECONDS = 60
_LARGE_BODY = 64 << 10
_LARGE_PLACES = 16
# The most values in a body. All of Python waits while JSON is read, which these take long. They are
# counted by their marks, those in texts too: what: (marks, most).
_MOST = {
    "objects and lists": (b"{[", 1 << 19),
    "fields": (b":", 1 << 19),
    "values": (b",", 1 << 21),
}
# The most names of unknown fields that are logged.
_MAX_NAMES = 1000


class LargeBodies:
    """Bounds the large bodies read at a time, and parses one at a time.

    A parsed list of small values takes 30 times the memory of its text.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.parser = ThreadPoolExecutor(1, thread_name_prefix="nybble-parse")


LARGE_BODIES = web.AppKey("large_bodies", LargeBodies)


class UnknownFields:
    """How unknown fields of a request are handled.

    ``refuse`` makes them an error. ``warn`` and ``ignore`` drop them; ``warn`` also logs each name
    once for each kind of object.
    """

    def __init__(self, policy: Literal["refuse", "warn", "ignore"] = "refuse") -> None:
        self.refused = policy == "refuse"
        self._warns = policy == "warn"
        self._seen: set[tuple[str, str]] = set()

    def leave_out(self, kind: type[Body], name: str) -> None:
        """Log a dropped field, if the policy says so."""
        field = (kind.__name__, name)
        if self._warns and field not in self._seen and len(self._seen) < _MAX_NAMES:
            self._seen.add(field)
            logger.warning(
                "requests have a field that is not known, and left out: %s (of %s)",
                name,
                kind.__name__,
            )


UNKNOWN_FIELDS = web.AppKey("unknown_fields", UnknownFields)
_REFUSE = UnknownFields()


async def read_body(request: web.Request, kind: type[BodyT]) -> BodyT:
    """The validated body of a request.

    Raises ApiError 400 if it is not JSON or not valid, 408 if it does not arrive in time, and 503
    if too many large bodies are being read.
    """
    unknown = request.app.get(UNKNOWN_FIELDS, _REFUSE)
    size = request.content_length
    if "Content-Encoding" in request.headers:
        size = None  # it is that of the compressed body
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
        return await _parsed(request, data, lambda: parse_body(data, kind, unknown))
    finally:
        large.taken -= 1


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body of a request, which another reader will validate. Raises ApiError 400 and 408."""
    data = await _read(request)
    return await _parsed(request, data, lambda: _object(data))


async def _parsed(request: web.Request, data: bytes, parse: Callable[[], T]) -> T:
    """What ``parse`` makes of ``data``: on another thread if that is large."""
    if len(data) <= _LARGE_BODY:
        return parse()
    parser = request.app[LARGE_BODIES].parser
    return await asyncio.get_running_loop().run_in_executor(parser, _uncollected, parse)


def _uncollected(parse: Callable[[], T]) -> T:
    """``parse`` without looks for garbage: each goes through all that was made, with Python
    waiting, and what a body is parsed to is no garbage or goes at once."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return parse()
    except ApiError as error:
        # Its frames hold the body, which would be looked through once more.
        raise error.with_traceback(None) from None
    finally:
        if was_enabled:
            gc.enable()


async def _read(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_READ_SECONDS):
            return await request.read()
    except web.RequestPayloadError as error:
        request.content.feed_eof()  # so that nothing waits for the rest
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
    """Parse and validate a body. Raises ApiError 400 naming the parameter at fault."""
    return validated(_object(data), kind, unknown)


def validated(body: dict[str, Any], kind: type[BodyT], unknown: UnknownFields = _REFUSE) -> BodyT:
    """Validate a body, whose unknown fields may be left out. Raises ApiError 400."""
    return converted(kind, body, None if unknown.refused else unknown.leave_out)


def _object(data: bytes) -> dict[str, Any]:
    for what, (marks, most) in _MOST.items():
        if len(data) > most and (count := sum(map(data.count, marks))) > most:
            raise ApiError(
                400,
                f"the body has too many {what}: {count} of {' '.join(marks.decode())} (those in "
                f"texts are counted too), expected at most {most}",
                code="invalid_value",
            )
    try:
        # This parser refuses NaN, invalid UTF-8, lone surrogates, deep nesting and huge numbers. To
        # look for texts that are alike takes more time than it saves if there are many.
        body = from_json(data, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


def converted(
    kind: type[BodyT],
    given: dict[str, Any],
    leave_out: Callable[[type[Body], str], None] | None = None,
) -> BodyT:
    """Another endpoint's body, made from the fields of a valid one. Raises ApiError 400.

    leave_out: what to do with unknown fields, as :class:`Body` says.
    """
    try:
        return kind.model_validate(given, context=leave_out)
    except ValidationError as invalid:
        found = _deepest(invalid, given)
    raise _api_error(found, given)  # here, so that nothing of the body stays with the error


def _deepest(invalid: ValidationError, body: dict[str, Any]) -> ErrorDetails:
    """The most deeply nested error: in a union, it belongs to the branch that was meant.

    A wrong value is preferred to a missing one, which may be missing because of it, and to a wrong
    type, which other branches have because another one was meant. If no branch has the type, all
    types are named.
    """
    errors = invalid.errors(include_url=False, include_input=False)

    def rank(error: ErrorDetails) -> tuple[int, bool, bool]:
        wrong_type = error["type"].endswith("_type")
        return len(_path(error, body)), error["type"] != "missing", not wrong_type

    found = max(errors, key=rank)
    if found["type"].endswith("_type"):
        path = _path(found, body)
        alike = (e for e in errors if e["type"].endswith("_type") and _path(e, body) == path)
        types = dict.fromkeys(_type_named(each) for each in alike)
        found["msg"] = f"expected {' or '.join(types)}"
    return found


_TYPES = {
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}


def _type_named(error: ErrorDetails) -> str:
    known = _TYPES.get(error["type"])
    return known or error["msg"].removeprefix("Input should be ")


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
        text = _in_plain_words(error)
        said = f"{param} {text}" if kind == "too_many" else f"{param}: {text}"
        message, code = said if param else text, "invalid_value"
    return ApiError(400, message, param=param or None, code=code)


def _in_plain_words(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    length = context.get("actual_length")
    if "min_length" in context and error["type"] == "too_short":
        return f"expected at least {context['min_length']}, but there are {length or 'none'}"
    if "max_length" in context and error["type"] == "too_long":
        there = "more" if length is None else length
        return f"expected at most {context['max_length']}, but there are {there}"
    return error["msg"].removeprefix("Value error, ")


def _path(error: ErrorDetails, body: Any) -> list[str | int]:
    """Path of an error in the body, without the names of union branches that pydantic adds."""
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
