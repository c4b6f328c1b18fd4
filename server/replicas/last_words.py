"""What clients of a stream are told if the server is killed, which then cannot tell them itself.

A small process beside the server, forked before anything large is imported, holds a duplicate of
each streaming connection and the event that ends it. It reads no token and writes none: the server
writes to the connection, as without it. Once the server has ended in the middle of a stream, by
SIGKILL or for want of memory, the connection is still open here, and the event is sent.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

from aiohttp import web

logger = logging.getLogger(__name__)

_FD = "NYBBLE_LAST_WORDS_FD"
_BEGIN, _END = b"b", b"e"
_ID_BYTES = 8
_MOST_BYTES = 1 << 15
# A connection ends by the same exit as the process, a moment before it.
_EXIT_SECONDS = 1000


def fork_keeper() -> None:
    """Fork the process that holds the connections of this one, which finds it by ``LastWords``.

    Without Linux's pidfd_open there is none: the connections of a killed server break.
    """
    if not hasattr(os, "pidfd_open"):
        return
    server = os.pidfd_open(os.getpid())
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            ours.close()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # it ends with the server
            _keep(its, server)
        finally:
            os._exit(0)
    its.close()
    os.close(server)
    os.environ[_FD] = str(ours.detach())


def _keep(its: socket.socket, server: int) -> None:
    """Hold connections until the server has ended. server: its pidfd."""
    held: dict[bytes, tuple[socket.socket, bytes]] = {}
    ended = select.poll()
    ended.register(server, select.POLLIN)
    either = select.poll()
    either.register(server, select.POLLIN)
    either.register(its, select.POLLIN)
    while True:
        ready = {fd for fd, _ in either.poll()}
        if its.fileno() not in ready:
            break  # ended, and all that it has said is read
        message, fds, _, _ = socket.recv_fds(its, _MOST_BYTES + _ID_BYTES + 1, 1)
        if not message:
            break
        key, words = message[1 : 1 + _ID_BYTES], message[1 + _ID_BYTES :]
        if message[:1] == _BEGIN and fds:
            held[key] = (socket.socket(fileno=fds[0]), words)
        elif key in held:
            held.pop(key)[0].close()
    if not ended.poll(_EXIT_SECONDS):
        return  # the server lives and wants no keeper
    for connection, words in held.values():
        connection.setblocking(False)
        with suppress(OSError):  # a client that reads too little, or none
            connection.sendall(words)
        connection.close()


class LastWords:
    """The server's side."""

    def __init__(self, keeper: socket.socket) -> None:
        keeper.setblocking(False)
        self._keeper: socket.socket | None = keeper
        self._ids = count()

    @classmethod
    def of_this_process(cls) -> LastWords | None:
        """Those of the keeper that was forked before, None if there is none."""
        fd = os.environ.pop(_FD, None)
        return None if fd is None else cls(socket.socket(fileno=int(fd)))

    @contextmanager
    def held(
        self, response: web.StreamResponse, request: web.Request, event: bytes
    ) -> Iterator[None]:
        """If the process is killed inside, the stream ends with the event."""
        transport = request.transport
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            yield  # only this process can encrypt
            return
        chunked = response.headers.get("Transfer-Encoding") == "chunked"
        words = b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event) if chunked else event
        key = next(self._ids).to_bytes(_ID_BYTES, "big")
        self._tell(_BEGIN + key + words, transport.get_extra_info("socket").fileno())
        try:
            yield
        finally:
            self._tell(_END + key)

    def _tell(self, message: bytes, *fds: int) -> None:
        """No stream may wait for the keeper: if it is gone or does not read, it is given up."""
        if self._keeper is None:
            return
        try:
            socket.send_fds(self._keeper, [message], fds)
        except OSError as error:
            logger.warning("streams will break without a last event if the server dies: %s", error)
            self._keeper.close()
            self._keeper = None


LAST_WORDS = web.AppKey("last_words", LastWords)
