"""Versions of adapters: expected ones, earlier ones, and pinned adapters."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nybble.engine import AdapterConfig, Engine
from nybble.loaders import open_checkpoint
from nybble.server.tenancy.tenants import Tenants, new_key

from ..client import COMPLETIONS, Client, run
from ..conftest import CONFIG

ADMIN = {"Authorization": "Bearer admin-secret"}
LOAD, UNLOAD, LIST = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/lora_adapters"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def folders(tiny_adapter: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Of three adapters, below the root ``tmp_path``."""
    found = []
    for seed in (1, 2, 3):
        folder = tmp_path / f"adapter-{seed}"
        folder.mkdir()
        for name in FILES:
            (folder / name).write_bytes((tiny_adapter(seed=seed) / name).read_bytes())
        found.append(folder)
    return found


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=8))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()
    yield engine
    engine.stop()


def serve(engine: Engine, root: Path, scenario: Callable[[Client], Any], **options: Any) -> None:
    run(engine, scenario, admin_keys=["admin-secret"], adapter_roots=[root], **options)


async def ask(
    client: Client, method: str, path: str, body: Any = None, status: int = 200
) -> dict[str, Any]:
    sent = {"data": body} if isinstance(body, aiohttp.FormData) else {"json": body}
    async with client.request(method, path, headers=ADMIN, **sent) as response:
        answer = await response.json()
        assert response.status == status, answer
        return dict(answer if status == 200 else answer["error"])


async def load(client: Client, folder: Path, status: int = 200, **more: Any) -> dict[str, Any]:
    body = {"lora_name": "a", "lora_path": str(folder), "load_inplace": True, **more}
    return await ask(client, "POST", LOAD, body, status)


async def upload(client: Client, folder: Path, **fields: str) -> dict[str, Any]:
    form = aiohttp.FormData()
    for name, value in {"lora_name": "u", "load_inplace": "true", **fields}.items():
        form.add_field(name, value)
    for name in FILES:
        form.add_field("file", (folder / name).read_bytes(), filename=name)
    return await ask(client, "POST", LIST, form)


async def said(client: Client, model: str) -> str:
    body = {"model": model, "prompt": "the", "max_tokens": 12, "temperature": 0}
    async with client.post(COMPLETIONS, json=body) as response:
        return str((await response.json())["choices"][0]["text"])


def test_nothing_is_changed_if_another_version_is_there_than_expected(
    engine: Engine, folders: list[Path], tmp_path: Path
) -> None:
    async def scenario(client: Client) -> None:
        first = (await load(client, folders[0]))["version"]
        second = (await load(client, folders[1], expected_version=first))["version"]
        assert first != second
        refused = await load(client, folders[2], 409, expected_version=first)
        assert refused["code"] == "version_conflict"
        assert refused["message"] == (
            f"adapter 'a' is version {second}, expected was version {first}; nothing was changed"
        )
        stale = {"lora_name": "a", "expected_version": first}
        await ask(client, "POST", UNLOAD, stale, 409)
        await ask(client, "DELETE", f"{LIST}/a?expected_version={first}", None, 409)
        pin = {"pinned": True, "expected_version": first}
        await ask(client, "PATCH", f"{LIST}/a", pin, 409)
        back = {"version": first, "expected_version": first}
        await ask(client, "POST", f"{LIST}/a/rollback", back, 409)
        assert (await ask(client, "GET", f"{LIST}/a"))["version"] == second
        unloaded = await ask(client, "POST", UNLOAD, {**stale, "expected_version": second})
        assert unloaded["version"] == second
        gone = await load(client, folders[2], 409, expected_version=second)
        assert "adapter 'a' is not loaded, expected was version" in gone["message"]

    serve(engine, tmp_path, scenario)


def test_a_name_goes_back_to_an_earlier_version(
    engine: Engine, folders: list[Path], tmp_path: Path
) -> None:
    async def scenario(client: Client) -> None:
        versions, texts = [], []
        for folder in folders:
            versions.append((await load(client, folder))["version"])
            texts.append(await said(client, "a"))
        assert len(set(texts)) == 3
        listed = await ask(client, "GET", f"{LIST}/a/versions")
        assert [(each["version"], each["current"]) for each in listed["data"]] == [
            (versions[2], True),
            (versions[1], False),
            (versions[0], False),
        ]
        assert listed["data"][2]["path"] == str(folders[0])
        back = f"{LIST}/a/rollback"
        assert (await ask(client, "POST", back, {}))["version"] == versions[1]
        assert await said(client, "a") == texts[1]
        found = await ask(client, "POST", back, {"version": versions[0]})
        assert (found["version"], found["path"]) == (versions[0], str(folders[0]))
        assert await said(client, "a") == texts[0]
        refused = await ask(client, "POST", back, {"version": "ff"}, 404)
        assert refused["message"] == "adapter 'a' has no earlier version 'ff'"
        (folders[2] / FILES[1]).write_bytes((folders[1] / FILES[1]).read_bytes())
        changed = await ask(client, "POST", back, {"version": versions[2]}, 400)
        assert "have changed since" in changed["message"]
        assert await said(client, "a") == texts[0]
        await ask(client, "POST", UNLOAD, {"lora_name": "a"})
        assert (await ask(client, "POST", back, {}))["version"] == versions[0]
        never = await ask(client, "GET", f"{LIST}/never/versions", None, 404)
        assert never["message"] == "adapter 'never' was never loaded"

    serve(engine, tmp_path, scenario)


