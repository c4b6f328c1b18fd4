"""``/v1/files``: upload, list, retrieve, download, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import PurePath

from aiohttp import web

from nybble.server.api.respond import json_response
from nybble.server.files.access import Access
from nybble.server.files.files import Files, StoredFile, Upload
from nybble.server.files.paging import Page
from nybble.server.http import form_parts
from nybble.server.http.errors import ApiError, without_surrogates

FILES = "/v1/files"
_MAX_NAME = 255


class FileRoutes:
    def __init__(
        self, files: Files, access: Access, users: Sequence[Callable[[str], str | None]]
    ) -> None:
        """users: each says what unfinished work uses the file of an id, if any does."""
        self._files = files
        self._access = access
        self._users = users

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(FILES, self.upload),
            web.get(FILES, self.list),
            web.get(FILES + "/{id}", self.retrieve),
            web.get(FILES + "/{id}/content", self.content),
            web.delete(FILES + "/{id}", self.delete),
        ]

    async def upload(self, request: web.Request) -> web.Response:
        caller = self._access.caller(request)
        purposes = self._files.purposes
        if purposes == {"fine-tune"}:
            caller.require_fine_tuning()  # before anything is read
        with self._files.upload(caller.owner) as upload:
            purpose, filename = await _read_form(request, upload)
            if filename is None:
                raise _missing("file")
            if purpose is None:
                raise _missing("purpose")
            if purpose not in purposes:
                raise ApiError(
                    400,
                    f"purpose is {purpose!r}, expected {' or '.join(map(repr, purposes))}",
                    param="purpose",
                    code="invalid_value",
                )
            if purpose == "fine-tune":
                caller.require_fine_tuning()
            file = await asyncio.to_thread(
                self._files.add, upload, filename=filename, purpose=purpose, owner=caller.owner
            )
        return json_response(file.body())

    async def list(self, request: web.Request) -> web.Response:
        owner = self._access.caller(request).sees
        page = Page.of(request, default=10_000, most=10_000, others=("purpose", "order"))
        purpose = request.query.get("purpose")
        files = await asyncio.to_thread(self._files.page, owner, purpose, page)
        return json_response(page.body(files, StoredFile.body))

    async def retrieve(self, request: web.Request) -> web.Response:
        return json_response((await self._file(request)).body())

    async def content(self, request: web.Request) -> web.FileResponse:
        file = await self._file(request)
        return web.FileResponse(
            self._files.path(file.id), headers={"Content-Type": "application/octet-stream"}
        )

    async def delete(self, request: web.Request) -> web.Response:
        file = await self._file(request)
        for user_of in self._users:
            if (user := await asyncio.to_thread(user_of, file.id)) is not None:
                raise ApiError(
                    409,
                    f"the file is used by {user}: cancel it first",
                    param="file_id",
                    code="file_in_use",
                )
        await asyncio.to_thread(self._files.delete, file)
        return json_response({"id": file.id, "object": "file", "deleted": True})

    async def _file(self, request: web.Request) -> StoredFile:
        owner = self._access.caller(request).sees
        return await asyncio.to_thread(self._files.get, request.match_info["id"], owner)


async def _read_form(request: web.Request, upload: Upload) -> tuple[str | None, str | None]:
    """The purpose and the file's name, each None if it is not there; its bytes go to ``upload``."""
    purpose = filename = None
    async for part in form_parts.parts(request, ("purpose", "file")):
        if part.name == "purpose":
            purpose = await form_parts.text(part)
        elif filename is not None:
            raise ApiError(400, "expected one file", param="file", code="invalid_value")
        else:
            # The name is only shown, never a path here; some clients send theirs whole.
            given = without_surrogates(part.filename or "file")
            filename = PurePath(given.replace("\\", "/")).name[-_MAX_NAME:]
            async for chunk in form_parts.chunks(part):
                await asyncio.to_thread(upload.write, chunk)
    return purpose, filename


def _missing(param: str) -> ApiError:
    message = f"missing required parameter: {param}"
    return ApiError(400, message, param=param, code="missing_required_parameter")
