"""The form of an upload, read part by part to disk."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from aiohttp import BodyPartReader, web

from nybble.loaders.adapter import OWN_FILES
from nybble.server.adapters.archive import (
    CONFIG,
    MAX_BYTES,
    WEIGHTS,
    ArchiveError,
    extract_adapter,
)
from nybble.server.adapters.names import require_name
from nybble.server.http import form_parts
from nybble.server.http.errors import ApiError

_ARCHIVE = "archive"
_FIELDS = ("lora_name", "load_inplace", "expected_version")


@dataclass(frozen=True)
class AdapterForm:
    name: str
    replace: bool
    expected: str | None


async def read_adapter_form(request: web.Request, folder: Path) -> AdapterForm:
    """Write the adapter's files to ``folder``, which holds nothing else afterwards.

    Raises ArchiveError and ApiError for what is missing, unknown, unsafe or too large.
    """
    fields: dict[str, str] = {}
    async for part in form_parts.parts(request, (*_FIELDS, "file")):
        if part.name == "file":
            await _receive(part, folder)
        else:
            fields[str(part.name)] = await form_parts.text(part)
    adapter = _checked(fields)
    archive = folder / _ARCHIVE
    if archive.exists():
        if any((folder / name).exists() for name in MAX_BYTES):
            raise ArchiveError("expected an archive or the files themselves, not both")
        await asyncio.to_thread(extract_adapter, archive, folder)
        archive.unlink()
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).exists():
            raise ApiError(400, f"{file} is missing", param="file", code="missing_file")
    return adapter


def _checked(fields: dict[str, str]) -> AdapterForm:
    name = fields.get("lora_name")
    if name is None:
        message = "missing required parameter: lora_name"
        raise ApiError(400, message, param="lora_name", code="missing_required_parameter")
    try:
        require_name(name)
    except ValueError as error:
        raise ApiError(400, str(error), param="lora_name", code="invalid_value") from None
    inplace = fields.get("load_inplace", "false").lower()
    if inplace not in ("true", "false"):
        raise ApiError(
            400,
            f"load_inplace is {inplace!r}, expected true or false",
            param="load_inplace",
            code="invalid_value",
        )
    return AdapterForm(name, inplace == "true", fields.get("expected_version"))


async def _receive(part: BodyPartReader, folder: Path) -> None:
    given = PurePosixPath((part.filename or "").replace("\\", "/")).name
    if given in MAX_BYTES:
        name = given
    elif given.endswith((".zip", ".tar", ".tar.gz", ".tgz")):
        name = _ARCHIVE
    else:
        raise ApiError(
            400,
            f"file {given!r}: expected {CONFIG}, {WEIGHTS}, or a .zip, .tar or .tar.gz with both; "
            f"beside them an adapter may have {', '.join(OWN_FILES)}",
            param="file",
            code="invalid_value",
        )
    left = most = MAX_BYTES.get(name, sum(MAX_BYTES.values()))
    try:
        with (folder / name).open("xb") as target:
            async for chunk in form_parts.chunks(part):
                left -= len(chunk)
                if left < 0:
                    raise ApiError(
                        413, f"{given} is larger than {most} bytes", code="request_too_large"
                    )
                await asyncio.to_thread(target.write, chunk)
    except FileExistsError:
        raise ArchiveError(f"{given} was sent twice") from None
