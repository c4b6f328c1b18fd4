"""What clients of a stream are told if the server is killed, which then cannot tell them itself.

A small process beside the server, forked before anything large is imported, holds a duplicate of
each streaming connection and the event that ends it. It reads no token and writes none: the server
writes to the connection, as without it. Once the server has ended in the middle of a stream, by
SIGKILL or for want of memory, the connection is still open here, and the event is sent.

A connection is handed over before the head of its response, so that no stream begins without it. If
the server ends between the two, the kernel's count of what was written says that there is no head:
then nothing is sent, and a proxy may send the request to another server.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

from aiohttp import HttpVersion11, web

logger = logging.getLogger(__name__)

# The socket to the keeper, and its process.
_KEEPER = "NYBBLE_LAST_WORDS"
_END = struct.Struct("!Q")  # a stream's number
_BEGIN = struct.Struct("!QQ")  # the same, and the bytes that were written before; its words follow
_MOST_BYTES = 1 << 15
# Of Linux's struct tcp_info: tcpi_notsent_bytes, and tcpi_bytes_sent with tcpi_bytes_retrans.
_NOT_SENT, _SENT = struct.Struct("144xI"), struct.Struct("200xQQ")


def fork_keeper() -> None:
    """Fork the process that holds the connections of this one, which finds it by ``LastWords``.

    Without Linux's pidfd_open there is none: the connections of a killed server break.
    """
    if not hasattr(os, "pidfd_open"):
        return
    server = os.pidfd_open(os.getpid())
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keeper = os.fork()
    if keeper == 0:
        try:
            ours.close()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # it ends with the server
            _keep(its, server)
        finally:
            os._exit(0)
    its.close()
    os.close(server)
    os.environ[_KEEPER] = f"{ours.detach()} {keeper}"


def _keep(its: socket.socket, server: int) -> None:
    """Hold connections until the server has ended. server: its pidfd."""
    held: dict[int, tuple[socket.socket, int, bytes]] = {}
    either = select.poll()
    either.register(server, select.POLLIN)
    either.register(its, select.POLLIN)
    # Until all that it has said is read. Its end of the socket closes only once no thread of it can
    # write any more; another process that it has forked may have it still.
    while its.fileno() in {fd for fd, _ in either.poll()}:
        message, fds, _, _ = socket.recv_fds(its, _MOST_BYTES, 1)
        if not message:
            break
        if len(message) == _END.size:
            (number,) = _END.unpack(message)
            if number in held:
                held.pop(number)[0].close()
        elif fds:  # unless this process may have no more
            number, before = _BEGIN.unpack_from(message)
            held[number] = socket.socket(fileno=fds[0]), before, message[_BEGIN.size :]
    for connection, before, words in held.values():
        connection.setblocking(False)
        with suppress(OSError):  # a client that reads too little, or none
            if written(connection) > before:
                connection.sendall(words)
        connection.close()


def written(connection: socket.socket) -> int:
    """The bytes that were ever written to a TCP connection, whether or not they have arrived."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    waiting: int
    sent: int
    again: int
    (waiting,), (sent, again) = _NOT_SENT.unpack_from(info), _SENT.unpack_from(info)
    return waiting + sent - again


class LastWords:
    """The server's side."""

    def __init__(self, keeper: socket.socket, pid: int) -> None:
        keeper.setblocking(False)
        # Room for hundreds of streams which begin while the keeper gets no processor.
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._keeper: socket.socket | None = keeper
        self._pid = pid
        self._numbers = count()

    @classmethod
    def of_this_process(cls) -> LastWords | None:
        """Those of the keeper that was forked before, None if there is none."""
        keeper = os.environ.pop(_KEEPER, None)
        if keeper is None:
            return None
        fd, pid = map(int, keeper.split())
        return cls(socket.socket(fileno=fd), pid)

    @contextmanager
    def held(self, request: web.Request, event: bytes) -> Iterator[None]:
        """If the process is killed inside, the stream that answers a request ends with the event.

        The stream's head must be sent inside. Nothing is sent if it was not.
        """
        transport = request.transport
        if (
            transport is None
            or transport.get_extra_info("socket").family == socket.AF_UNIX
            or transport.get_extra_info("sslcontext") is not None  # only this process can encrypt
        ):
            yield
            return
        sock: socket.socket = transport.get_extra_info("socket")
        chunked = request.version >= HttpVersion11
        words = b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event) if chunked else event
        number = next(self._numbers)
        before = written(sock) + transport.get_write_buffer_size()
        self._tell(_BEGIN.pack(number, before) + words, sock.fileno())
        try:
            yield
        finally:
            self._tell(_END.pack(number))

    def _tell(self, message: bytes, *fds: int) -> None:
        """No stream may wait for the keeper: if it is gone or does not read, it is given up."""
        if self._keeper is None:
            return
        try:
            socket.send_fds(self._keeper, [message], fds)
        except OSError as error:
            logger.warning("streams will break without a last event if the server dies: %s", error)
            # What it has is no longer true. It must not take this for the server's end.
            os.kill(self._pid, signal.SIGKILL)
            self._keeper.close()
            self._keeper = None


LAST_WORDS = web.AppKey("last_words", LastWords)
