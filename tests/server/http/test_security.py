"""What a server gives away and lets in by default, and what its options open."""

from __future__ import annotations

import ast
import asyncio
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from nybble.engine import Engine
from nybble.server.http.cors import Cors
from nybble.server.http.tls import tls_context

from ..client import CHAT, HELLO, Client, run
from ..conftest import running_server

PAGE = "https://app.example"
BODY = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
ASKS = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def cors_headers(response: aiohttp.ClientResponse) -> set[str]:
    return {name for name in response.headers if name.startswith("Access-Control")}


def test_pages_from_elsewhere_may_read_nothing_by_default(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        headers = {"Origin": PAGE, "Authorization": "Bearer secret"}
        async with client.post(CHAT, json=BODY, headers=headers) as response:
            assert response.status == 200
            assert not cors_headers(response)
        async with client.options(CHAT, headers=ASKS) as response:
            assert response.status == 401
            assert not cors_headers(response)

    run(engine, scenario, api_keys=["secret"])


def test_a_preflight_from_elsewhere_is_not_answered_without_keys_either(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        async with client.options(CHAT, headers=ASKS) as response:
            assert response.status == 405
            assert not cors_headers(response)

    run(engine, scenario)


def test_an_allowed_page_is_told_so_by_preflights_answers_errors_and_streams(
    engine: Engine,
) -> None:
    async def scenario(client: Client) -> None:
        # Browsers send no key with a preflight.
        async with client.options(CHAT, headers=ASKS) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == PAGE
            assert "POST" in response.headers["Access-Control-Allow-Methods"]
            assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        for key, status in (("k", 200), ("wrong", 401)):
            for stream in (False, True):
                headers = {"Origin": PAGE, "Authorization": f"Bearer {key}"}
                body = {**BODY, "stream": stream}
                async with client.post(CHAT, json=body, headers=headers) as response:
                    assert response.status == status
                    assert response.headers["Access-Control-Allow-Origin"] == PAGE
                    assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
                    assert response.headers["Vary"] == "Origin"
                    assert "Access-Control-Allow-Credentials" not in response.headers
        for origin in ("https://app.example.evil", "https://evil", "null", "http://app.example"):
            async with client.options(CHAT, headers={**ASKS, "Origin": origin}) as response:
                assert not cors_headers(response)
                assert response.headers["Vary"] == "Origin"

    run(engine, scenario, cors=Cors([PAGE]), api_keys=["k"])


def test_any_page_may_be_allowed_but_never_with_a_browsers_own_credentials(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        async with client.options(CHAT, headers=ASKS) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            assert "Access-Control-Allow-Credentials" not in response.headers

    run(engine, scenario, cors=Cors(["*"]))


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "", "://x"])
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ValueError, match="--allowed-origins"):
        Cors([origin])


def test_a_certificate_makes_the_server_speak_https_alone(
    tiny_model: Callable[..., Path], certificate: tuple[Path, Path]
) -> None:
    options = ("--ssl-certfile", str(certificate[0]), "--ssl-keyfile", str(certificate[1]))
    with running_server(tiny_model(), *options) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(certificate[0]))

        async def scenario() -> None:
            async with aiohttp.ClientSession() as session:
                url = server.url + CHAT
                async with session.post(url, json=BODY, ssl=trusting) as response:
                    assert (await response.json())["object"] == "chat.completion"
                with pytest.raises(aiohttp.ClientError):
                    await session.post(url.replace("https", "http"), json=BODY)

        asyncio.run(scenario())


def test_a_certificate_without_its_key_is_refused(certificate: tuple[Path, Path]) -> None:
    context = tls_context(*certificate)
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    with pytest.raises(ValueError, match="no certificate with its unencrypted key"):
        tls_context(certificate[0], None)
    encrypted = certificate[1].with_name("encrypted.pem")
    subprocess.run(
        [
            *("openssl", "ec", "-in", certificate[1], "-aes128", "-passout", "pass:x"),
            *("-out", encrypted),
        ],
        check=True,
        capture_output=True,
    )
    with pytest.raises(ValueError, match="unencrypted"):
        tls_context(certificate[0], encrypted)


def test_a_malformed_request_is_answered_and_its_key_not_logged(
    tiny_model: Callable[..., Path],
) -> None:
    secret = b"swordfish"
    heads = [
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\x00\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization %b\r\n\r\n",
        b"GET /v1/completions?key=%b HTTP/1.1\r\nHost: x\r\nContent-Length: %b\r\n\r\n",
        b"%b\r\n\r\n",
    ]
    with running_server(tiny_model(), "--log-level", "debug") as server:
        host, port = server.url.removeprefix("http://").split(":")
        for head in heads:
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(head.replace(b"%b", secret))
                assert connection.recv(1 << 16).startswith(b"HTTP/1.0 400")
        server.terminate()
        log = server.log()
    assert "shutting down" in log
    assert secret.decode() not in log


SOURCES = ("engine", "finetune", "kernels", "loaders", "quantizers", "server", "load_tests")
PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}


def test_no_module_unpickles_anything() -> None:
    """Only tensors are read by torch.load, which its weights_only asks for."""
    root = Path(__file__).parents[3]
    found = []
    files = [file for source in SOURCES for file in (root / source).rglob("*.py")]
    assert len(files) > 100
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
                unpickles = bool(names & PICKLERS)
            elif isinstance(node, ast.ImportFrom):
                unpickles = (node.module or "").partition(".")[0] in PICKLERS
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
                unpickles = (
                    (name == "torch.load" and keywords.get("weights_only") != "True")
                    or keywords.get("allow_pickle") == "True"
                    or keywords.get("trust_remote_code") == "True"
                    or name in ("eval", "exec")
                )
            else:
                continue
            if unpickles:
                found.append(f"{file.relative_to(root)}:{node.lineno}")
    assert not found
