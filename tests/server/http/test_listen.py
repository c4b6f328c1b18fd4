"""Where a server can listen, and what it says of where it cannot."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from nybble.server.http.listen import bind, bind_unix, is_loopback

from ..conftest import running_server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_a_loopback_address_is_known_as_one(host: str) -> None:
    with bind(host, 0) as sock:
        assert is_loopback(sock)
    with bind("0.0.0.0", 0) as sock:
        assert not is_loopback(sock)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "[::1", "a" * 70])
def test_an_address_that_is_not_this_machines_is_not_blamed_on_the_port(host: str) -> None:
    with pytest.raises(OSError, match=r"--host .* is not an address of this machine") as error:
        bind(host, 0)
    assert "--port" not in str(error.value)


def test_a_taken_port_is() -> None:
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        with pytest.raises(OSError, match=r"in use; choose another --port"):
            bind("127.0.0.1", sock.getsockname()[1])


def test_a_unix_sockets_file_is_replaced_only_if_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "nybble.sock"
    bind_unix(path).close()  # as a process that was killed leaves it
    with bind_unix(path) as sock:
        sock.listen()
        assert not is_loopback(sock)
        with pytest.raises(OSError, match=r"--uds .*nybble.sock: another process listens on it"):
            bind_unix(path)
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(OSError, match=r"--uds .* exists and is not a socket"):
        bind_unix(file)
    with pytest.raises(OSError, match="cannot listen on --uds"):
        bind_unix(tmp_path / "absent" / "nybble.sock")
    with pytest.raises(OSError, match=r"--uds .*too long"):
        bind_unix(tmp_path / ("x" * 120))
    assert file.read_text() == "precious"


def test_a_server_serves_on_a_unix_socket_and_removes_it(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "nybble.sock"

    async def models() -> int:
        connector = aiohttp.UnixConnector(str(path))
        url = "http://any.example/v1/models"  # nobody can say by which names a proxy asks
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.get(url) as response,
        ):
            return response.status

    with running_server(tiny_model(), "--uds", str(path)) as server:
        assert path.is_socket()
        assert asyncio.run(models()) == 200
        server.terminate()
        assert "Traceback" not in server.log()
    assert not path.exists()


def test_host_in_brackets_reaches_the_socket() -> None:
    with bind("[::1]", 0) as sock:
        assert sock.family == socket.AF_INET6
