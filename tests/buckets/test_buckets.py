"""Adapters in buckets: a server reads them from S3 and Google Cloud Storage, as their emulators
speak it. `make test-buckets` runs this in an environment of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import pytest

COMMAND = [sys.executable, "-P", "-c", "from nybble.server.cli.main import main; main()"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny.py, which writes models and adapters."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Bucket:
    """url: of the bucket. environment: what a server needs to find and open it."""

    url: str
    environment: dict[str, str]


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[Bucket]:
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    if request.param == "s3":
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    else:
        program = "from gcp_storage_emulator.__main__ import main; import sys; sys.exit(main())"
        options = ("start", "--host", "127.0.0.1", "--port", str(port), "--in-memory")
        command = [sys.executable, "-c", program, *options]
        environment = {"STORAGE_EMULATOR_HOST": endpoint, "GOOGLE_CLOUD_PROJECT": "project"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    os.environ |= environment
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        url = f"{request.param}://adapters"
        files, path = fsspec.core.url_to_fs(url)
        files.mkdir(path)
        yield Bucket(url, environment)
    finally:
        os.environ.clear()
        os.environ.update(before)
        process.kill()
        process.wait()


def put(folder: Path, url: str) -> None:
    files, path = fsspec.core.url_to_fs(url)
    for file in folder.iterdir():
        files.pipe_file(f"{path}/{file.name}", file.read_bytes())


class Server:
    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True)
        self.process = subprocess.Popen(
            [
                *(*COMMAND, "serve", "--model", str(model), "--served-model-name", "tiny"),
                *("--port", "0", "--device", "cpu", "--kv-cache-memory", "16MiB"),
                *("--max-lora-rank", "8", "--admin-key", "admin", *options),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stderr is not None
        lines: list[str] = []
        for line in self.process.stderr:
            lines.append(line)
            if match := re.search(r"URL\s+(http://\S+)/v1", line):
                self.url = match[1]
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(lines))
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", "Authorization": "Bearer admin"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                text = response.read()
                return response.status, text
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ask(self, model: str) -> tuple[int, Any]:
        body = {"model": model, "prompt": "the fox", "max_tokens": 16, "temperature": 0}
        status, text = self.post("/v1/completions", body)
        answer = json.loads(text)
        return status, answer["choices"][0]["text"] if status == 200 else answer["error"]["code"]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def test_adapters_are_served_out_of_a_bucket(
    bucket: Bucket, tiny: ModuleType, tmp_path: Path
) -> None:
    model, local, other = tmp_path / "tiny", tmp_path / "a", tmp_path / "b"
    tiny.write_tiny_model(model)
    for folder, seed in ((local, 1), (other, 2)):
        folder.mkdir()
        tiny.write_tiny_adapter(folder, model, seed=seed)
    put(local, f"{bucket.url}/team/one")
    options = (f"--lora-source={bucket.url}/team/{{name}}", f"--lora-registry={bucket.url}/shared")
    server = Server(
        model,
        tmp_path / "run",
        f"--lora-modules=local={local}",
        f"--lora-root={tmp_path}",
        *options,
    )
    try:
        base, expected = server.ask("tiny"), server.ask("local")
        assert base[0] == expected[0] == 200
        assert base != expected
        assert server.ask("one") == expected
        # A name that is not there, and one that is put there later.
        assert server.ask("two") == (404, "model_not_found")
        put(other, f"{bucket.url}/team/three")
        status, text = server.ask("three")
        assert status == 200
        assert text not in (base[1], expected[1])
        # An adapter that is loaded over the API is published in the bucket, where others find it.
        body = {"lora_name": "published", "lora_path": str(local)}
        status, answer = server.post("/v1/load_lora_adapter", body)
        assert status == 200, answer
        assert server.ask("published") == expected
    finally:
        server.stop()
    another = Server(model, tmp_path / "another", *options)
    try:
        assert another.ask("published") == expected
    finally:
        another.stop()
