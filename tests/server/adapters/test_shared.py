"""Adapters in shared places: found when a request names them, the same at every server."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from aiohttp import FormData
from aiohttp.test_utils import TestClient, TestServer

from nybble.engine import AdapterConfig, Engine
from nybble.loaders import open_checkpoint
from nybble.server.adapters.archive import CONFIG as CONFIG_FILE
from nybble.server.adapters.archive import MAX_BYTES, WEIGHTS
from nybble.server.adapters.disk_cache import AdapterDiskCache, CacheFullError
from nybble.server.adapters.places import AdapterRegistry, AdapterSource, Found, PlaceError
from nybble.server.adapters.resolver import AdapterResolver
from nybble.server.api.generation import Generation, SequenceGroup
from nybble.server.app import make_app
from nybble.server.files.storage import StorageSettings
from nybble.server.http.errors import ApiError
from nybble.server.http.gate import Gate
from nybble.server.lifecycle.settings import ServerSettings, SharedAdapters
from nybble.server.tenancy.tenants import Tenants, new_key

from ..client import COMPLETIONS, TEMPLATES, Client
from ..conftest import CONFIG

ADMIN = {"Authorization": "Bearer admin"}
LARGE = 1 << 30
Server = tuple[Client, Engine]


@pytest.fixture(scope="module")
def engines(tiny_model: Callable[..., Path]) -> Iterator[list[Engine]]:
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=8))
    engines = [Engine.load(open_checkpoint(tiny_model()), config, progress=False) for _ in range(2)]
    for engine in engines:
        engine.start()
    yield engines
    for engine in engines:
        engine.stop()


@pytest.fixture(autouse=True)
def empty(engines: list[Engine]) -> Iterator[None]:
    """Each test begins without adapters."""
    yield
    for engine in engines:
        for info in engine.adapters():
            engine.unload_adapter(info.name)
    fsspec.filesystem("memory").rm("/", recursive=True)


@pytest.fixture
def shared(tmp_path: Path) -> Callable[..., SharedAdapters]:
    """``shared("memory://…", registry=…)``: settings with a cache of their own."""
    caches = iter(range(100))

    def make(
        *sources: str, registry: str | None = None, limit: int = LARGE, refresh: float = 0.1
    ) -> SharedAdapters:
        return SharedAdapters(
            sources=[AdapterSource(rule) for rule in sources],
            registry=None if registry is None else AdapterRegistry(registry),
            cache=(tmp_path / f"cache{next(caches)}", limit),
            refresh_seconds=refresh,
        )

    return make


def serve(
    engines: list[Engine],
    settings: list[SharedAdapters],
    scenario: Callable[..., Awaitable[None]],
    **options: Any,
) -> None:
    """Run a scenario with a client of each server."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            clients = []
            for engine, shared in zip(engines, settings, strict=False):
                whole = ServerSettings(
                    **{
                        "models": ("tiny",),
                        "max_sequences": 16,
                        "admin_keys": ("admin",),
                        "shared_adapters": shared,
                        **options,
                    }
                )
                app = make_app(engine, whole, Gate(), TEMPLATES)
                clients.append(await stack.enter_async_context(TestClient(TestServer(app))))
            await scenario(*clients)

    asyncio.run(main())


async def ask(client: Client, model: str, **headers: str) -> tuple[int, str]:
    """Status, and the text of the answer or the code of the error."""
    body = {"model": model, "prompt": "the fox", "max_tokens": 8, "temperature": 0}
    async with client.post(COMPLETIONS, json=body, headers=headers) as response:
        answer = await response.json()
        if response.status != 200:
            return response.status, answer["error"]["code"]
        return 200, answer["choices"][0]["text"]


def put(folder: Path, url: str) -> None:
    """Copy an adapter's folder to a shared place."""
    files, path = fsspec.core.url_to_fs(url)
    files.makedirs(path, exist_ok=True)
    for file in folder.iterdir():
        files.put_file(str(file), f"{path}/{file.name}")


