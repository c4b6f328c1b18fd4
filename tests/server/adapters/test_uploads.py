"""Adapters come as forms: checked, stored whole, served, replaced, deleted, and found again."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import shutil
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nybble.engine import AdapterConfig, Engine
from nybble.loaders import open_checkpoint
from nybble.server.adapters import archive
from nybble.server.adapters.archive import CONFIG, MAX_BYTES, WEIGHTS, ArchiveError, extract_adapter
from nybble.server.adapters.state import AdapterState
from nybble.server.adapters.uploads import AdapterUploads

from ..client import COMPLETIONS, Client, run
from ..conftest import CONFIG as ENGINE_CONFIG
from ..conftest import ServerProcess, running_server

PATH = "/v1/lora_adapters"
ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    config = replace(ENGINE_CONFIG, adapters=AdapterConfig(slots=2, max_rank=8))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def files(tiny_adapter: Callable[..., Path]) -> dict[str, bytes]:
    folder = tiny_adapter(seed=1)
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tarred(members: dict[str, bytes], links: tuple[str, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(info)
    return buffer.getvalue()


async def upload(
    client: Client, parts: dict[str, bytes], status: int = 200, **fields: str
) -> dict[str, Any]:
    form = aiohttp.FormData()
    for name, value in fields.items():
        form.add_field(name, value)
    for filename, content in parts.items():
        form.add_field("file", content, filename=filename)
    async with client.post(PATH, data=form, headers=ADMIN) as response:
        body = await response.json()
        assert response.status == status, body
        return dict(body if status == 200 else body["error"])


async def text(client: Client, model: str) -> str:
    body = {"model": model, "prompt": "the quick", "max_tokens": 8, "temperature": 0}
    async with client.post(COMPLETIONS, json=body) as response:
        return str((await response.json())["choices"][0]["text"])


def serve(engine: Engine, root: Path, scenario: Callable[[Client], Any]) -> None:
    run(engine, scenario, admin_keys=["root"], adapter_roots=[root])


def test_an_upload_is_served_replaced_and_deleted(
    engine: Engine, files: dict[str, bytes], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_adapter(seed=2)
    archives = {
        "a.zip": zipped({f"run/{name}": (other / name).read_bytes() for name in files}),
        "a.tar.gz": tarred({f"./{name}": (other / name).read_bytes() for name in files}),
    }

    async def scenario(client: Client) -> None:
        info = await upload(client, files, lora_name="mine")
        assert (info["name"], info["rank"]) == ("mine", 4)
        first = await text(client, "mine")
        assert first != await text(client, "tiny")
        error = await upload(client, files, 400, lora_name="mine")
        assert error["code"] == "adapter_exists"
        for name, packed in archives.items():
            replaced = await upload(client, {name: packed}, lora_name="mine", load_inplace="true")
            assert replaced["version"] != info["version"]
        assert await text(client, "mine") != first
        # What is current and four to roll back to; what is older may still be read by requests.
        for _ in range(3):
            await upload(client, files, lora_name="mine", load_inplace="true")
        versions = sorted((tmp_path / "uploads" / "mine").iterdir())
        assert [(v / ".retired").exists() for v in versions] == [True, *[False] * 5]
        assert sorted(f.name for f in versions[-1].iterdir()) == [CONFIG, WEIGHTS]
        async with client.delete(f"{PATH}/mine", headers=ADMIN) as response:
            assert await response.json() == {
                "object": "lora_adapter",
                "name": "mine",
                "deleted": True,
            }
        async with client.get(f"{PATH}/mine", headers=ADMIN) as response:
            assert response.status == 404
        assert AdapterUploads(tmp_path / "uploads").recover() == {}
        assert not list((tmp_path / "uploads").iterdir())

    serve(engine, tmp_path, scenario)


def test_an_uploads_name_may_have_a_slash(
    engine: Engine, files: dict[str, bytes], tmp_path: Path
) -> None:
    async def scenario(client: Client) -> None:
        for name in ("org", "org/b"):
            await upload(client, files, lora_name=name)
        await upload(client, files, lora_name="org/b", load_inplace="true")
        assert await text(client, "org/b") == await text(client, "org")
        recovered = AdapterUploads(tmp_path / "uploads").recover()
        assert set(recovered) == {"org", "org/b"}
        async with client.delete(f"{PATH}/org", headers=ADMIN) as response:
            assert response.status == 200
        assert set(AdapterUploads(tmp_path / "uploads").recover()) == {"org/b"}

    serve(engine, tmp_path, scenario)


def test_what_is_wrong_with_an_upload_is_said_and_leaves_nothing(
    engine: Engine, files: dict[str, bytes], tmp_path: Path
) -> None:
    config = {CONFIG: files[CONFIG]}
    wrong = zipped({CONFIG: files[CONFIG], WEIGHTS: files[WEIGHTS][:-9]})

    async def scenario(client: Client) -> None:
        cases: list[tuple[dict[str, bytes], dict[str, str], str]] = [
            (files, {}, "missing required parameter: lora_name"),
            (
                files,
                {"lora_name": "../x"},
                "'../x' cannot be the name of an adapter: expected letters",
            ),
            (files, {"lora_name": "tiny"}, "the name of the base model"),
            (files, {"lora_name": "a", "load_inplace": "si"}, "expected true or false"),
            (files, {"lora_name": "a", "path": "/etc"}, "unknown parameter: path"),
            (config, {"lora_name": "a"}, f"{WEIGHTS} is missing"),
            ({"adapter_model.bin": b"x"}, {"lora_name": "a"}, "expected adapter_config.json"),
            ({"a.zip": zipped(config)}, {"lora_name": "a"}, f"{WEIGHTS} is missing"),
            ({"a.zip": b"nothing"}, {"lora_name": "a"}, "the archive cannot be read"),
            ({"a.zip": wrong}, {"lora_name": "a"}, "truncated or not safetensors"),
            ({"a.zip": wrong, **config}, {"lora_name": "a"}, "not both"),
        ]
        for parts, fields, message in cases:
            error = await upload(client, parts, 400, **fields)
            assert message in error["message"], error
        async with client.post(PATH, json={}, headers=ADMIN) as response:
            assert response.status == 400
        async with client.post(PATH, json={}) as response:
            assert response.status == 401
        assert engine.adapters() == []
        assert not list((tmp_path / "uploads").iterdir())

    serve(engine, tmp_path, scenario)


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", [f"../{CONFIG}", f"/tmp/{CONFIG}", f"a\\..\\..\\{CONFIG}"])
def test_an_archive_cannot_lead_out_of_its_folder(
    pack: Callable[[dict[str, bytes]], bytes], name: str, tmp_path: Path
) -> None:
    archive, folder = tmp_path / "archive", tmp_path / "a" / "folder"
    folder.mkdir(parents=True)
    archive.write_bytes(pack({name: b"{}"}))
    with pytest.raises(ArchiveError, match="leads out of the archive"):
        extract_adapter(archive, folder)
    assert not list(folder.iterdir())


def test_links_bombs_and_doubles_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = zipfile.ZipInfo(CONFIG)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(link, "/etc/passwd")
    monkeypatch.setitem(MAX_BYTES, WEIGHTS, 1 << 20)
    monkeypatch.setattr(archive, "_MAX_UNPACKED", 2 << 20)
    zeros = bytes(3 << 20)
    header = tarfile.TarInfo("x")
    header.size = 1 << 32
    header.type = tarfile.XHDTYPE  # its content would be read at once
    cases = {
        "is a link or a device": [buffer.getvalue(), tarred({}, links=(CONFIG,))],
        "is larger than 1048576 bytes": [zipped({WEIGHTS: zeros})],
        "unpacks to more than": [tarred({"other": zeros})],
        "header too large": [gzip.compress(header.tobuf())],
        "has two adapter_config": [zipped({f"a/{CONFIG}": b"", f"b/{CONFIG}": b""})],
        "in different folders": [tarred({f"a/{CONFIG}": b"", f"b/{WEIGHTS}": b""})],
        "more than 1000 members": [zipped({str(i): b"" for i in range(1001)})],
        "cannot be read": [b"", b"PK\x03\x04broken", b"\x1f\x8bbroken"],
        "not compressed as zip files usually are": [
            zipped({CONFIG: zeros}, method) for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
        ],
    }
    for index, (message, archives) in enumerate(cases.items()):
        for number, content in enumerate(archives):
            folder = tmp_path / f"{index}-{number}"
            folder.mkdir()
            (tmp_path / "archive").write_bytes(content)
            with pytest.raises(ArchiveError, match=message):
                extract_adapter(tmp_path / "archive", folder)


def test_a_damaged_archive_is_refused_as_one_whatever_the_damage(tmp_path: Path) -> None:
    chance = random.Random(0)
    members = {CONFIG: chance.randbytes(50) + bytes(400), WEIGHTS: bytes(500)}
    refused = 0
    for number in range(400):
        content = bytearray(chance.choice((zipped, tarred))(members))
        for _ in range(3):
            content[chance.randrange(len(content))] = chance.randrange(256)
        (tmp_path / "archive").write_bytes(content)
        folder = tmp_path / f"{number}"
        folder.mkdir()
        try:
            extract_adapter(tmp_path / "archive", folder)
        except ArchiveError:
            refused += 1
    assert 100 < refused < 400


def test_uploads_outlive_the_server(
    tiny_model: Callable[..., Path], files: dict[str, bytes], tmp_path: Path
) -> None:
    uploads = AdapterUploads(tmp_path / "uploads")
    for _ in range(2):
        with uploads.scratch() as scratch:
            for name, content in files.items():
                (scratch / name).write_bytes(content)
            uploads.publish("kept", scratch)
    newest = uploads.recover()["kept"]
    uploads.retire("kept", but=newest)
    (tmp_path / "uploads" / ".partial-cut-off").mkdir()
    (tmp_path / "uploads" / "broken" / "1").mkdir(parents=True)
    options = ("--lora-root", str(tmp_path), "--max-lora-rank", "8", "--admin-key", "root")
    with running_server(tiny_model(), *options) as server:
        request = urllib.request.Request(server.url + PATH, headers=ADMIN)
        with urllib.request.urlopen(request, timeout=30) as response:
            listed = json.load(response)["data"]
    assert [(info["name"], info["path"]) for info in listed] == [("kept", str(newest))]
    assert sorted(p.name for p in (tmp_path / "uploads").iterdir()) == ["broken", "kept"]
    assert list((tmp_path / "uploads" / "kept").iterdir()) == [newest]


@pytest.mark.parametrize(
    ("first", "second", "owner", "method"),
    [
        ("upload", "upload", Engine, "load_adapter"),
        ("load", "load", AdapterState, "_change"),
        ("unload", "load", AdapterState, "_change"),
        ("delete", "upload", AdapterState, "_change"),
        ("roll_back", "load", AdapterState, "_change"),
    ],
)
def test_of_two_changes_of_a_name_a_restart_finds_the_one_that_is_served(
    first: str,
    second: str,
    owner: type,
    method: str,
    engine: Engine,
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, state = tmp_path / "loras", tmp_path / "state.json"
    for seed in (1, 2, 3):
        shutil.copytree(tiny_adapter(seed=seed), root / f"a{seed}")
    halfway, other_done = threading.Event(), threading.Event()
    original = getattr(owner, method)

    def held(*arguments: Any, **options: Any) -> Any:
        if not halfway.is_set():
            halfway.set()
            other_done.wait(1)
        return original(*arguments, **options)

    async def scenario(client: Client) -> None:
        async def change(kind: str, folder: str) -> None:
            name = {"lora_name": "x"}
            body: dict[str, Any] = name
            path = "/v1/unload_lora_adapter"
            if kind == "upload":
                files = {file: (root / folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
                await upload(client, files, load_inplace="true", **name)
                return
            if kind == "load":
                path = "/v1/load_lora_adapter"
                body = {**name, "lora_path": folder, "load_inplace": True}
            elif kind == "roll_back":
                path, body = f"{PATH}/x/rollback", {}
            verb = "DELETE" if kind == "delete" else "POST"
            path = f"{PATH}/x" if kind == "delete" else path
            async with client.request(verb, path, json=body, headers=ADMIN) as response:
                assert response.status == 200, await response.text()

        await change("load", "a3")
        await change("load", "a1")
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, held)
            one = asyncio.create_task(change(first, "a1"))
            await asyncio.to_thread(halfway.wait)
            await change(second, "a2")
            other_done.set()
            await one
        served = engine.adapter("x")
        assert served is not None
        uploaded = AdapterUploads(root / "uploads").recover()
        found = AdapterState(state).paths().get("x", uploaded.get("x"))
        assert str(found) == served.path

    run(engine, scenario, admin_keys=["root"], adapter_roots=[root], adapter_state=state)


def test_an_unloaded_upload_stays_unloaded_until_it_is_wanted_again(
    tiny_model: Callable[..., Path], files: dict[str, bytes], tmp_path: Path
) -> None:
    """Over three lives of the server; meanwhile its files are there, and can be deleted."""
    options = ("--lora-root", str(tmp_path), "--max-lora-rank", "8", "--admin-key", "root")

    def call(server: ServerProcess, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {**ADMIN, "Content-Type": "application/json"}
        request = urllib.request.Request(server.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def names(server: ServerProcess) -> list[str]:
        return [info["name"] for info in call(server, "GET", PATH)[1]["data"]]

    with running_server(tiny_model(), *options) as server:

        async def send() -> None:
            async with aiohttp.ClientSession(server.url) as client:
                for name in ("a", "b"):
                    await upload(client, files, lora_name=name)  # type: ignore[arg-type]

        asyncio.run(send())
        folder = call(server, "GET", PATH + "/a")[1]["path"]
        for name in ("a", "b"):
            assert call(server, "POST", "/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
    with running_server(tiny_model(), *options) as server:
        assert names(server) == []
        assert call(server, "DELETE", PATH + "/b")[0] == 200
        assert call(server, "DELETE", PATH + "/b")[0] == 404
        load = {"lora_name": "a", "lora_path": folder}
        assert call(server, "POST", "/v1/load_lora_adapter", load)[0] == 200
    with running_server(tiny_model(), *options) as server:
        assert names(server) == ["a"]
        assert "taken" not in "".join(server.lines)
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["a"]
