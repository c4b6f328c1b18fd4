"""Servers that are killed at every moment of a stream: what clients get, also by HAProxy."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from nybble.server.replicas.haproxy import configuration
from nybble.server.replicas.supervise import find_haproxy

from ..conftest import running_server
from ..forked import BECOME_KILLED_SERVER

COMPLETION = {"model": "tiny", "prompt": "a", "max_tokens": 6, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 6}
RESPONSE = {"model": "tiny", "input": "a", "max_output_tokens": 16}


def data_of(text: str) -> list[str]:
    """The data of a stream's events."""
    lines = text.splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def ask(origin: str, path: str, body: dict[str, Any], **options: Any) -> list[str]:
    """The events of a stream. Raises httpx.RemoteProtocolError if it breaks, or never begins."""
    answer = httpx.post(f"{origin}{path}", json={**body, "stream": True}, timeout=60, **options)
    assert answer.status_code == 200
    return data_of(answer.text)


@pytest.fixture
def dies(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """``dies(moment)`` has running_server start servers one of which dies then."""
    return lambda moment: {
        "script": BECOME_KILLED_SERVER,
        "environment": {
            "NYBBLE_TEST_MOMENT": moment,
            "NYBBLE_TEST_ONCE": str(tmp_path / "dead"),
        },
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {**RESPONSE, "background": True}),
        pytest.param("/v1/completions", COMPLETION, marks=pytest.mark.slow),
        pytest.param("/v1/messages", CHAT, marks=pytest.mark.slow),
        pytest.param("/v1/responses", RESPONSE, marks=pytest.mark.slow),
    ],
)
def test_a_stream_of_any_kind_ends_with_an_event_though_only_its_head_was_sent(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    dies: Callable[[str], dict[str, Any]],
    path: str,
    body: dict[str, Any],
) -> None:
    options = ("--response-store", str(tmp_path / "responses")) if "background" in body else ()
    with running_server(tiny_model(), *options, **dies("after prepare")) as server:
        (last,) = ask(server.url, path, body)
        assert "the server was killed" in last
        assert json.loads(last).keys() & {"error", "code"}


@pytest.mark.parametrize(
    "moment",
    [
        "after write",
        pytest.param("before prepare", marks=pytest.mark.slow),
        pytest.param("after write_eof", marks=pytest.mark.slow),
    ],
)
def test_what_a_client_gets_at_other_moments(
    tiny_model: Callable[..., Path], dies: Callable[[str], dict[str, Any]], moment: str
) -> None:
    with running_server(tiny_model(), **dies(moment)) as server:
        if moment == "before prepare":
            # Nothing at all, so that a proxy may ask another server.
            with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
                ask(server.url, "/v1/completions", COMPLETION)
            return
        events = ask(server.url, "/v1/completions", COMPLETION)
    if moment == "after write":
        token, last = map(json.loads, events)
        assert token["choices"][0]["text"]
        assert last["error"]["code"] == "engine_failed"
    else:
        *tokens, done = events
        assert done == "[DONE]"
        # How many there are depends on the letters that the tokens' bytes make.
        assert [json.loads(each)["choices"][0]["finish_reason"] for each in tokens] == [
            *[None] * (len(tokens) - 1),
            "length",
        ]


@contextmanager
def haproxy(folder: Path, servers: Sequence[str], certificate: Path | None) -> Iterator[str]:
    """Its address."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    file = folder / "haproxy.cfg"
    file.write_text(configuration(address, servers, certificate=certificate))
    process = subprocess.Popen([find_haproxy(), "-db", "-f", str(file)])
    try:
        host, port = address.split(":")
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex((host, int(port))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
@pytest.mark.parametrize(
    ("moment", "scheme"), [("before prepare", "http"), ("after prepare", "https")]
)
def test_behind_haproxy_a_stream_goes_to_the_other_server_or_ends_with_an_event(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    dies: Callable[[str], dict[str, Any]],
    certificate: tuple[Path, Path],
    moment: str,
    scheme: str,
) -> None:
    found = None
    if scheme == "https":
        found = tmp_path / "both.pem"
        found.write_bytes(b"\n".join(each.read_bytes() for each in certificate))
    verify = ssl.create_default_context(cafile=str(certificate[0]))
    with ExitStack() as stack:
        addresses = []
        for _ in range(2):
            server = stack.enter_context(running_server(tiny_model(), **dies(moment)))
            addresses.append(server.url.removeprefix("http://"))
        address = stack.enter_context(haproxy(tmp_path, addresses, found))
        events = ask(f"{scheme}://{address}", "/v1/completions", COMPLETION, verify=verify)
        assert (tmp_path / "dead").exists()
    if moment == "before prepare":
        assert events[-1] == "[DONE]"
    else:
        (last,) = events
        assert json.loads(last)["error"]["code"] == "engine_failed"