def test_an_unknown_name_is_found_by_the_rules_and_none_outside_them(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny_adapter(seed=1), tmp_path / "loras" / "acme-1")
    shutil.copytree(tiny_adapter(seed=1), tmp_path / "loras" / "other")
    put(tiny_adapter(seed=2), "memory://hub/org/one/main")
    rules = (f"acme-*={tmp_path}/loras", "org/*=memory://hub/{name}/main")

    async def scenario(client: Client) -> None:
        _, base = await ask(client, "tiny")
        status, text = await ask(client, "acme-1")
        assert (status, text != base) == (200, True)
        status, other = await ask(client, "org/one")
        assert (status, other != text) == (200, True)
        for name in ("other", "acme-2", "../loras/other", "acme-1/../other", ".hidden", "org/two"):
            assert await ask(client, name) == (404, "model_not_found"), name
        async with client.get("/v1/models") as response:
            models = {each["id"]: each["parent"] for each in (await response.json())["data"]}
        assert models == {"tiny": None, "acme-1": "tiny", "org/one": "tiny"}
        async with client.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        assert 'nybble_adapter_lookups_total{result="found"} 2.0' in lines
        # acme-2 and org/two: no place was asked for the others.
        assert 'nybble_adapter_lookups_total{result="absent"} 2.0' in lines

    serve(engines, [shared(*rules, refresh=60)], scenario)


