"""The administration of adapters: load, unload, list. Bodies are as vLLM's clients send them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web
from nybble.engine import AdapterError, AdapterInfo, Engine
from nybble.server.adapter_state import AdapterState
from nybble.server.api.parse import read_body
from nybble.server.api.respond import json_response
from nybble.server.api.schema import LoadAdapterRequest, UnloadAdapterRequest
from nybble.server.errors import ApiError
from nybble.server.keys import Keys
from nybble.server.settings import ServerSettings

logger = logging.getLogger(__name__)

ADMIN_PATHS = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/lora_adapters",
    "/v1/lora_adapters/{name}",
)


class AdapterAdmin:
    """Handlers that need an admin key, and load only what lies below the allowed roots."""

    def __init__(
        self,
        engine: Engine,
        models: tuple[str, ...],
        keys: Keys,
        roots: Sequence[Path],
        state: AdapterState | None,
    ) -> None:
        """models: names that no adapter may take. Without keys or roots, their use gets 403."""
        self._state = state
        self._engine = engine
        self._models = models
        self._keys = keys
        self._roots = [root.resolve() for root in roots]

    def routes(self) -> list[web.RouteDef]:
        load, unload, every, one = ADMIN_PATHS
        return [
            web.post(load, self.load),
            web.post(unload, self.unload),
            web.get(every, self.list),
            web.get(one, self.get),
        ]

    async def load(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        body = await read_body(request, LoadAdapterRequest)
        if body.lora_name in self._models:
            raise ApiError(
                400,
                f"{body.lora_name!r} is the name of the base model",
                param="lora_name",
                code="invalid_value",
            )
        if not body.load_inplace and self._engine.adapter(body.lora_name) is not None:
            raise ApiError(
                400,
                f"adapter {body.lora_name!r} is loaded already; load_inplace replaces it",
                param="lora_name",
                code="adapter_exists",
            )
        info = await asyncio.to_thread(self._load, body)
        return json_response(_body(info))

    def _load(self, body: LoadAdapterRequest) -> AdapterInfo:
        folder = _allowed(body.lora_path, self._roots)
        replace = bool(body.load_inplace)
        info = self._engine.load_adapter(body.lora_name, str(folder), replace=replace)
        if self._state is not None:
            self._state.keep(body.lora_name, str(folder))
        return info

    async def unload(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        body = await read_body(request, UnloadAdapterRequest)
        if self._state is not None and self._engine.adapter(body.lora_name) is None:
            # One that could not be loaded again shall not be tried for ever.
            await asyncio.to_thread(self._state.forget, body.lora_name)
        info = self._find(body.lora_name)
        self._engine.unload_adapter(body.lora_name)
        if self._state is not None:
            await asyncio.to_thread(self._state.forget, body.lora_name)
        return json_response(_body(info))

    async def list(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        return json_response(
            {"object": "list", "data": [_body(i) for i in self._engine.adapters()]}
        )

    async def get(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        return json_response(_body(self._find(request.match_info["name"])))

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


def restore(engine: Engine, settings: ServerSettings) -> None:
    """Load what the API had loaded before the last end, as far as it is allowed and there; blocks.

    What cannot be loaded is logged, and tried again at the next start.
    """
    if settings.adapter_state is None or not settings.adapter_roots:
        return
    roots = [root.resolve() for root in settings.adapter_roots]
    for name, path in AdapterState(settings.adapter_state).paths().items():
        if name in settings.models or engine.adapter(name) is not None:
            continue  # the command line goes before
        try:
            engine.load_adapter(name, str(_allowed(path, roots)))
            logger.info("adapter %s is loaded again", name)
        except (ApiError, AdapterError, OSError) as error:
            logger.error("adapter %s cannot be loaded again: %s", name, error)


def _allowed(path: str, roots: Sequence[Path]) -> Path:
    """The adapter's folder, if it and its files really lie below a root, links followed.

    Relative paths start at the roots. What is outside and what is not there get the same answer,
    so that nobody learns what exists. Raises ApiError.
    """
    if not roots:
        raise ApiError(403, "this server was started without --lora-root", code="admin_disabled")
    for root in roots:
        try:
            # Joining an absolute path replaces the root; where it leads is checked as well.
            folder = (root / path).resolve()
            if folder.is_dir() and all(
                file.resolve().is_relative_to(root) for file in (folder, *folder.iterdir())
            ):
                return folder
        except (OSError, RuntimeError, ValueError):
            continue  # too long, a loop of links, a null byte
    raise ApiError(
        400,
        f"lora_path is not a folder below an allowed root: {path!r}",
        param="lora_path",
        code="invalid_value",
    )


def _body(info: AdapterInfo) -> dict[str, Any]:
    return {"object": "lora_adapter", **asdict(info)}
