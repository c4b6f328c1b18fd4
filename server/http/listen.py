"""The address a server listens on."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address
from pathlib import Path

BACKLOG = 1024  # connections that wait to be accepted


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not listening yet; an IPv6 address may be in brackets.

    Raises OSError naming the option at fault.
    """
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"--host {host!r} is not an address of this machine: {error}") from error
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(_refusal(host, port, error)) from error
    return sock


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"--host {host!r} is not an address of this machine: 127.0.0.1 listens for programs on "
            "it, 0.0.0.0 on all of its addresses"
        )
    place = f"cannot listen on {host}:{port}: {error.strerror}"
    if error.errno == errno.EACCES and port < 1024:
        return f"{place}; a --port below 1024 needs a privilege: choose one from 1024 on"
    return f"{place}; choose another --port"


def bind_unix(path: Path) -> socket.socket:
    """A Unix domain socket bound to the path, not listening yet.

    A stale socket, as a killed process leaves it, is replaced. Raises OSError for a socket that is
    in use, and for a path that cannot be a socket.
    """
    if path.exists() and not path.is_socket():
        raise OSError(f"--uds {path} exists and is not a socket: choose another path")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            if _answers(path):
                raise OSError("another process listens on it")
            path.unlink()
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen on --uds {path}: {error.strerror or error}") from error
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def is_loopback(sock: socket.socket) -> bool:
    """Whether a bound socket has an address that only programs on this machine can reach."""
    if sock.family == socket.AF_UNIX:
        return False
    return ip_address(sock.getsockname()[0]).is_loopback
