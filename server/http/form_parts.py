"""The parts of a multipart form, read with a time limit for every piece."""

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
    """The parts of a request's form.

    known: the allowed names of parts.

    Raises ApiError 400 for another name and for a body that is not a form. This and the functions
    below raise 408 if nothing arrives for a minute.
    """
    if request.content_type != "multipart/form-data":
        raise ApiError(400, f"expected multipart/form-data, of parts named {', '.join(known)}")
    form = await _read(request.multipart())
    while (part := await _read(form.next())) is not None:
        name = getattr(part, "name", None) or "a part without a name"
        if not isinstance(part, BodyPartReader) or name not in known:
            raise ApiError(400, f"unknown parameter: {name}", param=name, code="unknown_parameter")
        yield part


async def chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    """A file's bytes as they arrive."""
    while chunk := await _read(part.read_chunk(_CHUNK_BYTES)):
        yield chunk


async def text(part: BodyPartReader) -> str:
    """A text field's value. Raises ApiError 400 beyond 1,024 bytes."""
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
