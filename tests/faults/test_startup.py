"""While a server starts, and when it is killed there."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.quantizers import quantize_checkpoint

from .conftest import FAULTY, PATIENCE, SERVER, Process, ask, opened

COMPLETIONS = "/v1/completions"
HELLO = {"model": "tiny", "prompt": "x", "max_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def gptq(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model that has to be packed first."""
    quantize_checkpoint(
        tiny_model(), tmp_path / "gptq", format="gptq", group_size=32, progress=False
    )
    return tmp_path / "gptq"


def packing(launch: Callable[..., Process], model: Path) -> Process:
    """A server in the middle of packing, where it stays until SIGHUP."""
    server = launch(model, command=[sys.executable, str(FAULTY), "--hold-packing"])
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        _, body = ask(server.origin + "/health")
        if body.get("stage") == "Packing" and body["done"] == 2:
            return server
        time.sleep(0.02)
    raise AssertionError(server.log)


def test_the_port_answers_at_once_and_says_how_far_the_start_is(
    launch: Callable[..., Process], gptq: Path
) -> None:
    server = packing(launch, gptq)
    with opened(server.origin + "/health") as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
    status, body = ask(server.origin + "/health")
    assert status == 503
    assert body["status"] == "loading"
    time.sleep(0.2)
    assert ask(server.origin + "/health")[1]["seconds"] > body["seconds"]
    for path, asked in ((COMPLETIONS, HELLO), ("/v1/models", None), ("/metrics", None)):
        with opened(server.origin + path, asked) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) > 0
        status, body = ask(server.origin + path, asked)
        assert body["error"]["code"] == "starting"
    server.signal(signal.SIGHUP)
    # Whoever asks all the time finds one server or the other, and never a closed port.
    end = time.monotonic() + PATIENCE
    while ask(server.origin + "/health") != (200, {"status": "ok"}):
        assert time.monotonic() < end
    assert ask(server.origin + COMPLETIONS, HELLO)[0] == 200


@pytest.mark.slow
def test_ended_or_killed_while_packing_the_next_start_packs_again(
    launch: Callable[..., Process], gptq: Path, tmp_path: Path
) -> None:
    server = packing(launch, gptq)
    server.signal(signal.SIGTERM)
    assert server.exit_code() == 128 + signal.SIGTERM  # though it would never have finished
    server = packing(launch, gptq)
    server.signal(signal.SIGKILL)
    server.exit_code()
    (partial,) = (tmp_path / "c/nybble/packed").glob("*.partial")
    again = launch(gptq, command=SERVER)
    assert ask(again.ready() + COMPLETIONS, HELLO)[0] == 200
    assert not partial.exists()
    assert partial.with_name(partial.name.removesuffix(".partial")).is_dir()
