"""The real HAProxy before two tiny servers: adapters by affinity, a kill, a rolling restart."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from nybble.server.cli.main import app
from nybble.server.replicas.haproxy import configuration

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-P", "-c", "from nybble.server.cli.main import main; main()"]
PATIENCE = 600  # seconds; on a busy machine a server starts in more than a minute
needs_haproxy = pytest.mark.skipif(
    shutil.which("haproxy") is None, reason="haproxy is not installed (apt install haproxy)"
)


@dataclass
class Site:
    process: subprocess.Popen[str]
    url: str
    port: int
    lines: list[str]

    def pids(self) -> list[int]:
        """The process of each server, as the log says it last."""
        found = dict(re.findall(r"started replica=replica(\d) pid=(\d+)", "".join(self.lines)))
        return [int(found[name]) for name in sorted(found)]

    def said(self, text: str) -> int:
        """How many times."""
        return "".join(self.lines).count(text)

    def until(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.said(text) < times:
            assert time.monotonic() < deadline, "".join(self.lines)
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)

    def ask(
        self, model: str, tokens: int = 4, client: httpx.Client | None = None, **fields: object
    ) -> httpx.Response:
        body = {"model": model, "prompt": "the fox", "max_tokens": tokens, "ignore_eos": True}
        post = httpx.post if client is None else client.post
        return post(f"{self.url}/v1/completions", json=body | fields, timeout=120)

    def sequences(self) -> list[dict[str, float]]:
        """Of each server, how many sequences each adapter had."""
        texts = [httpx.get(f"http://127.0.0.1:{self.port + i}/metrics").text for i in (1, 2)]
        pattern = r'nybble_adapter_sequences_total\{adapter="(\w+)"\} (\S+)'
        return [{name: float(n) for name, n in re.findall(pattern, text)} for text in texts]


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nothing listens on."""
    for port in range(20000 + os.getpid() % 5000, 60000, count):
        held = [socket.socket() for _ in range(count)]
        try:
            for i, each in enumerate(held):
                each.bind(("127.0.0.1", port + i))
            return port
        except OSError:
            continue
        finally:
            for each in held:
                each.close()
    raise AssertionError("no free ports")


@contextmanager
def ready_site(count: int, scheme: str, *options: str) -> Iterator[Site]:
    """``nybble replicas`` with servers that are ready, and with no file in TMPDIR, which would be
    left if all were killed at once."""
    port = free_ports(count + 1)
    with TemporaryDirectory() as scratch:
        process = subprocess.Popen(
            [
                *(*COMMAND, "replicas", "--count", str(count), "--port", str(port)),
                *("--served-model-name", "tiny", "--kv-cache-memory", "16MiB", "--device", "cpu"),
                *options,
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch},
        )
        site = Site(process, f"{scheme}://127.0.0.1:{port}", port, [])
        assert process.stderr is not None
        reader = threading.Thread(target=site.lines.extend, args=(process.stderr,), daemon=True)
        reader.start()
        try:
            site.until(f"serving url={site.url}/v1")
            for i in range(1, count + 1):
                site.until(f"servers/replica{i} is UP")
            assert os.listdir(scratch) == []
            yield site
        finally:
            process.kill()
            process.wait()


@contextmanager
def running_site(count: int, scheme: str, *options: str) -> Iterator[Site]:
    """:func:`ready_site`, which ends in order."""
    with ready_site(count, scheme, *options) as site:
        yield site
        servers = site.pids()
        site.process.terminate()
        assert site.process.wait(PATIENCE) == 0, "".join(site.lines)
        for pid in servers:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


@pytest.fixture(scope="module")
def options(tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]) -> list[str]:
    """A model with the adapters a0 to a7 and b0 to b3."""
    names = [*(f"a{i}" for i in range(8)), *(f"b{i}" for i in range(4))]
    adapters = [f"--lora-modules={name}={tiny_adapter(seed=1)}" for name in names]
    return ["--model", str(tiny_model(max_length=4096)), *adapters, "--max-lora-rank", "8"]


@pytest.fixture(scope="module")
def site(options: list[str]) -> Iterator[Site]:
    # A busy machine takes long to finish streams.
    with running_site(2, "http", *options, "--shutdown-timeout", "600") as site:
        yield site


