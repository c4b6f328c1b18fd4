"""Runs the servers and HAProxy: starts them, starts again those that end, replaces them in turn."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout

from nybble.server.observability.logs import LogEvent
from nybble.server.replicas.balancer import HAProxy

logger = logging.getLogger(__name__)

# A server that ends is started again after one second, then two, up to half a minute.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_POLL_SECONDS = 0.2
# After SIGTERM a server finishes its requests, and HAProxy must have seen that it takes no more.
_GRACE_SECONDS = 15.0
# HAProxy asks a server each half a second. It must see that one is back before the next goes.
_SETTLE_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """What is run.

    host, port: HAProxy's address. The servers have the ports after it, on 127.0.0.1.
    arguments: of each ``nybble serve``, besides its address.
    environments: what each server's environment has besides this process's; one for each server.
    shutdown_timeout: seconds which a server's requests in flight have to finish.
    shared_registry: whether the servers share adapters that are loaded over the API.
    certificate, key: PEM files, for https between HAProxy and clients; key is None if it is in the
        certificate's file.
    """

    host: str
    port: int
    arguments: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    shutdown_timeout: float = 30
    shared_registry: bool = False
    certificate: Path | None = None
    key: Path | None = None

    @property
    def url(self) -> str:
        """What clients use."""
        return f"{'http' if self.certificate is None else 'https'}://{self.bind}/v1"

    @property
    def bind(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def addresses(self) -> list[str]:
        """``address:port`` of each server."""
        return [f"127.0.0.1:{self.port + i}" for i in range(1, len(self.environments) + 1)]


class ReplicaError(RuntimeError):
    """A server that ended before it was ready for the first time, or HAProxy's end."""


def find_haproxy() -> str:
    """HAProxy's path. Raises FileNotFoundError with what to do."""
    path = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if path is None:
        raise FileNotFoundError(
            "haproxy is not installed; it shares the requests among the replicas: "
            "apt install haproxy (2.6 or newer)"
        )
    return path


@dataclass(eq=False)
class Replica:
    """One server, over all of its processes.

    name: ``replica1`` and so on, as HAProxy calls it.
    stopping: whether its process is meant to end.
    """

    name: str
    address: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    process: Process | None = None
    stopping: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> Process:
        """Start a process; it is not ready yet."""
        self.ready.clear()
        self.stopping = False
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "nybble.server.replicas.one", *self.arguments),
            *("--host", "127.0.0.1", "--port", self.address.rsplit(":", 1)[1]),
            env={**os.environ, **self.environment},
            # Ctrl-C is for this process, which then stops the servers in order.
            start_new_session=True,
        )
        logger.info(LogEvent("started", {"replica": self.name, "pid": self.process.pid}))
        return self.process

    async def become_ready(self, process: Process, http: ClientSession) -> bool:
        """Wait until /health answers 200; False if the process ends first."""
        while process.returncode is None:
            try:
                async with http.get(f"http://{self.address}/health") as response:
                    # Another process may hold the port: then ours ends by itself.
                    if response.status == 200 and process.returncode is None:
                        self.ready.set()
                        logger.info(LogEvent("ready", {"replica": self.name}))
                        return True
            except (ClientError, TimeoutError):
                pass
            await asyncio.sleep(_POLL_SECONDS)
        return False

    async def stop(self, seconds: float) -> None:
        """Let the process finish its requests, for at most so long."""
        self.stopping = True
        if self.process is None or self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), seconds)
        except TimeoutError:
            logger.warning(LogEvent("killed", {"replica": self.name}))
            self.process.kill()
            await self.process.wait()


