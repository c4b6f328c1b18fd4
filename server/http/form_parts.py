"""The parts of a multipart form, every piece of which has to come in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Collection
from typing import TypeVar

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from nybble.server.http.errors import ApiError

T = TypeVar("T")

_STALL_SECONDS = 60
_CHUNK_BYTES = 1 << 20
_MAX_FIELD_BYTES = 1024


async def parts(request: web.Request, known: Collection[str]) -> AsyncIterator[BodyPartReader]:
    """The parts of a request's form, their names among those that are known.

    Raises ApiError 400 for another one and for what is no form, and 408 where nothing comes for a
    minute, as the others here do.
    """
    if request.content_type != "multipart/form-data":
        raise ApiError(400, f"expected multipart/form-data with {' and '.join(known)}")
    form = await _read(request.multipart())
    while (part := await _read(form.next())) is not None:
        name = getattr(part, "name", None) or "a part without a name"
        if not isinstance(part, BodyPartReader) or name not in known:
            raise ApiError(400, f"unknown parameter: {name}", param=name, code="unknown_parameter")
        yield part


async def chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    """A file's bytes as they come."""
    while chunk := await _read(part.read_chunk(_CHUNK_BYTES)):
        yield chunk


async def text(part: BodyPartReader) -> str:
    """A field's value, in how many pieces it may come. Raises ApiError 400 beyond 1,024 bytes."""
    value = b""
    async for chunk in chunks(part):
        value += chunk
        if len(value) > _MAX_FIELD_BYTES:
            raise ApiError(
                400,
                f"{part.name} is longer than {_MAX_FIELD_BYTES} bytes",
                param=part.name,
                code="invalid_value",
            )
    return value.decode(errors="replace")


async def _read(arriving: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_STALL_SECONDS):
            return await arriving
    except TimeoutError:
        raise ApiError(408, f"nothing arrived for {_STALL_SECONDS} seconds") from None
    except (ValueError, AssertionError, HttpProcessingError) as error:  # about the form's syntax
        raise ApiError(400, f"the form cannot be read: {error}") from None
