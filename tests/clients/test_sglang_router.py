"""SGLang's router before two servers: its extra fields are accepted, and both servers are used."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from .conftest import Server, running_server

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def router(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("second") / "tiny"
    with running_server(folder) as second:
        workers = [each.url.removesuffix("/v1") for each in (server, second)]
        port = int(workers[1].rsplit(":", 1)[1]) + 1
        command = [
            *(str(Path(sys.executable).with_name("smg")), "launch", "--port", str(port)),
            *(
                "--worker-urls",
                *workers,
                "--policy",
                "round_robin",
                "--prometheus-port",
                str(port + 1),
            ),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    # Ready once it has found what its servers serve.
                    with urllib.request.urlopen(f"{url}/readiness") as response:
                        if response.status == 200:
                            break
                except (urllib.error.URLError, ConnectionError):
                    pass
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.2)
            yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        finally:
            process.kill()
            process.wait()


def test_chats_and_completions_pass_whole_and_streamed(router: OpenAI) -> None:
    for _ in range(4):  # to both servers
        chat = router.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5)
        assert chat.choices[0].finish_reason in ("stop", "length")
        assert chat.usage is not None
    completion = router.completions.create(model="tiny", prompt="the fox", max_tokens=5)
    assert completion.choices[0].finish_reason in ("stop", "length")
    stream = router.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, stream=True)
    assert [each.choices[0].finish_reason for each in stream][-1] in ("stop", "length")