@needs_haproxy
def test_an_adapters_requests_meet_at_one_server(site: Site) -> None:
    # On one connection: by another, HAProxy could get the next request before it has done with the
    # last, and count two.
    with httpx.Client() as client:
        for _ in range(3):
            for i in range(8):
                assert site.ask(f"a{i}", client=client).status_code == 200
                assert site.ask("tiny", client=client, adapter=f"a{i}").status_code == 200
    first, second = site.sequences()
    assert first
    assert second
    assert not first.keys() & second.keys()
    assert sum(first.values()) + sum(second.values()) == 48


@needs_haproxy
def test_what_speaks_of_one_server_is_refused_and_says_what_to_do(site: Site) -> None:
    assert httpx.get(f"{site.url}/health").status_code == 200
    refused = httpx.get(f"{site.url}/metrics")
    assert refused.status_code == 404
    assert f"http://127.0.0.1:{site.port + 1}/metrics" in refused.json()["error"]["message"]
    refused = httpx.post(f"{site.url}/v1/load_lora_adapter", json={})
    assert refused.status_code == 501
    assert "--lora-registry" in refused.json()["error"]["message"]
    assert {model["id"] for model in httpx.get(f"{site.url}/v1/models").json()["data"]} >= {"tiny"}


class Load:
    """Requests one after the other from a few threads, for adapters of its own, until it stops."""

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
                self.statuses.append(answer.status_code)
            except httpx.HTTPError as error:
                self.statuses.append(repr(error))
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Streams:
    """A stream for each model at once. last: of each that has ended, the data of its last event."""

    def __init__(self, site: Site, models: list[str], tokens: int) -> None:
        """All have begun when this returns."""
        self.last: dict[str, str] = {}
        self._site, self._tokens = site, tokens
        self._began = {model: threading.Event() for model in models}
        self._threads = [threading.Thread(target=self._stream, args=(model,)) for model in models]
        for thread in self._threads:
            thread.start()
        for each in self._began.values():
            assert each.wait(60)

    def _stream(self, model: str) -> None:
        body = {"model": model, "prompt": "a", "max_tokens": self._tokens, "ignore_eos": True}
        url = f"{self._site.url}/v1/completions"
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=120) as response:
            assert response.status_code == 200
            text = ""
            for piece in response.iter_text():
                self._began[model].set()
                text += piece
        self.last[model] = text.strip().splitlines()[-1].removeprefix("data: ")

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def kill_under_load(
    site: Site, of: Callable[[int], int], statuses: Sequence[int] = (200,)
) -> list[dict[str, str]]:
    """Kill a process of the first server, which is started again; the errors of its streams.

    of: which process, given the server's. Streams that began cannot be taken over: their clients
    are told. All others get one of ``statuses``.
    """
    models = [f"a{i}" for i in range(8)]
    for model in models:
        assert site.ask(model).status_code == 200
    before, ups = site.sequences()[0], site.said("servers/replica1 is UP")
    with Load(site) as load:
        streams = Streams(site, models, 2000)  # so long that none ends before the kill
        # Those that came while a server was full have gone to the other.
        there = site.sequences()[0]
        killed = {model for model in models if there.get(model, 0) > before.get(model, 0)}
        victim = site.pids()[0]
        os.kill(of(victim), signal.SIGKILL)
        streams.join()
        site.until("servers/replica1 is UP", times=ups + 1)
    assert killed
    assert {model for model, last in streams.last.items() if last != "[DONE]"} == killed
    assert site.pids()[0] != victim
    assert 200 in load.statuses
    assert set(load.statuses) <= set(statuses)
    return [json.loads(streams.last[model])["error"] for model in killed]


@needs_haproxy
def test_a_killed_server_loses_no_request_and_its_streams_end_with_an_error(site: Site) -> None:
    errors = kill_under_load(site, lambda server: server)
    assert {error["code"] for error in errors} == {"engine_failed"}
    assert all("was killed" in error["message"] for error in errors)


