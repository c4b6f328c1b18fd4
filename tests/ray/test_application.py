"""The Ray Serve application: affinity, a killed server, scaling, rolling updates."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from ray import serve

from nybble.server.ray.application import ServerArguments, balancer, servers


@pytest.fixture
def site(cluster: None, model: Path, adapters: Path) -> Iterator[Callable[..., Site]]:
    """``site(**arguments)`` runs the application, or updates it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    options = {
        "served-model-name": "tiny",
        "device": "cpu",
        "kv-cache-memory": "16MiB",
        "max-lora-rank": 8,
        "lora-source": str(adapters),
    }

    first = balancer({"host": "127.0.0.1", "port": port})
    serve.run(first, name="balancer", route_prefix="/balancer")

    def run(**arguments: Any) -> Site:
        options.update(arguments.pop("options", {}))
        whole = {
            "model": str(model),
            "shutdown_timeout": 300,  # a busy machine takes long to finish streams
            "options": options,
            **arguments,
        }
        serve.run(servers(whole), name="nybble", route_prefix="/servers")
        return Site(f"http://127.0.0.1:{port}")

    yield run
    serve.delete("nybble")
    serve.delete("balancer")


class Site:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(
        self, model: str, tokens: int = 4, client: httpx.Client | None = None
    ) -> httpx.Response:
        body = {"model": model, "prompt": "the fox", "max_tokens": tokens, "ignore_eos": True}
        post = httpx.post if client is None else client.post
        return post(f"{self.url}/v1/completions", json=body, timeout=120)

    def stream(self, model: str, began: Callable[[], object], tokens: int) -> str:
        """The body of a streamed answer. Raises httpx.RemoteProtocolError if it breaks.

        began: called with each piece.
        """
        body = {"model": model, "prompt": "a", "max_tokens": tokens, "ignore_eos": True}
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json={**body, "stream": True}, timeout=120
        ) as response:
            assert response.status_code == 200
            text = ""
            for piece in response.iter_text():
                began()
                text += piece
            return text

    def servers(self) -> list[str]:
        handle = serve.get_deployment_handle("Balancer", "balancer")
        return sorted(handle.servers.remote().result())

    def requests(self) -> int:
        """How many were for a server, whether or not there was one."""
        handle = serve.get_deployment_handle("Balancer", "balancer")
        return int(handle.requests.remote().result())

    def until(self, done: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.servers()
            time.sleep(0.2)

    def pid(self, address: str) -> int:
        port = address.rsplit(":", 1)[1]
        found = subprocess.run(
            ["pgrep", "-f", f"nybble.server.replicas.one .*--port {port}$"],
            capture_output=True,
            text=True,
        )
        pids = {int(pid) for pid in found.stdout.split()}
        (server,) = (pid for pid in pids if parent(pid) not in pids)  # not the keeper beside it
        return server

    def sequences(self, address: str) -> Counter[str]:
        """How many sequences of each adapter a server had."""
        text = httpx.get(f"http://{address}/metrics").text
        found = re.findall(r'nybble_adapter_sequences_total\{adapter="(\w+)"\} (\S+)', text)
        return Counter({name: int(float(number)) for name, number in found})


class Load:
    """Requests one after the other from a few threads, until it is told to stop."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._stop = threading.Event()
        self.statuses: list[int | str] = []
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def _ask(self, i: int) -> None:
        while not self._stop.is_set():
            try:
                answer = self._site.ask(f"b{i}", tokens=8)
                self.statuses.append(200 if answer.status_code == 200 else answer.text)
            except httpx.HTTPError as error:
                self.statuses.append(repr(error))
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Streams:
    """A long stream for each of the adapters a0 to a7 at once.

    last: of each that has ended, the data of its last event.
    """

    def __init__(self, site: Site) -> None:
        """All have begun when this returns."""
        self.last: dict[str, str] = {}
        self._site = site
        self._began = {f"a{i}": threading.Event() for i in range(8)}
        self._threads = [
            threading.Thread(target=self._stream, args=(name,)) for name in self._began
        ]
        self._had = {address: site.sequences(address) for address in site.servers()}
        for thread in self._threads:
            thread.start()
        for each in self._began.values():
            assert each.wait(60)

    def at(self, address: str) -> set[str]:
        """The adapters whose streams a server has, or has had. One whose server was full has gone
        to another."""
        return set(self._site.sequences(address) - self._had[address]) & set(self._began)

    def _stream(self, model: str) -> None:
        text = self._site.stream(model, self._began[model].set, tokens=4000)
        self.last[model] = text.strip().splitlines()[-1].removeprefix("data: ")

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def test_adapters_meet_and_a_killed_server_is_replaced(site: Callable[..., Site]) -> None:
    nybble = site(min_replicas=2, max_replicas=2)
    nybble.until(lambda: len(nybble.servers()) == 2)
    # An adapter's requests meet at one server. On one connection: by another, HAProxy could get the
    # next one before it has done with the last, and count two.
    with httpx.Client() as client:
        for _ in range(3):
            for i in range(8):
                assert nybble.ask(f"a{i}", client=client).status_code == 200
    before = nybble.servers()
    first, second = (set(nybble.sequences(address)) for address in before)
    assert first | second == {f"a{i}" for i in range(8)}
    assert not first & second
    # A killed server: its streams end with an error, other requests go elsewhere, and Ray starts
    # another.
    with Load(nybble) as load:
        server = nybble.pid(before[0])
        streams = Streams(nybble)
        os.kill(server, signal.SIGKILL)
        streams.join()
        left = streams.at(before[1])
        nybble.until(lambda: len(nybble.servers()) == 2 and nybble.servers() != before)
    assert set(load.statuses) == {200}
    killed = set(streams.last) - left
    assert killed
    assert {model for model, last in streams.last.items() if last != "[DONE]"} == killed
    assert {json.loads(streams.last[each])["error"]["code"] for each in killed} == {"engine_failed"}


def test_a_rolling_update_loses_no_request_and_ends_streams_whole(
    site: Callable[..., Site],
) -> None:
    servers = {"min_replicas": 2, "max_replicas": 2}
    nybble = site(**servers)
    nybble.until(lambda: len(nybble.servers()) == 2)
    before = nybble.servers()
    changed = {**servers, "options": {"max-num-seqs": 32}}
    with Load(nybble) as load:
        streams = Streams(nybble)
        at = {address: streams.at(address) for address in before}
        assert all(at.values())
        updating = threading.Thread(target=site, kwargs=changed)
        updating.start()
        nybble.until(lambda: set(nybble.servers()) < set(before))
        (leaving,) = set(before) - set(nybble.servers())
        # It has left the balancer, and still streams.
        assert at[leaving] - set(streams.last)
        updating.join()
        nybble.until(lambda: len(nybble.servers()) == 2 and not set(nybble.servers()) & set(before))
        streams.join()
    assert streams.last == dict.fromkeys(streams.last, "[DONE]")
    assert len(streams.last) == 8
    assert set(load.statuses) == {200}
    for i in range(8):
        assert nybble.ask(f"a{i}").status_code == 200
    new = sum((nybble.sequences(address) for address in nybble.servers()), Counter())
    assert set(new) >= {f"a{i}" for i in range(8)}


def test_no_process_of_ray_is_between_a_client_and_its_server(site: Callable[..., Site]) -> None:
    nybble = site(min_replicas=2, max_replicas=2)
    nybble.until(lambda: len(nybble.servers()) == 2)
    streams = 16
    began = [threading.Event() for _ in range(streams)]
    texts: list[str] = []

    def stream(i: int) -> None:
        texts.append(nybble.stream(f"a{i % 8}", began[i].set, tokens=1000))

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(streams)]
    for thread in threads:
        thread.start()
    for each in began:
        assert each.wait(60)
    found = connections()
    for thread in threads:
        thread.join()
    # HAProxy has the clients' connections, and from it there is one to a server for each.
    front = int(nybble.url.rpartition(":")[2])
    servers = {int(address.rpartition(":")[2]): address for address in nybble.servers()}
    assert Counter(name(pid) for pid, local, _ in found if local == front) == {"haproxy": streams}
    behind = Counter(name(pid) for pid, _, remote in found if remote in servers)
    assert behind["haproxy"] >= streams  # and Ray asks for health and load
    for port, address in servers.items():
        server, holders = nybble.pid(address), {pid for pid, local, _ in found if local == port}
        assert server in holders
        assert {parent(pid) for pid in holders - {server}} <= {server}  # for its last words
    assert not any("ProxyActor" in command for command in commands().values())
    chunks = "".join(texts).count("data: {")
    assert chunks > streams * 500  # a token may be a part of a character


def connections() -> list[tuple[int, int, int]]:
    """Of each end of a TCP connection of this machine, each process that has it, its port, and the
    other's."""
    holders: dict[str, set[int]] = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            holders.setdefault(os.readlink(link), set()).add(int(link.parts[2]))
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, remote, state, *_, inode = line.split()[:10]
            here, there = (int(end.rpartition(":")[2], 16) for end in (local, remote))
            if state == "01":
                found += [(pid, here, there) for pid in holders.get(f"socket:[{inode}]", ())]
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def commands() -> dict[int, str]:
    """The command lines of all processes."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
    return found


def test_a_single_server_is_replaced_without_a_moment_with_none(site: Callable[..., Site]) -> None:
    alone = {"min_replicas": 1, "max_replicas": 1, "surge_percent": 100}
    nybble = site(**alone)
    (before,) = nybble.servers()
    with Load(nybble) as load:
        site(**alone, options={"max-num-seqs": 32})
        nybble.until(lambda: len(nybble.servers()) == 1 and before not in nybble.servers())
    assert set(load.statuses) == {200}


def test_it_scales_with_the_load_and_to_zero_and_back(site: Callable[..., Site]) -> None:
    nybble = site(
        min_replicas=0, max_replicas=2, target_sequences=4, upscale_delay_s=1, downscale_delay_s=3
    )
    # Nobody asks: no server. The first request wakes one; clients try again meanwhile.
    nybble.until(lambda: nybble.servers() == [])
    assert httpx.get(f"{nybble.url}/-/healthz").status_code == 200  # what KubeRay asks
    assert httpx.get(f"{nybble.url}/health").status_code == 503
    assert nybble.requests() == 0  # probes are none: they wake no server
    assert nybble.ask("tiny").status_code == 503
    nybble.until(lambda: nybble.ask("tiny").status_code == 200)
    assert len(nybble.servers()) == 1
    # More than four at once: a second.
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            nybble.ask("tiny", tokens=100)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        nybble.until(lambda: len(nybble.servers()) == 2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    nybble.until(lambda: nybble.servers() == [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "model"),
        ({"model": "demo", "min_replicas": 3}, "min_replicas is 3, more than max_replicas 1"),
        ({"model": "demo", "options": {"port": 1}}, "port is set by the application"),
        ({"model": "demo", "options": {"ssl-certfile": "c.pem"}}, "HAProxy ends TLS"),
        ({"model": "demo", "options": {"response-store": "r"}}, "response-store is not for"),
        ({"model": "demo", "replicas": 3}, "replicas"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        servers(arguments)


def test_options_become_flags() -> None:
    options: dict[str, Any] = {"enable-lora": True, "api-key": ["a", "b"], "no-console": False}
    command = ServerArguments(model="demo", shutdown_timeout=2.5, options=options).command()
    assert command == [
        *("--model=demo", "--shutdown-timeout=2.5"),
        *("--enable-lora", "--api-key=a", "--api-key=b"),
    ]
