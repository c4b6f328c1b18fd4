"""What survives a kill, a full disk and damaged files."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from nybble.quantizers import quantize_checkpoint
from nybble.server.adapters.archive import CONFIG, WEIGHTS

from ..server.forked import BECOME_SERVER
from .conftest import PATIENCE, Process, ask

COMPLETIONS = "/v1/completions"
ADMIN = "admin-secret"
HELLO = {"model": "tiny", "prompt": "x", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
TENANT_KEY = "nyb-tenant"
LIMITED = Path(__file__).with_name("become_limited_server.py")


def test_a_server_that_was_killed_comes_back_with_its_adapters_and_tenants(
    launch: Callable[..., Process],
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    root, tenants = tmp_path / "root", tmp_path / "tenants.toml"
    for seed, name in enumerate(("one", "two", "three")):
        shutil.copytree(tiny_adapter(seed=seed), root / name)
    tenants.write_text(f'[tenants.acme]\nkeys = ["{hashed(TENANT_KEY)}"]\n')
    options = ("--admin-key", ADMIN, "--lora-root", str(root), "--tenants", str(tenants))

    def answers(server: Process) -> dict[str, str]:
        return {
            name: ask(server.ready() + COMPLETIONS, HELLO | {"model": name}, TENANT_KEY)[1][
                "choices"
            ][0]["text"]
            for name in ("tiny", "one", "two")
        }

    server = launch(tiny_model(), *options, script=BECOME_SERVER)
    for name in ("one", "two", "three"):
        body = {"lora_name": name, "lora_path": name}
        assert ask(server.ready() + "/v1/load_lora_adapter", body, ADMIN)[0] == 200
    assert ask(server.origin + "/v1/unload_lora_adapter", {"lora_name": "three"}, ADMIN)[0] == 200
    before = answers(server)
    assert len(set(before.values())) == 3
    server.signal(signal.SIGKILL)
    server.exit_code()

    again = launch(tiny_model(), *options, script=BECOME_SERVER)
    assert answers(again) == before
    assert ask(again.origin + "/v1/models", key="wrong")[0] == 401
    names = [entry["id"] for entry in ask(again.origin + "/v1/models", key=TENANT_KEY)[1]["data"]]
    assert names == ["tiny", "one", "two"]
    again.signal(signal.SIGKILL)
    again.exit_code()

    # One that is gone is said to be, and is neither forgotten nor in the way of the others.
    (root / "two").rename(tmp_path / "elsewhere")
    third = launch(tiny_model(), *options, script=BECOME_SERVER)
    assert ask(third.ready() + COMPLETIONS, HELLO | {"model": "one"}, TENANT_KEY)[0] == 200
    assert ask(third.origin + COMPLETIONS, HELLO | {"model": "two"}, TENANT_KEY)[0] == 404
    assert "adapter two cannot be loaded again" in third.log
    (state,) = (tmp_path / "c/nybble/state").iterdir()
    assert set(json.loads(state.read_text())["adapters"]) == {"one", "two"}
    assert ask(third.origin + "/v1/unload_lora_adapter", {"lora_name": "two"}, ADMIN)[0] == 404
    assert set(json.loads(state.read_text())["adapters"]) == {"one"}


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def limit_files(nbytes: int) -> None:
    """In a child: writing beyond so much of a file fails, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def test_a_disk_that_fills_while_packing_is_named_and_left_clean(
    launch: Callable[..., Process], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "gptq"
    quantize_checkpoint(tiny_model(), source, format="gptq", group_size=32, progress=False)
    server = launch(source, script=LIMITED, environment={"FILE_LIMIT": "100000"})
    assert server.exit_code() == 1
    assert "Traceback" not in server.log
    server.find(r"cannot write the packed model to .*packed.*XDG_CACHE_HOME")
    assert not [path for path in (tmp_path / "c/nybble/packed").iterdir() if path.is_dir()]


def test_an_upload_that_fills_the_disk_is_told_so_and_leaves_nothing(
    launch: Callable[..., Process],
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    root, state, tenants = tmp_path / "root", tmp_path / "state", tmp_path / "tenants.toml"
    root.mkdir()
    tenants.write_text(f'[tenants.acme]\nkeys = ["{hashed(TENANT_KEY)}"]\nfine_tuning = true\n')
    options = ("--admin-key", ADMIN, "--lora-root", str(root), "--tenants", str(tenants))
    options = (*options, "--state-dir", str(state))
    server = launch(tiny_model(), *options, script=LIMITED, environment={"FILE_LIMIT": "200000"})
    origin, large = server.ready(), bytes(300_000)
    adapter = tiny_adapter(seed=1)
    parts = {name: (adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:  # small, but not unpacked
        for name, content in {**parts, WEIGHTS: large}.items():
            file.writestr(name, content)

    def send(path: str, key: str, data: dict[str, str], files: dict[str, bytes]) -> tuple[int, Any]:
        response = httpx.post(
            origin + path,
            headers={"Authorization": f"Bearer {key}"},
            data=data,
            files=[("file", (name, content)) for name, content in files.items()],
            timeout=PATIENCE,
        )
        return response.status_code, response.json()

    name, purpose = {"lora_name": "mine"}, {"purpose": "fine-tune"}
    lines = b'{"text": "the dog barks"}\n'
    for path, key, data, files in (
        ("/v1/lora_adapters", ADMIN, name, {**parts, WEIGHTS: large}),
        ("/v1/lora_adapters", ADMIN, name, {"mine.zip": archive.getvalue()}),
        ("/v1/files", TENANT_KEY, purpose, {"data.jsonl": lines * 10_000}),
    ):
        status, body = send(path, key, data, files)
        assert (status, body["error"]["code"]) == (507, "disk_full"), body
    assert not list((root / "uploads").iterdir())
    assert not list((state / "files").iterdir())
    assert "Traceback" not in server.log
    # What fits is taken still.
    assert send("/v1/lora_adapters", ADMIN, name, parts)[0] == 200
    assert send("/v1/files", TENANT_KEY, purpose, {"data.jsonl": lines})[0] == 200
    assert ask(origin + COMPLETIONS, HELLO | {"model": "mine"}, TENANT_KEY)[0] == 200


@pytest.mark.slow
def test_a_log_that_can_grow_no_more_stops_nobody(
    launch: Callable[..., Process], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        server = launch(tiny_model(), stderr=stream, preexec_fn=partial(limit_files, 2_000))
    while '/v1"' not in log.read_text():
        assert server.process.poll() is None
        time.sleep(0.1)
    server.lines.append(log.read_text())
    for _ in range(12):
        assert ask(server.origin + COMPLETIONS, HELLO)[0] == 200
    assert log.stat().st_size == 2_000
    server.signal(signal.SIGTERM)
    assert server.exit_code() == 0


def test_a_damaged_packed_model_is_packed_again(
    launch: Callable[..., Process], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "gptq"
    quantize_checkpoint(tiny_model(), source, format="gptq", group_size=32, progress=False)
    server = launch(source, script=BECOME_SERVER)
    expected = ask(server.ready() + COMPLETIONS, HELLO)[1]["choices"]
    server.signal(signal.SIGKILL)
    server.exit_code()
    (packed,) = (path for path in (tmp_path / "c/nybble/packed").iterdir() if path.is_dir())
    (shard,) = packed.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    again = launch(source, script=BECOME_SERVER)
    assert ask(again.ready() + COMPLETIONS, HELLO)[1]["choices"] == expected
    assert "is damaged and is packed again" in again.log
