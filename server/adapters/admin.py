"""Administration of adapters: load, unload, upload, list.

Request bodies are those of vLLM. Uploads are forms with ``lora_name``, ``load_inplace`` and either
the files adapter_config.json and adapter_model.safetensors, and those of a tokenizer and settings
of its own, or an archive with them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from nybble.engine import (
    AdapterError,
    AdapterInfo,
    AdapterMixture,
    Engine,
    ParameterError,
    UnknownAdapterError,
)
from nybble.loaders.adapter import own_files
from nybble.server.adapters.archive import CONFIG as ADAPTER_CONFIG
from nybble.server.adapters.archive import WEIGHTS as ADAPTER_WEIGHTS
from nybble.server.adapters.archive import ArchiveError
from nybble.server.adapters.form import AdapterForm, read_adapter_form
from nybble.server.adapters.names import require_name
from nybble.server.adapters.paths import ADMIN_PATHS
from nybble.server.adapters.resolver import AdapterResolver
from nybble.server.adapters.state import AdapterState
from nybble.server.adapters.turns import Turns
from nybble.server.adapters.uploads import AdapterUploads
from nybble.server.api.parse import read_body
from nybble.server.api.respond import json_response
from nybble.server.api.schema import (
    ChangeAdapterRequest,
    LoadAdapterRequest,
    RollBackRequest,
    UnloadAdapterRequest,
)
from nybble.server.http.errors import ApiError
from nybble.server.lifecycle.flag_names import in_flags
from nybble.server.tenancy.keys import Keys

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Earlier uploads that are left on disk, to roll back to.
_UPLOADS_KEPT = 4


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
        self._turns = Turns()

    def routes(self) -> list[web.RouteDef]:
        load, unload, every, one, versions, rollback, prefetch = ADMIN_PATHS
        return [
            web.post(load, self.load),
            web.post(unload, self.unload),
            web.get(every, self.list),
            web.post(every, self.upload),
            web.get(one, self.get),
            web.patch(one, self.change),
            web.delete(one, self.delete),
            web.get(versions, self.versions),
            web.post(rollback, self.roll_back),
            web.post(prefetch, self.prefetch),
        ]

    async def load(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        body = await read_body(request, LoadAdapterRequest)
        self._require_free(body.lora_name, replace=bool(body.load_inplace))
        info = await self._in_turn(body.lora_name, lambda: self._load(body))
        return json_response(_body(info))

    def _load(self, body: LoadAdapterRequest) -> AdapterInfo:
        replace = bool(body.load_inplace)
        if self._resolver is not None and self._registered:
            return self._register(self._resolver, body, replace=replace)
        if body.mixture is not None:
            return self._mix(body, body.mixture)
        assert body.lora_path is not None
        folder = _allowed(body.lora_path, self._roots)
        info = self._engine.load_adapter(
            body.lora_name, str(folder), replace=replace, expected=body.expected_version
        )
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

    def _register(
        self, resolver: AdapterResolver, body: LoadAdapterRequest, *, replace: bool
    ) -> AdapterInfo:
        self._require_own("mixture", body.mixture)
        self._require_own("expected_version", body.expected_version)
        assert body.lora_path is not None
        folder = _allowed(body.lora_path, self._roots)
        return resolver.publish(body.lora_name, folder, replace=replace)

    def _mix(self, body: LoadAdapterRequest, weights: Mapping[str, float]) -> AdapterInfo:
        name = body.lora_name
        if name in weights:
            raise ApiError(
                400,
                f"a mixture cannot have the name of an adapter that it is made of: {name!r}",
                param="lora_name",
                code="invalid_value",
            )
        try:
            info = self._engine.load_mixture(
                name,
                AdapterMixture(weights),
                replace=bool(body.load_inplace),
                expected=body.expected_version,
            )
        except UnknownAdapterError as error:  # what does not exist is not what the path names
            raise ApiError(400, str(error), param="mixture", code="invalid_value") from None
        if self._state is not None:
            self._state.keep(name, dict(weights))
        if self._uploads is not None:
            self._uploads.retire(name)  # else a restart would find two of this name
        return info

    async def unload(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        body = await read_body(request, UnloadAdapterRequest)
        self._require_own("expected_version", body.expected_version)
        return json_response(await self._in_turn(body.lora_name, lambda: self._unload(body)))

    def _unload(self, body: UnloadAdapterRequest) -> dict[str, Any]:
        name = body.lora_name
        if self._withdrawn(name, delete=False):
            return {"object": "lora_adapter", "name": name, "unloaded": True}
        if self._state is not None and self._engine.adapter(name) is None:
            # Forget an adapter that failed to load at the start too, or every start tries it.
            self._state.forget(name)
        info = self._find(name)
        self._engine.unload_adapter(name, expected=body.expected_version)
        if self._state is not None:
            self._state.forget(name)
        if self._uploads is not None:
            self._uploads.set_unloaded(name, True)
        return _body(info)

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
            info = await self._in_turn(form.name, lambda: self._publish(uploads, form, scratch))
        return json_response(_body(info))

    def _scratch(self) -> AbstractContextManager[Path]:
        """A folder to receive an upload in, which is removed afterwards."""
        if self._uploads is not None:
            return self._uploads.scratch()
        assert self._resolver is not None
        return self._resolver.scratch()

    def _publish(
        self, uploads: AdapterUploads | None, form: AdapterForm, scratch: Path
    ) -> AdapterInfo:
        if self._resolver is not None and self._registered:
            self._require_own("expected_version", form.expected)
            return self._resolver.publish(form.name, scratch, replace=form.replace)
        assert uploads is not None
        version = uploads.publish(form.name, scratch)
        try:
            info = self._engine.load_adapter(
                form.name, str(version), replace=form.replace, expected=form.expected
            )
        except BaseException:
            uploads.discard(version)
            raise
        uploads.retire(form.name, but=version, keep=_UPLOADS_KEPT)
        if self._state is not None:
            self._state.forget(form.name)  # a restart finds it among the uploads
        return info

    async def delete(self, request: web.Request) -> web.Response:
        """Unload an adapter if it is loaded, and remove its files if they were uploaded."""
        self._require_admin(request)
        name, expected = _name(request), request.query.get("expected_version")
        self._require_own("expected_version", expected)
        await self._in_turn(name, lambda: self._delete(name, expected))
        return json_response({"object": "lora_adapter", "name": name, "deleted": True})

    def _delete(self, name: str, expected: str | None) -> None:
        if self._withdrawn(name, delete=True):
            return
        kept = self._uploads is not None and self._uploads.has(name)
        if not kept or self._engine.adapter(name) is not None:
            self._engine.unload_adapter(self._find(name).name, expected=expected)
        if self._state is not None:
            self._state.forget(name)
        if self._uploads is not None:
            self._uploads.retire(name)
        self._engine.forget_adapter(name)

    async def change(self, request: web.Request) -> web.Response:
        """Pin an adapter, or no longer."""
        self._require_admin(request)
        body = await read_body(request, ChangeAdapterRequest)
        name = self._find(_name(request)).name
        info = self._engine.pin_adapter(name, body.pinned, expected=body.expected_version)
        return json_response(_body(info))

    async def prefetch(self, request: web.Request) -> web.Response:
        """Have an adapter read into memory before requests come for it. Does not wait for that."""
        self._require_admin(request)
        name = _name(request)
        if self._resolver is not None:
            await self._resolver.obtain(name)
        return json_response(_body(self._engine.prefetch_adapter(self._find(name).name)))

    async def versions(self, request: web.Request) -> web.Response:
        """What a name has stood for since the start, the newest first."""
        self._require_admin(request)
        name = _name(request)
        found, current = self._versions(name), self._engine.adapter(name)
        data = [
            {
                "object": "lora_adapter.version",
                "version": info.version,
                "path": info.path,
                "mixture": info.mixture,
                "rank": info.rank,
                "loaded": info.loaded,
                "current": current is not None and info.version == current.version,
            }
            for info in found
        ]
        return json_response({"object": "list", "data": data})

    async def roll_back(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        body = RollBackRequest()
        if request.can_read_body:
            body = await read_body(request, RollBackRequest)
        self._require_own(None, "a rollback")
        name = _name(request)
        info = await self._in_turn(name, lambda: self._roll_back(name, body))
        return json_response(_body(info))

    def _roll_back(self, name: str, body: RollBackRequest) -> AdapterInfo:
        current = self._engine.adapter(name)
        others = [
            info
            for info in self._versions(name)
            if (current is None or info.version != current.version)
            and body.version in (None, info.version)
        ]
        if not others:
            raise ApiError(
                404,
                f"adapter {name!r} has no earlier version"
                + ("" if body.version is None else f" {body.version!r}"),
                param="version",
                code="not_found",
            )
        target, uploads = others[0], self._uploads
        if uploads is None or not target.path or not uploads.holds(Path(target.path)):
            info = self._engine.roll_back_adapter(
                name, target.version, expected=body.expected_version
            )
            if self._state is not None:
                self._state.keep(name, dict(info.mixture) if info.mixture else info.path)
            if uploads is not None:
                uploads.retire(name)  # else a restart would find two of this name
            return info
        if not Path(target.path).is_dir():
            raise ApiError(
                404,
                f"version {target.version} of adapter {name!r} was uploaded and has been removed",
                param="version",
                code="not_found",
            )
        # The greatest upload is the current one.
        with uploads.scratch() as scratch:
            for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *own_files(Path(target.path))):
                shutil.copyfile(Path(target.path) / file, scratch / file)
            version = uploads.publish(name, scratch)
        try:
            info = self._engine.roll_back_adapter(
                name, target.version, folder=version, expected=body.expected_version
            )
        except BaseException:
            uploads.discard(version)
            raise
        uploads.retire(name, but=version, keep=_UPLOADS_KEPT)
        if self._state is not None:
            self._state.forget(name)
        return info

    def _versions(self, name: str) -> Sequence[AdapterInfo]:
        found = self._engine.adapter_versions(name)
        if not found:
            raise ApiError(
                404, f"adapter {name!r} was never loaded", param="lora_name", code="not_found"
            )
        return found

    async def list(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        return json_response(
            {"object": "list", "data": [_body(i) for i in self._engine.adapters()]}
        )

    async def get(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        return json_response(_body(self._find(_name(request))))

    def _require_own(self, param: str | None, given: object) -> None:
        """Raises ApiError 400 for what changes this server alone, if it shares its adapters."""
        if given is not None and self._registered:
            raise ApiError(
                400,
                f"{param or given} is for adapters of one server; those of --lora-registry are "
                "shared by all",
                param=param,
                code="unsupported_parameter",
            )

    async def _in_turn(self, name: str, change: Callable[[], T]) -> T:
        """Run a change of a name on another thread, and no two at a time: what is on disk, in the
        engine and in the state stays of the same change."""

        def changed() -> T:
            with self._turns.of(name):  # by the thread, which goes on if the client goes away
                return change()

        return await asyncio.to_thread(changed)

    def _withdrawn(self, name: str, *, delete: bool) -> bool:
        """Whether a shared place had the name, and no longer has."""
        return self._resolver is not None and self._resolver.withdraw(name, delete=delete)

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


def _name(request: web.Request) -> str:
    """The name in the path. Raises ApiError 400 if no adapter may have it."""
    try:
        return require_name(request.match_info["name"])
    except ValueError as error:
        raise ApiError(400, str(error), param="lora_name", code="invalid_value") from None


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
        if not isinstance(path, str):
            continue
        if name in models or engine.adapter(name) is not None:
            continue  # the command line takes precedence
        try:
            engine.load_adapter(require_name(name), str(_allowed(path, allowed)))
            logger.info("adapter %s is loaded again", name)
        except (ApiError, AdapterError, ValueError, OSError) as error:
            logger.error("adapter %s cannot be loaded again: %s", name, in_flags(error))


def restore_mixtures(engine: Engine, models: Sequence[str], state: Path | None) -> None:
    """Mix again what the API had mixed before the restart, of adapters that are loaded. Blocks."""
    kept = AdapterState(state).paths() if state is not None else {}
    left = {
        name: weights
        for name, weights in kept.items()
        if not isinstance(weights, str) and name not in models and engine.adapter(name) is None
    }
    # A mixture may be of others, which come later: go on while any could be mixed.
    while left:
        failed: dict[str, Exception] = {}
        for name, weights in left.items():
            try:
                engine.load_mixture(require_name(name), AdapterMixture(weights))
                logger.info("adapter %s is mixed again", name)
            except (AdapterError, ParameterError, ValueError, OSError) as error:
                failed[name] = error
        if len(failed) == len(left):
            for name, reason in failed.items():
                logger.error("adapter %s cannot be mixed again: %s", name, in_flags(reason))
            return
        left = {name: left[name] for name in failed}


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
            logger.error("uploaded adapter %s cannot be loaded: %s", name, in_flags(error))


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