class Supervisor:
    """SIGTERM and SIGINT end everything in order, SIGHUP replaces one server after the other."""

    def __init__(self, settings: ReplicaSettings, haproxy: str) -> None:
        """haproxy: path of the program."""
        self._settings = settings
        self._haproxy = haproxy
        self._seconds = settings.shutdown_timeout + _GRACE_SECONDS
        self._ending = asyncio.Event()
        self._rolling = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.replicas = [
            Replica(f"replica{i}", address, settings.arguments, environment)
            for i, (address, environment) in enumerate(
                zip(settings.addresses, settings.environments, strict=True), 1
            )
        ]

    async def run(self) -> None:
        """Run until a signal. Nothing is left running then.

        Raises ReplicaError, and ValueError if the certificate cannot be used.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ending.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._replace_all()))
        balancer = None
        try:
            async with ClientSession(timeout=ClientTimeout(total=5)) as http:
                self._http = http
                settings = self._settings
                # Before the servers: a port that is taken is found out at once.
                balancer = self._balancer = await HAProxy.start(
                    self._haproxy,
                    settings.bind,
                    settings.addresses,
                    certificate=settings.certificate,
                    key=settings.key,
                    shared_registry=settings.shared_registry,
                )
                await self._serve(balancer.process)
        finally:
            await self._end(None if balancer is None else balancer.process)

    async def _serve(self, balancer: Process) -> None:
        """Start the servers, and return once a signal came. Raises ReplicaError."""
        ended = asyncio.create_task(balancer.wait())
        signalled = asyncio.create_task(self._ending.wait())
        starting = asyncio.create_task(self._start_all())
        awaited: set[asyncio.Future[Any]] = {ended, signalled, starting}
        try:
            await asyncio.wait(awaited, return_when="FIRST_COMPLETED")
            if starting.done():
                starting.result()
                await asyncio.wait(awaited - {starting}, return_when="FIRST_COMPLETED")
            if not self._ending.is_set():
                raise ReplicaError(f"haproxy ended with code {balancer.returncode}")
        finally:
            for task in awaited:
                task.cancel()

    async def _start_all(self) -> None:
        # The first server packs the model if need be; the others map what it packed.
        for group in (self.replicas[:1], self.replicas[1:]):
            await asyncio.gather(*(self._first_start(each) for each in group))
        fields = {"url": self._settings.url, "replicas": len(self.replicas)}
        logger.info(LogEvent("serving", fields))

    async def _first_start(self, replica: Replica) -> None:
        process = await replica.start()
        if not await replica.become_ready(process, self._http):
            raise ReplicaError(
                f"{replica.name} ended with code {process.returncode} before it was ready"
            )
        self._spawn(self._keep(replica))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, replica: Replica) -> None:
        """Start a replica's server again whenever it ends."""
        pause = _FIRST_PAUSE
        while True:
            assert replica.process is not None
            process = replica.process
            code = await process.wait()
            replica.ready.clear()
            if replica.stopping:
                pause = _FIRST_PAUSE
            else:
                fields = {"replica": replica.name, "code": code, "again_in_seconds": pause}
                logger.error(LogEvent("ended", fields))
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            process = await replica.start()
            if await replica.become_ready(process, self._http):
                pause = _FIRST_PAUSE

    async def _replace_all(self) -> None:
        """Replace one server after the other, each only while all others are ready."""
        if self._rolling.locked():
            logger.warning("the servers are being replaced already")
            return
        async with self._rolling:
            for replica in self.replicas:
                await asyncio.gather(*(each.ready.wait() for each in self.replicas))
                logger.info(LogEvent("replacing", {"replica": replica.name}))
                replica.ready.clear()
                # Not left to the health check: until it fails, requests would get 503.
                await self._tell_haproxy(f"set server servers/{replica.name} state drain")
                await replica.stop(self._seconds)
                await replica.ready.wait()
                await self._tell_haproxy(f"set server servers/{replica.name} state ready")
                await asyncio.sleep(_SETTLE_SECONDS)
            logger.info("every server has been replaced")

    async def _tell_haproxy(self, command: str) -> None:
        answer = await self._balancer.command(command)
        if answer:
            logger.warning("haproxy: %s: %s", command, answer)

    async def _end(self, balancer: Process | None) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if balancer is not None and balancer.returncode is None:
            balancer.send_signal(signal.SIGUSR1)  # no new connections; old ones end
        await asyncio.gather(*(each.stop(self._seconds) for each in self.replicas))
        if balancer is not None and balancer.returncode is None:
            balancer.terminate()
            await balancer.wait()
