"""Administration of adapters: load, unload, upload, list.

Request bodies are those of vLLM. Uploads are forms with ``lora_name``, ``load_inplace`` and either
the files adapter_config.json and adapter_model.safetensors, or an archive with both.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from nybble.engine import AdapterError, AdapterInfo, Engine
from nybble.server.adapters.archive import ArchiveError
from nybble.server.adapters.form import AdapterForm, read_adapter_form
from nybble.server.adapters.resolver import AdapterResolver
from nybble.server.adapters.state import AdapterState
from nybble.server.adapters.uploads import AdapterUploads
from nybble.server.api.parse import read_body
from nybble.server.api.respond import json_response
from nybble.server.api.schema import LoadAdapterRequest, UnloadAdapterRequest
from nybble.server.http.errors import ApiError
from nybble.server.tenancy.keys import Keys

logger = logging.getLogger(__name__)

ADMIN_PATHS = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/lora_adapters",
    "/v1/lora_adapters/{name}",
)


class AdapterAdmin:
    """Handlers which require an admin key and load only from below the allowed roots."""

    def __init__(
        self,
        engine: Engine,
        models: tuple[str, ...],
        keys: Keys,
        roots: Sequence[Path],
        state: AdapterState | None,
        resolver: AdapterResolver | None = None,
    ) -> None:
        """Set what is allowed.

        models: names that no adapter may take.
        keys: admin keys; without any, administration gets 403.
        roots: folders to load from; without any, loading gets 403. The first one holds uploads.
        state: remembers loaded adapters for the next start; None to forget them.
        resolver: of adapters in shared places. With a registry, loaded and uploaded adapters are
            written there, and neither the state nor the roots keep them.
        """
        self._resolver = resolver
        self._registered = resolver is not None and resolver.registry is not None
        self._state = state
        self._engine = engine
        self._models = models
        self._keys = keys
        self._roots = [root.resolve() for root in roots]
        self._uploads = AdapterUploads(uploads_folder(roots)) if roots else None

    def routes(self) -> list[web.RouteDef]:
        load, unload, every, one = ADMIN_PATHS
        return [
            web.post(load, self.load),
            web.post(unload, self.unload),
            web.get(every, self.list),
            web.post(every, self.upload),
            web.get(one, self.get),
            web.delete(one, self.delete),
        ]

    async def load(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        body = await read_body(request, LoadAdapterRequest)
        self._require_free(body.lora_name, replace=bool(body.load_inplace))
        info = await asyncio.to_thread(self._load, body)
        return json_response(_body(info))

    def _load(self, body: LoadAdapterRequest) -> AdapterInfo:
        folder = _allowed(body.lora_path, self._roots)
        replace = bool(body.load_inplace)
        if self._resolver is not None and self._registered:
            return self._resolver.publish(body.lora_name, folder, replace=replace)
        info = self._engine.load_adapter(body.lora_name, str(folder), replace=replace)
        uploads, state = self._uploads, self._state
        if uploads is not None and uploads.is_current(body.lora_name, folder):
            uploads.set_unloaded(body.lora_name, False)
            if state is not None:
                state.forget(body.lora_name)  # a restart finds it among the uploads
            return info
        if state is not None:
            state.keep(body.lora_name, str(folder))
        if uploads is not None and not uploads.holds(folder):
            uploads.retire(body.lora_name)  # else a restart would find two of this name
        return info

    async def unload(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        body = await read_body(request, UnloadAdapterRequest)
        if await self._withdrawn(body.lora_name, delete=False):
            return json_response(
                {"object": "lora_adapter", "name": body.lora_name, "unloaded": True}
            )
        if self._state is not None and self._engine.adapter(body.lora_name) is None:
            # Forget an adapter that failed to load at the start too, or every start tries it.
            await asyncio.to_thread(self._state.forget, body.lora_name)
        info = self._find(body.lora_name)
        self._engine.unload_adapter(body.lora_name)
        if self._state is not None:
            await asyncio.to_thread(self._state.forget, body.lora_name)
        if self._uploads is not None:
            await asyncio.to_thread(self._uploads.set_unloaded, body.lora_name, True)
        return json_response(_body(info))

    async def upload(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        uploads = self._uploads
        if uploads is None and not self._registered:
            raise self._no_roots()
        with self._scratch() as scratch:
            try:
                form = await read_adapter_form(request, scratch)
            except ArchiveError as error:
                raise ApiError(400, str(error), param="file", code="invalid_adapter") from None
            self._require_free(form.name, replace=form.replace)
            info = await asyncio.to_thread(self._publish, uploads, form, scratch)
        return json_response(_body(info))

    def _scratch(self) -> AbstractContextManager[Path]:
        """A folder to receive an upload in, which is removed afterwards."""
        if self._uploads is not None:
            return self._uploads.scratch()
        return _temporary_folder()

    def _publish(
        self, uploads: AdapterUploads | None, form: AdapterForm, scratch: Path
    ) -> AdapterInfo:
        if self._resolver is not None and self._registered:
            return self._resolver.publish(form.name, scratch, replace=form.replace)
        assert uploads is not None
        version = uploads.publish(form.name, scratch)
        try:
            info = self._engine.load_adapter(form.name, str(version), replace=form.replace)
        except BaseException:
            uploads.discard(version)
            raise
        uploads.retire(form.name, but=version)
        if self._state is not None:
            self._state.forget(form.name)  # a restart finds it among the uploads
        return info

    async def delete(self, request: web.Request) -> web.Response:
        """Unload an adapter if it is loaded, and remove its files if they were uploaded."""
        self._require_admin(request)
        name, uploads = request.match_info["name"], self._uploads
        if await self._withdrawn(name, delete=True):
            return json_response({"object": "lora_adapter", "name": name, "deleted": True})
        kept = uploads is not None and await asyncio.to_thread(uploads.has, name)
        if not kept or self._engine.adapter(name) is not None:
            self._engine.unload_adapter(self._find(name).name)
        if self._state is not None:
            await asyncio.to_thread(self._state.forget, name)
        if uploads is not None:
            await asyncio.to_thread(uploads.retire, name)
        return json_response({"object": "lora_adapter", "name": name, "deleted": True})

    async def list(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        return json_response(
            {"object": "list", "data": [_body(i) for i in self._engine.adapters()]}
        )

    async def get(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        return json_response(_body(self._find(request.match_info["name"])))

    async def _withdrawn(self, name: str, *, delete: bool) -> bool:
        """Whether a shared place had the name, and no longer has."""
        if self._resolver is None:
            return False
        return await asyncio.to_thread(self._resolver.withdraw, name, delete=delete)

    def _require_free(self, name: str, *, replace: bool) -> None:
        if name in self._models:
            raise ApiError(
                400,
                f"{name!r} is the name of the base model",
                param="lora_name",
                code="invalid_value",
            )
        if not replace and self._engine.adapter(name) is not None:
            raise ApiError(
                400,
                f"adapter {name!r} has already been loaded; load_inplace replaces it",
                param="lora_name",
                code="adapter_exists",
            )

    def _find(self, name: str) -> AdapterInfo:
        info = self._engine.adapter(name)
        if info is None:
            raise ApiError(
                404, f"adapter {name!r} is not loaded", param="lora_name", code="not_found"
            )
        return info

    def _require_admin(self, request: web.Request) -> None:
        if not self._keys:
            raise ApiError(
                403, "this server was started without --admin-key", code="admin_disabled"
            )
        self._keys.require(request)

    def _no_roots(self) -> ApiError:
        return ApiError(403, "this server was started without --lora-root", code="admin_disabled")


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nybble-upload-") as folder:
        yield Path(folder)


def restore(
    engine: Engine, models: Sequence[str], roots: Sequence[Path], state: Path | None
) -> None:
    """Load the adapters that the API had loaded before the restart. Blocks.

    Failures are logged, and tried again at the next start.
    """
    if state is None or not roots:
        return
    allowed = [root.resolve() for root in roots]
    for name, path in AdapterState(state).paths().items():
        if name in models or engine.adapter(name) is not None:
            continue  # the command line takes precedence
        try:
            engine.load_adapter(name, str(_allowed(path, allowed)))
            logger.info("adapter %s is loaded again", name)
        except (ApiError, AdapterError, OSError) as error:
            logger.error("adapter %s cannot be loaded again: %s", name, error)


def restore_uploads(engine: Engine, models: Sequence[str], roots: Sequence[Path]) -> None:
    """Load earlier uploads whose names are free and which still fit. Blocks."""
    if not roots:
        return
    uploads = AdapterUploads(uploads_folder(roots))
    for name, folder in uploads.recover().items():
        if name in models or engine.adapter(name) is not None:
            logger.error("uploaded adapter %s is not loaded: the name is taken", name)
            continue
        try:
            engine.load_adapter(name, str(folder))
        except (AdapterError, OSError) as error:
            logger.error("uploaded adapter %s cannot be loaded: %s", name, error)


def _allowed(path: str, roots: Sequence[Path]) -> Path:
    """The adapter's folder, if it and its files are below a root after following links.

    Relative paths start at the roots. Paths outside and missing paths get the same ApiError, so
    that no client can find out which files exist.
    """
    if not roots:
        raise ApiError(403, "this server was started without --lora-root", code="admin_disabled")
    for root in roots:
        try:
            # Joining an absolute path replaces the root; the result is checked all the same.
            folder = (root / path).resolve()
            if folder.is_dir() and all(
                file.resolve().is_relative_to(root) for file in (folder, *folder.iterdir())
            ):
                return folder
        except (OSError, RuntimeError, ValueError):
            continue  # too long, a loop of links, a null byte
    raise ApiError(
        404,
        f"lora_path is not a folder below an allowed root: {path!r}",
        param="lora_path",
        code="not_found",
    )


def uploads_folder(roots: Sequence[Path]) -> Path:
    """The folder for uploads, below the first root."""
    return roots[0].resolve() / "uploads"


def _body(info: AdapterInfo) -> dict[str, Any]:
    return {"object": "lora_adapter", **asdict(info)}