def test_an_upload_goes_back_to_an_earlier_one_and_stays_so_after_a_restart(
    engine: Engine, folders: list[Path], tmp_path: Path
) -> None:
    async def scenario(client: Client) -> None:
        first = await upload(client, folders[0])
        text = await said(client, "u")
        second = await upload(client, folders[1], expected_version=first["version"])
        back = await ask(client, "POST", f"{LIST}/u/rollback", {})
        assert back["version"] == first["version"] != second["version"]
        assert await said(client, "u") == text
        uploads = tmp_path / "uploads" / "u"
        assert back["path"] == str(max(uploads.iterdir()))
        shutil.rmtree(second["path"])
        gone = await ask(client, "POST", f"{LIST}/u/rollback", {}, 404)
        assert "was uploaded and has been removed" in gone["message"]
        await ask(client, "DELETE", f"{LIST}/u")
        gone = await ask(client, "POST", f"{LIST}/u/rollback", {}, 404)
        assert gone["message"] == "adapter 'u' was never loaded"

    serve(engine, tmp_path, scenario)


def test_the_list_tells_who_used_an_adapter_and_when_and_what_is_pinned(
    engine: Engine, folders: list[Path], tmp_path: Path
) -> None:
    key, hashed = new_key()
    file = tmp_path / "tenants.toml"
    file.write_text(f'[tenants.acme]\nkeys = ["{hashed}"]\n')

    async def scenario(client: Client) -> None:
        info = await load(client, folders[0])
        assert (info["last_used"], info["tenants"], info["pinned"]) == (None, [], False)
        body = {"model": "a", "prompt": "the", "max_tokens": 1}
        async with client.post(
            COMPLETIONS, json=body, headers={"Authorization": f"Bearer {key}"}
        ) as response:
            assert response.status == 200
        assert (await ask(client, "PATCH", f"{LIST}/a", {"pinned": True}))["pinned"]
        (info,) = (await ask(client, "GET", LIST))["data"]
        assert info["last_used"] >= info["loaded"] > 0
        assert (info["hits"], info["tenants"], info["pinned"]) == (1, ["acme"], True)
        # Whatever is loaded under the name is pinned, and counts go on.
        info = await load(client, folders[1])
        assert (info["hits"], info["tenants"], info["pinned"]) == (1, ["acme"], True)
        assert not (await ask(client, "PATCH", f"{LIST}/a", {"pinned": False}))["pinned"]
        await ask(client, "PATCH", f"{LIST}/b", {"pinned": True}, 404)

    serve(engine, tmp_path, scenario, tenants=Tenants(file))


def test_a_hint_has_an_adapter_read_before_requests_come_for_it(
    tiny_model: Callable[..., Path], folders: list[Path], tmp_path: Path
) -> None:
    """Memory holds one adapter, that of the last request."""
    adapters = AdapterConfig(slots=1, max_rank=8, host_bytes=100_000)
    config = replace(CONFIG, adapters=adapters)
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()

    async def scenario(client: Client) -> None:
        size = (await load(client, folders[0]))["nbytes"]
        assert size <= 100_000 < 2 * size
        await load(client, folders[1], lora_name="b")
        await said(client, "a")
        await said(client, "b")
        path = f"{LIST}/a/prefetch"
        assert (await ask(client, "POST", path))["residency"] == "disk"
        while (await ask(client, "GET", f"{LIST}/a"))["residency"] != "host":
            await asyncio.sleep(0.01)
        info = await ask(client, "GET", f"{LIST}/a")
        assert (info["hits"], info["pinned"]) == (1, False)
        await ask(client, "POST", f"{LIST}/nobody/prefetch", status=404)
        async with client.post(path) as response:
            assert response.status == 401

    try:
        serve(engine, tmp_path, scenario)
    finally:
        engine.stop()


def test_pinned_adapters_leave_half_of_the_memory_to_others(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    adapters = AdapterConfig(slots=1, max_rank=8, host_bytes=400_000)
    config = replace(CONFIG, adapters=adapters)
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    sizes = [
        engine.load_adapter(f"{seed}", str(tiny_adapter(seed=seed))).nbytes for seed in range(9)
    ]
    fits = 200_000 // sizes[0]
    for name in range(fits):
        engine.pin_adapter(f"{name}", True)
    with pytest.raises(ValueError, match="more than half of the host memory for adapters"):
        engine.pin_adapter(f"{fits}", True)
    engine.pin_adapter("0", False)
    assert engine.pin_adapter(f"{fits}", True).pinned