def test_a_tenant_can_have_only_the_names_its_patterns_allow(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    key, stored = new_key()
    file = tmp_path / "tenants.toml"
    file.write_text(f'[tenants.acme]\nkeys = ["{stored}"]\nadapters = ["acme-*"]\n')
    for name in ("acme-1", "rival-1"):
        put(tiny_adapter(seed=1), f"memory://loras/{name}")

    async def scenario(client: Client) -> None:
        bearer = f"Bearer {key}"
        assert (await ask(client, "acme-1", Authorization=bearer))[0] == 200
        assert await ask(client, "rival-1", Authorization=bearer) == (404, "model_not_found")
        assert engines[0].adapter("rival-1") is None

    serve(engines, [shared("memory://loras")], scenario, tenants=Tenants(file))


def test_what_one_server_loads_is_served_by_all_and_what_it_unloads_by_none(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    for seed in (1, 2):
        shutil.copytree(tiny_adapter(seed=seed), tmp_path / "roots" / str(seed))

    async def administer(client: Client, what: str, status: int = 200, **body: Any) -> Any:
        async with client.post(f"/v1/{what}", json=body, headers=ADMIN) as response:
            answer = await response.json()
            assert response.status == status, answer
            return answer

    async def scenario(first: Client, second: Client) -> None:
        assert (await ask(second, "a"))[0] == 404
        info = await administer(first, "load_lora_adapter", lora_name="a", lora_path="1")
        await asyncio.sleep(0.15)  # that it was absent is known for as long
        one = await ask(second, "a")
        assert one == await ask(first, "a")
        assert engines[1].adapter("a").version == info["version"]  # type: ignore[union-attr]
        # The name is taken everywhere.
        refused = await administer(second, "load_lora_adapter", 400, lora_name="a", lora_path="2")
        assert refused["error"]["code"] == "adapter_exists"
        again = {"lora_name": "a", "lora_path": "2", "load_inplace": True}
        await administer(second, "load_lora_adapter", **again)
        await asyncio.sleep(0.15)
        two = await ask(first, "a")
        assert two == await ask(second, "a")
        assert two != one
        await administer(first, "unload_lora_adapter", lora_name="a")
        await asyncio.sleep(0.15)
        assert (await ask(second, "a"))[0] == 404
        async with first.delete("/v1/lora_adapters/a", headers=ADMIN) as response:
            assert response.status == 404

    settings = [shared(registry="memory://registry") for _ in range(2)]
    serve(engines, settings, scenario, adapter_roots=[tmp_path / "roots"])


def test_what_changes_one_server_alone_is_refused_of_shared_adapters(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny_adapter(seed=1), tmp_path / "roots" / "1")

    async def scenario(client: Client) -> None:
        async def send(method: str, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
            url = f"/v1/{path}"
            async with client.request(method, url, json=body or None, headers=ADMIN) as response:
                return response.status, await response.json()

        load = {"lora_name": "a", "lora_path": "1"}
        assert (await send("POST", "load_lora_adapter", **load))[0] == 200
        mixture = {"lora_name": "b", "mixture": {"a": 0.5}}
        expected = {"expected_version": "0"}
        for method, path, body in (
            ("POST", "load_lora_adapter", mixture),
            ("POST", "load_lora_adapter", {**load, "load_inplace": True, **expected}),
            ("POST", "unload_lora_adapter", {"lora_name": "a", **expected}),
            ("DELETE", "lora_adapters/a?expected_version=0", {}),
            ("POST", "lora_adapters/a/rollback", {"version": "0"}),
        ):
            status, answer = await send(method, path, **body)
            assert status == 400, (path, answer)
            assert "--lora-registry" in answer["error"]["message"]
        assert (await ask(client, "a"))[0] == 200

    settings = [shared(registry=str(tmp_path / "registry"))]
    serve(engines, settings, scenario, adapter_roots=[tmp_path / "roots"])


def test_an_upload_goes_to_the_registry_and_a_deleted_one_leaves_it(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    async def scenario(first: Client, second: Client) -> None:
        form, files = FormData({"lora_name": "b"}), (CONFIG_FILE, WEIGHTS)
        for file in files:
            content = (tiny_adapter(seed=1) / file).read_bytes()
            form.add_field("file", content, filename=file)
        async with first.post("/v1/lora_adapters", data=form, headers=ADMIN) as response:
            assert response.status == 200, await response.text()
        assert (await ask(second, "b"))[0] == 200
        (pointer,) = tmp_path.glob("registry/b/*.json")
        version = json.loads(pointer.read_text())["version"]
        assert {file.name for file in (pointer.parent / version).iterdir()} == set(files)
        async with second.delete("/v1/lora_adapters/b", headers=ADMIN) as response:
            assert response.status == 200
        assert not (tmp_path / "registry" / "b").exists()
        await asyncio.sleep(0.15)
        assert (await ask(first, "b"))[0] == 404

    serve(engines, [shared(registry=str(tmp_path / "registry")) for _ in range(2)], scenario)


def test_an_upload_is_received_where_the_next_start_removes_it(
    engines: list[Engine], shared: Callable[..., SharedAdapters], tmp_path: Path
) -> None:
    """If the server is killed meanwhile: it may be gigabytes."""
    found: list[str] = []

    async def body() -> AsyncIterator[bytes]:
        yield b"--x\r\nContent-Disposition: form-data; name=file; "
        yield b"filename=adapter_config.json\r\n\r\n"
        while not found:
            yield b" "
            await asyncio.sleep(0.01)
            found.extend(path.name for path in tmp_path.glob("cache0/*/adapter_config.json"))
        found[:] = [path.name for path in tmp_path.glob("cache0/[!.]*")]
        found.extend(path.name[:9] for path in tmp_path.glob("cache0/.p*"))
        yield b"\r\n--x--\r\n"

    async def scenario(client: Client) -> None:
        headers = ADMIN | {"Content-Type": "multipart/form-data; boundary=x"}
        async with client.post("/v1/lora_adapters", data=body(), headers=headers) as response:
            assert response.status == 400
        assert found == [".partial-"]
        assert not list(tmp_path.glob("cache0/.p*"))

    serve(engines, [shared(registry=str(tmp_path / "registry"))], scenario)
    cache = AdapterDiskCache(tmp_path / "cache0", LARGE)
    with cache.scratch() as folder:
        cache.close()  # as a killed server does
        AdapterDiskCache(tmp_path / "cache0", LARGE).close()
        assert not folder.exists()


def test_deleting_a_name_leaves_those_that_begin_with_it(
    tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    registry = AdapterRegistry(str(tmp_path / "registry"))
    nested = f"org/{'0' * 32}"  # as a version's folder is called
    for seed, name in enumerate(("org", "org/b", nested)):
        registry.point(registry.store(name, tiny_adapter(seed=seed)))
    registry.delete("org")
    assert registry.find("org") is None
    for name in ("org/b", nested):
        assert registry.find(name) is not None, name
        registry.delete(name)
    assert {path.name for path in tmp_path.glob("registry/**/*")} <= {"org"}


def test_an_adapters_own_tokens_come_with_it_from_every_shared_place(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_token_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tiny_token_adapter()
    put(folder, "memory://loras/own")
    names = [file.name for file in folder.iterdir() if file.name in MAX_BYTES]

    async def published(client: Client, files: Sequence[str]) -> None:
        form = FormData({"lora_name": "b", "load_inplace": "true"})
        for file in files:
            form.add_field("file", (folder / file).read_bytes(), filename=file)
        async with client.post("/v1/lora_adapters", data=form, headers=ADMIN) as response:
            assert response.status == 200, await response.text()

    async def own_tokens(client: Client, name: str) -> int:
        assert (await ask(client, name))[0] == 200
        async with client.get(f"/v1/lora_adapters/{name}", headers=ADMIN) as response:
            return int((await response.json())["own_tokens"])

    async def scenario(first: Client, second: Client) -> None:
        assert await own_tokens(first, "own") == 4
        await published(first, names)
        assert [await own_tokens(each, "b") for each in (first, second)] == [4, 4]
        # The same weights without the tokenizer are another version.
        await published(first, (CONFIG_FILE, WEIGHTS))
        await asyncio.sleep(0.15)
        await ask(second, "b")
        assert [await own_tokens(each, "b") for each in (first, second)] == [0, 0]

    registry = str(tmp_path / "registry")
    serve(engines, [shared("own=memory://loras", registry=registry) for _ in range(2)], scenario)


def test_a_replaced_folder_is_served_and_a_broken_one_leaves_the_last_good_version(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
) -> None:
    put(tiny_adapter(seed=1), "memory://loras/a")
    put(tiny_adapter(r=16), "memory://loras/wide")

    async def scenario(client: Client) -> None:
        one = await ask(client, "a")
        put(tiny_adapter(seed=2), "memory://loras/a")
        await asyncio.sleep(0.15)
        two = await ask(client, "a")
        assert two != one
        fsspec.filesystem("memory").pipe_file("/loras/a/adapter_config.json", b"{")
        await asyncio.sleep(0.15)
        assert await ask(client, "a") == two
        assert await ask(client, "wide") == (400, "invalid_adapter")
        for named_by, body in (("model", {"model": "wide"}), ("adapter", {"adapter": "wide"})):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 1} | body
            async with client.post(COMPLETIONS, json=body) as response:
                assert (await response.json())["error"]["param"] == named_by
        fsspec.filesystem("memory").rm("/loras/a", recursive=True)
        await asyncio.sleep(0.15)
        assert await ask(client, "a") == (404, "model_not_found")

    serve(engines, [shared("memory://loras")], scenario)


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face Hub as its file system asks for.

    repositories: the files of each, by their names. asked: the paths of all requests.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, name: str, folder: Path) -> None:
        self.repositories[name] = {file.name: file.read_bytes() for file in folder.iterdir()}


class HubAnswer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        for name, files in self.server.repositories.items():
            if path == f"/api/models/{name}":
                return self._json({"id": name, "_id": "1", "sha": "0" * 40, "siblings": []})
            if path == f"/api/models/{name}/tree/main":
                entries = (
                    (file, len(data), sha1(data).hexdigest()) for file, data in files.items()
                )
                return self._json(
                    [{"type": "file", "path": p, "size": n, "oid": oid} for p, n, oid in entries]
                )
            data = files.get(path.removeprefix(f"/{name}/resolve/main/"))
            if data is not None:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                return self._send(206, data[int(first) : int(last) + 1])
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def test_repositories_of_the_hub_are_adapters(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the hub's own file system; those outside the rule are never asked for."""
    hub = Hub()
    monkeypatch.setitem(
        fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{hub.server_port}"}
    )
    hub.put("org/one", tiny_adapter(seed=1))
    hub.put("rival/one", tiny_adapter(seed=1))

    async def scenario(client: Client) -> None:
        base = await ask(client, "tiny")
        one = await ask(client, "org/one")
        assert one[0] == 200
        assert one != base
        assert await ask(client, "org/two") == (404, "model_not_found")
        assert await ask(client, "rival/one") == (404, "model_not_found")
        # A new commit, and a new repository under a name that was absent.
        hub.put("org/one", tiny_adapter(seed=2))
        hub.put("org/two", tiny_adapter(seed=1))
        await asyncio.sleep(0.15)
        other = await ask(client, "org/one")
        assert other[0] == 200
        assert other != one
        assert await ask(client, "org/two") == one

    try:
        serve(engines, [shared("org/*=hf://{name}")], scenario)
    finally:
        hub.shutdown()
        hub.server_close()
    assert not [path for path in hub.asked if "rival" in path]


def test_while_a_place_does_not_answer_what_is_loaded_is_served(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(tiny_adapter(seed=1), "memory://loras/a")

    async def scenario(client: Client) -> None:
        before = await ask(client, "a")

        def away(*_: Any, **__: Any) -> Any:
            raise ConnectionResetError("the bucket is away")

        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", away)
        await asyncio.sleep(0.15)
        assert await ask(client, "a") == before
        assert await ask(client, "b") == (503, "adapter_unavailable")

    serve(engines, [shared("memory://loras")], scenario)


def test_a_full_disk_of_the_cache_is_not_blamed_on_the_place(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put(tiny_adapter(seed=1), "memory://loras/a")

    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", "the cache's file")

    opened = Path.open

    def open_full(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        return Full() if mode == "wb" else opened(path, mode, *more, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_full)

        async def full(client: Client) -> None:
            assert await ask(client, "a") == (507, "disk_full")

        serve(engines, [shared("memory://loras")], full)
    assert "the cache's file" in caplog.text

    async def room(client: Client) -> None:
        assert (await ask(client, "a"))[0] == 200

    serve(engines, [shared("memory://loras")], room)


def test_many_requests_for_a_new_name_read_it_once(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(tiny_adapter(seed=1), "memory://loras/a")
    fetched: list[str] = []
    fetch = Found.fetch
    monkeypatch.setattr(
        Found, "fetch", lambda self, to: (fetched.append(self.name), fetch(self, to))[1]
    )

    async def scenario(client: Client) -> None:
        answers = await asyncio.gather(*(ask(client, "a") for _ in range(6)))
        assert {status for status, _ in answers} == {200}
        assert fetched == ["a"]

    serve(engines, [shared("memory://loras")], scenario)


def test_the_cache_keeps_what_is_in_use_and_evicts_the_rest(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
) -> None:
    for i in range(4):
        put(tiny_adapter(seed=i), f"memory://loras/a{i}")
    size = sum((tiny_adapter(seed=0) / file).stat().st_size for file in (CONFIG_FILE, WEIGHTS))
    settings = shared("memory://loras", limit=int(2.5 * size))

    async def main() -> None:
        cache = AdapterDiskCache(*settings.cache)
        resolver = AdapterResolver(engines[0], ("tiny",), settings.sources, None, cache)
        with ExitStack() as leases:
            assert await resolver.obtain("a0", leases)
            assert await resolver.obtain("a1")
            assert await resolver.obtain("a2")  # a1 goes: a request has a0
            assert {info.name for info in engines[0].adapters()} == {"a0", "a2"}
            assert cache.nbytes <= 2.5 * size
            assert await resolver.obtain("a2", leases)
            with pytest.raises(ApiError, match="all adapters on disk are in use") as refused:
                await resolver.obtain("a3")
            assert refused.value.status == 503
        assert await resolver.obtain("a3")
        assert {info.name for info in engines[0].adapters()} == {"a2", "a3"}
        # A new start finds what was fetched, and fetches nothing again.
        cache.close()
        cache = AdapterDiskCache(*settings.cache)
        assert cache.nbytes == 2 * size
        (found,) = [settings.sources[0].find("a3")]
        assert found is not None
        assert cache.get(found.key) is not None
        cache.close()

    asyncio.run(main())


async def line_of_a_batch(client: Client, model: str) -> Callable[[], Awaitable[str]]:
    """Begins a batch of one request; what returns its results once there are any."""
    body = {"model": model, "prompt": "the fox", "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": body}
    form = FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", json.dumps(line).encode(), filename="in.jsonl")
    async with client.post("/v1/files", data=form) as response:
        batch = {"input_file_id": (await response.json())["id"], "completion_window": "24h"}
    async with client.post("/v1/batches", json={**batch, "endpoint": COMPLETIONS}) as response:
        id = (await response.json())["id"]

    async def result() -> str:
        while True:
            async with client.get(f"/v1/batches/{id}") as response:
                batch = await response.json()
            if batch["status"] in ("completed", "failed"):
                return str(batch["request_counts"])
            await asyncio.sleep(0.01)

    return result


async def response_in_background(client: Client, model: str) -> Callable[[], Awaitable[str]]:
    body = {"model": model, "input": "the fox", "max_output_tokens": 2, "background": True}
    async with client.post("/v1/responses", json=body) as response:
        id = (await response.json())["id"]

    async def result() -> str:
        while True:
            async with client.get(f"/v1/responses/{id}") as response:
                body = await response.json()
            if body["status"] not in ("queued", "in_progress"):
                return str(body["error"])
            await asyncio.sleep(0.01)

    return result


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        (line_of_a_batch, "{'total': 1, 'completed': 1, 'failed': 0}"),
        (response_in_background, "None"),
    ],
)
def test_what_waits_without_a_client_keeps_its_adapter_until_it_ends(
    begin: Callable[..., Awaitable[Callable[[], Awaitable[str]]]],
    expected: str,
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        put(tiny_adapter(seed=seed), f"memory://loras/{name}")
    size = sum(file.stat().st_size for file in tiny_adapter(seed=1).iterdir())
    run, waiting, opened = Generation.run, asyncio.Event(), asyncio.Event()

    async def late(self: Generation, group: SequenceGroup) -> AsyncIterator[Any]:
        """As if there were no room yet."""
        if group.adapter == "a":
            waiting.set()
            await opened.wait()
        async for item in run(self, group):
            yield item

    monkeypatch.setattr(Generation, "run", late)

    async def scenario(client: Client) -> None:
        result = await begin(client, "a")
        await waiting.wait()
        assert await ask(client, "b") == (503, "adapter_unavailable")
        opened.set()
        assert await result() == expected
        assert (await ask(client, "b"))[0] == 200

    serve(
        engines,
        [shared("memory://loras", limit=int(1.5 * size))],
        scenario,
        admin_keys=(),
        storage=StorageSettings(state=tmp_path / "state"),
        batches=True,
        response_store=(tmp_path / "responses.db", 1 << 20),
    )


def test_an_adapter_that_goes_before_its_request_has_it_is_not_called_unknown(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(tiny_adapter(seed=1), "memory://loras/a")
    settings = shared("memory://loras", refresh=60)
    lease = AdapterResolver._lease

    def late(self: AdapterResolver, name: str, leases: ExitStack | None) -> bool:
        """Another thread needs the room."""
        self._give_up(self._held[name].found.key)
        return lease(self, name, leases)

    async def main() -> None:
        cache = AdapterDiskCache(*settings.cache)
        resolver = AdapterResolver(engines[0], ("tiny",), settings.sources, None, cache)
        with monkeypatch.context() as patch:
            patch.setattr(AdapterResolver, "_lease", late)
            with pytest.raises(ApiError, match="'a' was pushed out") as refused:
                await resolver.obtain("a")
            assert refused.value.status == 503
        assert await resolver.obtain("a")
        cache.close()

    asyncio.run(main())


def test_what_two_threads_load_under_a_name_is_held_as_it_is_served(
    engines: list[Engine],
    shared: Callable[..., SharedAdapters],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A version published here while another server's is read, for one."""
    engine, settings = engines[0], shared(registry="memory://registry")
    cache = AdapterDiskCache(*settings.cache)
    resolver = AdapterResolver(engine, ("tiny",), (), settings.registry, cache)
    load, loaded, other_done = engine.load_adapter, threading.Event(), threading.Event()

    def held_up(*arguments: Any, **options: Any) -> Any:
        info = load(*arguments, **options)
        if not loaded.is_set():
            loaded.set()
            other_done.wait(1)
        return info

    def first() -> None:
        resolver.publish("x", tiny_adapter(seed=1), replace=True)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "load_adapter", held_up)
        thread = threading.Thread(target=first)
        thread.start()
        loaded.wait()
        resolver.publish("x", tiny_adapter(seed=2), replace=True)
        other_done.set()
        thread.join()
    served = engine.adapter("x")
    assert served is not None
    assert served.path == str(resolver._held["x"].folder)
    cache.close()


def test_a_cache_belongs_to_one_server_and_its_size_holds(tmp_path: Path) -> None:
    cache = AdapterDiskCache(tmp_path, 10)
    with pytest.raises(ValueError, match="another server has the folder"):
        AdapterDiskCache(tmp_path, 10)
    with pytest.raises(CacheFullError, match="11 bytes"):
        cache.add("large", 11, lambda folder: None)

    def fail(folder: Path) -> None:
        raise PlaceError("gone")

    with pytest.raises(PlaceError, match="gone"):
        cache.add("a", 5, fail)
    assert cache.nbytes == 0
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_registry_whose_content_is_not_what_it_says_is_not_served(
    tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    registry = AdapterRegistry(str(tmp_path / "registry"))
    registry.point(registry.store("a", tiny_adapter(seed=1)))
    found = registry.find("a")
    assert found is not None
    (tmp_path / "fetched").mkdir()
    found.fetch(tmp_path / "fetched")
    Path(found.folder, "adapter_config.json").write_text("{}")
    with pytest.raises(PlaceError, match="not what its digest says"):
        found.fetch(tmp_path / "fetched")
    (tmp_path / "registry/a/current.json").write_text("[]")
    with pytest.raises(PlaceError, match="publish the adapter again"):
        registry.find("a")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("=memory://x", r"expected \[NAMES=\]URL"),
        ("memory://{name}/{name}", "more than once"),
        ("nosuch://bucket", "cannot be read from nosuch://bucket"),
    ],
)
def test_wrong_rules_are_refused_by_name(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterSource(rule)


def test_a_large_registry_costs_no_start_up_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing lists a place: neither when it is opened nor when a name is looked up."""

    def listed(*_: Any, **__: Any) -> Any:
        raise AssertionError("the place was listed")

    for cls in (fsspec.get_filesystem_class("memory"), fsspec.get_filesystem_class("file")):
        for method in ("ls", "find", "glob", "walk"):
            monkeypatch.setattr(cls, method, listed)
    assert AdapterRegistry(str(tmp_path)).find("a") is None
    assert AdapterSource(f"{tmp_path}/{{name}}").find("a") is None
