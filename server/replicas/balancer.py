"""HAProxy's process.

It reads its configuration and its certificate from memory, and takes commands on a socket without a
name: no file is left of it, however it and the process above it end.
"""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio.subprocess import Process
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from nybble.server.http.tls import tls_context
from nybble.server.replicas.haproxy import configuration
from nybble.server.replicas.parent import end_with_parent


class HAProxy:
    """A running HAProxy. process: ends with this one, however that goes."""

    def __init__(self, process: Process, commands: socket.socket) -> None:
        self.process = process
        self._commands = commands

    @classmethod
    async def start(
        cls,
        path: str,
        bind: str,
        servers: Sequence[str | None],
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        shared_registry: bool = False,
        alive_path: str | None = None,
    ) -> HAProxy:
        """Start the program at ``path``; the rest is as for :func:`configuration`.

        key: None if it is in the certificate's file.
        Raises ValueError if the two cannot be read or do not belong together.
        """
        pem = b""
        if certificate is not None:
            tls_context(certificate, key)
            pem = b"\n".join(each.read_bytes() for each in (certificate, key) if each is not None)
        ours, its = socket.socketpair()
        with its, _in_memory(pem) as both:
            text = configuration(
                bind,
                servers,
                f"sockpair@{its.fileno()}",
                shared_registry=shared_registry,
                certificate=_path(both) if pem else None,
                alive_path=alive_path,
            )
            with _in_memory(text.encode()) as file:
                process = await asyncio.create_subprocess_exec(
                    *(path, "-db", "-f", str(_path(file))),
                    pass_fds=[each.fileno() for each in (its, both, file)],
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
        return cls(process, ours)

    async def command(self, command: str) -> str:
        """What HAProxy answers, without the space around it. Raises OSError if it has ended.

        Source: https://docs.haproxy.org/2.6/management.html, 9.3.
        """
        here, there = socket.socketpair()
        with there:
            socket.send_fds(self._commands, [b"\0"], [there.fileno()])
        reader, writer = await asyncio.open_connection(sock=here)
        writer.write(f"{command}\n".encode())
        answer = (await reader.read()).decode().strip()
        writer.close()
        return answer


def _in_memory(content: bytes) -> BinaryIO:
    file = os.fdopen(os.memfd_create("haproxy"), "wb")
    file.write(content)
    file.flush()
    return file


def _path(file: BinaryIO) -> Path:
    """For a process which has the file too."""
    return Path(f"/proc/self/fd/{file.fileno()}")
