"""Ranks that die or hang under clients: these are told, and no process is left.

``pytest -m "" -rP`` shows how long it took from the fault until no process was left.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nybble.engine import engine_thread
from nybble.engine import ranks as rank_processes
from nybble.server.lifecycle import serve

from .conftest import Process, ask, opened

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "x",
    "max_tokens": 4000,
    "temperature": 0,
    "ignore_eos": True,
}
SHORT = LONG | {"max_tokens": 5}


def ranks_of(server: Process) -> list[int]:
    """The processes of the ranks above 0, in their order."""
    found = []
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == server.process.pid and b"--multiprocessing-fork" in command:
            found.append(int(folder.name))
    return found


def gone(pids: list[int], seconds: float = 10) -> bool:
    """Whether no such process runs any more, after so long at most."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@contextmanager
def streaming(server: Process) -> Iterator[Any]:
    """A stream that has begun."""
    with opened(server.origin + COMPLETIONS, LONG | {"stream": True}) as response:
        assert response.status == 200
        response.readline()
        yield response


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints how long it takes; no limit is set, because a busy machine is slower."""
    began = time.monotonic()
    yield
    print(f"{what}: no process left after {time.monotonic() - began:.1f} s")


@pytest.fixture
def start(
    launch: Callable[..., Process], tiny_model: Callable[..., Path], tmp_path: Path
) -> Callable[[int], Process]:
    """``start(ranks)``: a server of so many that is ready, and has nothing in TMPDIR, which
    would be left if all its processes were killed at once."""

    def start(size: int) -> Process:
        server = launch(tiny_model(max_length=4096), "--tensor-parallel-size", str(size))
        server.ready()
        assert not list((tmp_path / "t").iterdir())
        return server

    return start


@pytest.fixture
def server(start: Callable[[int], Process]) -> Process:
    return start(2)


@pytest.mark.parametrize(
    ("size", "rank", "number", "said"),
    [
        (2, 1, signal.SIGKILL, "was ended by SIGKILL"),
        pytest.param(2, 1, signal.SIGSTOP, "does not answer", marks=pytest.mark.slow),
        *(
            pytest.param(4, rank, signal.SIGKILL, "was ended by SIGKILL", marks=pytest.mark.slow)
            for rank in (1, 2, 3)
        ),
        pytest.param(4, 3, signal.SIGSTOP, "does not answer", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_or_hangs_in_a_step_ends_the_server(
    start: Callable[[int], Process], size: int, rank: int, number: int, said: str
) -> None:
    server, said = start(size), f"rank {rank} {said}"
    ranks = ranks_of(server)
    assert len(ranks) == size - 1
    plain: list[tuple[int, Any]] = []
    with streaming(server) as response:
        asking = threading.Thread(
            target=lambda: plain.append(ask(server.origin + COMPLETIONS, LONG))
        )
        asking.start()
        time.sleep(0.5)
        with timed(f"{signal.Signals(number).name} to rank {rank} of {size}"):
            os.kill(ranks[rank - 1], number)
            last = [line for line in response.read().splitlines() if line][-1]
            assert server.exit_code() == 70
            assert gone(ranks)
    asking.join()
    event = json.loads(last.removeprefix(b"data: "))
    ((status, body),) = plain
    assert event["error"]["code"] == body["error"]["code"] == "engine_failed"
    assert status == 500
    assert said in body["error"]["message"]
    assert said in server.lines[-1]


@pytest.mark.slow
def test_a_rank_without_memory_ends_the_server(server: Process) -> None:
    ranks = ranks_of(server)
    with streaming(server) as response, timed("no memory for rank 1 of 2"):
        resource.prlimit(ranks[0], resource.RLIMIT_AS, (1, 1))  # it gets no more
        status, body = ask(
            server.origin + COMPLETIONS, LONG | {"prompt": [5] * 3000, "max_tokens": 1}
        )
        last = [line for line in response.read().splitlines() if line][-1]
        assert server.exit_code() == 70
        assert gone(ranks)
    event = json.loads(last.removeprefix(b"data: "))
    assert event["error"]["code"] == body["error"]["code"] == "engine_failed"
    assert status == 500
    # An allocation fails, or the stack cannot grow.
    ways = r"rank 1(: .*[Mm]emory| was ended by SIG(SEGV|ABRT|BUS|KILL))"
    assert re.search(ways, body["error"]["message"])


def test_the_process_ends_within_ten_seconds_of_a_failure() -> None:
    """By what the code waits for, at most, one after the other: no clock is read here, because a
    busy machine is slower (2 and 7 s, killed and stopped, on two cores of which others use one)."""
    found = (
        rank_processes._SILENCE + rank_processes._LOOK_SECONDS
    )  # of a rank that hangs; the longest
    killed = rank_processes._LOOK_SECONDS + rank_processes._CAUSE_SECONDS
    # The engine's thread, twice: to see it, and to end. Clients: requests, and connections.
    told = 2 * engine_thread._PATIENCE_SECONDS + 2 * serve._FAILED_SECONDS
    assert max(found, killed) + told < 10


@pytest.mark.slow
def test_an_idle_server_whose_rank_dies_ends(server: Process) -> None:
    assert ask(server.origin + COMPLETIONS, SHORT)[0] == 200
    ranks = ranks_of(server)
    with timed("SIGKILL to rank 1 of 2, idle"):
        os.kill(ranks[0], signal.SIGKILL)
        assert server.exit_code() == 70
        assert gone(ranks)
    assert "rank 1 was ended by SIGKILL" in server.lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_nothing_outlives_the_server(
    start: Callable[[int], Process], tmp_path: Path, size: int
) -> None:
    server = start(size)
    ranks = ranks_of(server)
    with streaming(server) as response:
        with timed(f"SIGKILL to rank 0 of {size}"):
            server.signal(signal.SIGKILL)
            server.exit_code()
            assert gone(ranks)
        assert not list((tmp_path / "t").iterdir())
        # Nobody is left to say more: the body breaks off, as of any server that is killed. Behind
        # `nybble replicas` its keeper has the last word.
        with pytest.raises(http.client.IncompleteRead):
            response.read()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_requests_finish_when_all_processes_are_told_to_end(
    launch: Callable[..., Process], tiny_model: Callable[..., Path], number: int
) -> None:
    """As a terminal's Ctrl-C tells every process of a service, and systemd does."""
    options = ("--tensor-parallel-size", "2", "--shutdown-timeout", "300")
    server = launch(tiny_model(max_length=4096), *options, start_new_session=True)
    server.ready()
    ranks = ranks_of(server)
    with opened(server.origin + COMPLETIONS, LONG | {"stream": True, "max_tokens": 400}) as stream:
        stream.readline()
        os.killpg(server.process.pid, number)
        while ask(server.origin + "/health")[0] != 503:  # which new requests get, too
            time.sleep(0.01)
        assert ask(server.origin + COMPLETIONS, SHORT)[0] == 503
        events = [line for line in stream.read().splitlines() if line]
    assert events[-1] == b"data: [DONE]"
    assert json.loads(events[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
    assert server.exit_code() == 0
    assert gone(ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "again", "code"), [("0.5", False, 0), ("600", True, 128 + signal.SIGTERM)]
)
def test_ranks_end_though_requests_have_not_finished(
    launch: Callable[..., Process],
    tiny_model: Callable[..., Path],
    seconds: str,
    again: bool,
    code: int,
) -> None:
    """After the time that they have, or at a second signal."""
    options = ("--tensor-parallel-size", "2", "--shutdown-timeout", seconds)
    server = launch(tiny_model(max_length=4096), *options)
    server.ready()
    ranks = ranks_of(server)
    with streaming(server) as response:
        server.signal(signal.SIGTERM)
        while ask(server.origin + "/health")[0] != 503:
            time.sleep(0.01)
        if again:
            server.signal(signal.SIGTERM)
        last = [line for line in response.read().splitlines() if line][-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
    assert server.exit_code() == code
    assert gone(ranks)


@pytest.mark.slow
def test_a_server_that_is_ended_while_it_starts_leaves_no_rank(
    launch: Callable[..., Process], tiny_model: Callable[..., Path]
) -> None:
    for _ in range(2):  # the ranks are at different places of their start
        server = launch(tiny_model(), "--tensor-parallel-size", "4")
        while len(ranks := ranks_of(server)) < 3:
            assert server.process.poll() is None, server.log
            time.sleep(0.01)
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 128 + signal.SIGTERM
        assert gone(ranks)


LIMITED = """
import datetime, functools, sys
import torch.distributed as group
limit = datetime.timedelta(seconds=2)
group.init_process_group = functools.partial(group.init_process_group, timeout=limit)
print("exchanges have 2 s", file=sys.stderr)
"""


@pytest.mark.slow
def test_ranks_wait_for_work_longer_than_for_one_another(
    launch: Callable[..., Process],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gloo's and NCCL's limits of half an hour and ten minutes, here 2 s, are those of an exchange;
    a night without requests is none."""
    (tmp_path / "sitecustomize.py").write_text(LIMITED)
    path = filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    server = launch(tiny_model(), "--tensor-parallel-size", "2")
    server.ready()
    assert server.log.count("exchanges have 2 s") >= 2
    for _ in range(2):
        assert ask(server.origin + COMPLETIONS, SHORT)[0] == 200
        time.sleep(6)
    assert ask(server.origin + COMPLETIONS, SHORT)[0] == 200
    server.signal(signal.SIGTERM)
    assert server.exit_code() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--tensor-parallel-size", "3", "--quantize", "nf4"),
            "which does not divide the model's 4 attention heads",
        ),
        (
            ("--tensor-parallel-size", "2", "--on-engine-failure", "restart"),
            r"the process has to exit.*--on-engine-failure 'exit'",
        ),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_loaded(
    launch: Callable[..., Process],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    options: Any,
    said: str,
) -> None:
    server = launch(tiny_model(max_length=4096), *options, stderr=subprocess.PIPE)
    server.find(f"--tensor-parallel-size is .*{said}")
    assert server.exit_code() == 1
    assert not list((tmp_path / "c/nybble").rglob("*.safetensors"))  # nothing was packed