class Fake(ThreadingHTTPServer):
    """A server whose answers to requests for the model ``slow…`` wait for ``go``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.go = threading.Event()
        self.waiting = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"slow" in body:
            self.server.waiting += 1
            self.server.go.wait(30)
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@needs_haproxy
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_server_is_left_by_all_though_the_other_is_busy(
    tmp_path: Path, victim: int
) -> None:
    """The busy one has more than its bound, so that the hash would return to the killed one."""
    fakes = [Fake(), Fake()]
    port = free_ports(1)
    servers = [f"127.0.0.1:{fake.server_port}" for fake in fakes]
    (tmp_path / "haproxy.cfg").write_text(configuration(f"127.0.0.1:{port}", servers))
    process = subprocess.Popen(
        ["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")],
        env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin"},
    )
    url = f"http://127.0.0.1:{port}/v1/completions"

    def ask(model: str) -> int:
        return httpx.post(url, json={"model": model}, timeout=60).status_code

    try:
        with ThreadPoolExecutor(32) as pool:
            until(lambda: not refuses(port))
            slow = [pool.submit(ask, f"slow{i}") for i in range(16)]
            until(lambda: sum(fake.waiting for fake in fakes) == 16)
            killed, busy = fakes[victim], fakes[1 - victim]
            assert busy.waiting
            killed.go.set()
            until(lambda: sum(each.done() for each in slow) == killed.waiting)
            killed.shutdown()
            killed.server_close()
            assert [ask(f"m{i}") for i in range(16)] == [200] * 16
            busy.go.set()
            assert {each.result() for each in slow} == {200}
    finally:
        process.kill()
        for fake in fakes:
            fake.go.set()
            fake.shutdown()  # else its thread would look at a closed socket for ever, without pause
            fake.server_close()


@needs_haproxy
def test_probes_are_answered_without_a_server(tmp_path: Path) -> None:
    """Where requests start a server, as on Ray, a probe is none."""
    port, control, file = free_ports(1), tmp_path / "control", tmp_path / "haproxy.cfg"
    file.write_text(configuration(f"127.0.0.1:{port}", [None], str(control), alive_path="/alive"))
    process = subprocess.Popen(
        ["haproxy", "-db", "-f", str(file)],
        env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin"},
    )

    def came() -> int:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(control))
            sock.sendall(b"show stat servers 2 -1\n")
            names, values, *_ = sock.makefile().read().splitlines()
        return int(dict(zip(names.split(","), values.split(","), strict=True))["stot"])

    try:
        until(lambda: not refuses(port))
        url = f"http://127.0.0.1:{port}"
        answers = [httpx.get(f"{url}{path}") for path in ("/health", "/ping", "/alive")]
        assert came() == 0
        answers.append(httpx.get(f"{url}/v1/models"))
        assert [answer.status_code for answer in answers] == [503, 503, 200, 503]
        assert came() == 1
        unavailable = answers[-1]
        assert unavailable.json()["error"]["code"] == "unavailable"
        for probe in answers[:2]:
            assert probe.json() == unavailable.json()
            assert probe.headers["Retry-After"] == unavailable.headers["Retry-After"]
    finally:
        process.kill()
        process.wait()


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def refuses(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
@needs_haproxy
def test_a_rolling_restart_loses_nothing(site: Site) -> None:
    """Streams of the server that goes end whole, while others have its requests, and then the new
    one."""
    models = [f"a{i}" for i in range(8)]  # of which both servers have some
    before, pids = site.sequences(), site.pids()
    with Load(site) as load:
        streams = Streams(site, models, 1000)
        there = site.sequences()
        draining = {name for name in models if there[0].get(name) != before[0].get(name)}
        assert draining
        site.process.send_signal(signal.SIGHUP)
        until(lambda: httpx.get(f"http://127.0.0.1:{site.port + 1}/health").status_code == 503)
        for model in draining:
            assert site.ask(model).status_code == 200
        # The other server has answered: on this one they still stream.
        assert not draining & set(streams.last)
        assert site.pids() == pids
        os.kill(pids[0], 0)
        site.until("every server has been replaced")
        streams.join()
    assert streams.last == dict.fromkeys(models, "[DONE]")
    assert set(load.statuses) == {200}
    assert not set(pids) & set(site.pids())
    for model in models:
        assert site.ask(model).status_code == 200
    assert set().union(*site.sequences()) >= set(models)  # these are the new ones' counts


@pytest.mark.slow
@needs_haproxy
def test_a_killed_rank_is_a_killed_server(options: list[str]) -> None:
    """Of servers that two ranks compute; of rank 0 it is the keeper which tells.

    A server outlives its rank 1 for as long as it takes to tell its clients. What was in the failed
    step may be what made it fail, so that no other server is given it: 500.
    """

    def rank_1(server: int) -> int:
        found = subprocess.run(
            ["pgrep", "-P", str(server), "-f", "multiprocessing-fork"],
            capture_output=True,
            text=True,
        )
        return int(found.stdout)

    with running_site(2, "http", *options, "--tensor-parallel-size", "2") as site:
        for of, said, statuses in (
            (rank_1, "rank 1 was ended by SIGKILL", (200, 500)),
            (lambda server: server, "the server was killed", (200,)),
        ):
            other = rank_1(site.pids()[0])
            errors = kill_under_load(site, of, statuses)
            assert {error["code"] for error in errors} == {"engine_failed"}
            assert all(said in error["message"] for error in errors)
            with pytest.raises(ProcessLookupError):
                os.kill(other, 0)


@pytest.mark.slow
@needs_haproxy
def test_nothing_outlives_the_command(options: list[str]) -> None:
    """If it is killed: its servers finish their requests, though HAProxy has ended."""
    with ready_site(1, "http", *options) as site:
        found = subprocess.run(
            ["pgrep", "-P", str(site.process.pid)], capture_output=True, text=True
        )
        children = [int(pid) for pid in found.stdout.split()]
        assert set(site.pids()) < set(children)
        site.process.kill()
        site.process.wait()
        until(lambda: not any(runs(pid) for pid in children))
        assert refuses(site.port)
        assert refuses(site.port + 1)


@pytest.mark.slow
@needs_haproxy
def test_haproxy_ends_tls_and_the_servers_speak_plain(
    tiny_model: Callable[..., Path], certificate: tuple[Path, Path]
) -> None:
    files = (f"--ssl-certfile={certificate[0]}", f"--ssl-keyfile={certificate[1]}")
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    with running_site(1, "https", "--model", str(tiny_model()), *files) as site:
        for url in (site.url, f"http://127.0.0.1:{site.port + 1}"):
            models = httpx.get(f"{url}/v1/models", verify=trusting).json()["data"]
            assert [model["id"] for model in models] == ["tiny"]
        with pytest.raises(httpx.HTTPError):
            httpx.get(site.url.replace("https", "http") + "/v1/models")


def test_the_example_is_what_the_command_prints() -> None:
    example = (ROOT / "deploy/haproxy/haproxy.cfg").read_text()
    servers = [f"127.0.0.1:{port}" for port in range(8001, 8005)]
    assert example == configuration("127.0.0.1:8000", servers)
    # With a registry an adapter may be loaded at any server.
    shared = configuration("127.0.0.1:8000", servers, shared_registry=True)
    lines = set(example.splitlines()) - set(shared.splitlines())
    assert len(lines) == 3
    assert all("administers" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "demo", "--device", "cpu"], "say with --count"),
        (["--count", "2"], "--model NAME"),
        (["--count", "2", "--model", "demo", "--fine-tuning"], "--fine-tuning is not for replicas"),
        (["--count", "2", "--model", "demo", "--no-such"], "No such option: --no-such"),
        (["--count", "2", "--model", "/nowhere/model"], "there is no /nowhere"),
        (["--count", "2", f"--ssl-keyfile={__file__}"], "--ssl-keyfile goes with --ssl-certfile"),
        (
            ["--print-config", f"--ssl-certfile={__file__}", f"--ssl-keyfile={__file__}"],
            f"HAProxy looks for the key in {__file__} and in {__file__}.key",
        ),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["replicas", *options])
    assert result.exit_code != 0
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())


def test_a_certificate_is_haproxys_and_not_the_servers(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["replicas", "--print-config", "--ssl-certfile", __file__])
    assert f"bind 127.0.0.1:8000 ssl crt '{__file__}' " in printed.stdout
    # A file of options is read by the servers.
    file = tmp_path / "nybble.toml"
    file.write_text(f'ssl-certfile = "{__file__}"\nmodel = "demo"\n')
    options = ["replicas", "--count", "2", "--config", str(file)]
    assert "HAProxy ends TLS" in CliRunner().invoke(app, options).stderr
