"""An engine that fails under clients: they are told, and the process ends or goes on."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conftest import FAULTY, PATIENCE, Process, ask, opened

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "x",
    "max_tokens": 4000,
    "temperature": 0,
    "ignore_eos": True,
}
SHORT = LONG | {"max_tokens": 5}


def interrupted(server: Process, number: int) -> tuple[dict[str, Any], tuple[int, Any]]:
    """What a stream and a plain request are told when a fault comes while both are computed."""
    plain: list[tuple[int, Any]] = []
    url = server.origin + COMPLETIONS
    with opened(url, LONG | {"stream": True}) as response:
        assert response.status == 200
        response.readline()
        asking = threading.Thread(target=lambda: plain.append(ask(url, LONG)))
        asking.start()
        wait_for(server, "nybble_sequences_running 2.0")
        server.signal(number)
        last = [line for line in response.read().splitlines() if line][-1]
    asking.join()
    return json.loads(last.removeprefix(b"data: ")), plain[0]


def wait_for(server: Process, line: str) -> str:
    """The server's metrics, once they have the line."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with opened(server.origin + "/metrics") as response:
            text = response.read().decode()
        if line in text:
            return str(text)
        time.sleep(0.02)
    raise AssertionError(f"no {line} in\n{text}")


def test_a_failed_engine_tells_every_client_and_ends_the_process(
    launch: Callable[..., Process], tiny_model: Callable[..., Path]
) -> None:
    server = launch(tiny_model(max_length=4096), script=FAULTY)
    server.ready()
    event, (status, body) = interrupted(server, signal.SIGUSR1)
    assert event["error"]["code"] == body["error"]["code"] == "engine_failed"
    assert status == 500
    assert "RuntimeError: the device is gone" in body["error"]["message"]
    assert server.exit_code() == 70
    assert "the engine has failed: RuntimeError: the device is gone" in server.lines[-1]


def test_an_engine_that_begins_again_serves_on_until_it_has_failed_too_often(
    launch: Callable[..., Process], tiny_model: Callable[..., Path]
) -> None:
    server = launch(tiny_model(max_length=4096), "--on-engine-failure", "restart", script=FAULTY)
    server.ready()
    before = ask(server.origin + COMPLETIONS, SHORT)[1]["choices"]
    for count in range(1, 4):
        event, (status, _) = interrupted(server, signal.SIGUSR1)
        assert (event["error"]["code"], status) == ("engine_failed", 500)
        text = wait_for(server, f"nybble_engine_restarts_total {count}.0")
        assert f"nybble_engine_failures_total {count}.0" in text
        assert f'nybble_request_errors_total{{cause="engine_failed"}} {2 * count}.0' in text
        assert "nybble_engine_healthy 1.0" in text
        assert ask(server.origin + "/health") == (200, {"status": "ok"})
        assert ask(server.origin + COMPLETIONS, SHORT)[1]["choices"] == before
    interrupted(server, signal.SIGUSR1)
    assert server.exit_code() == 70


def test_without_memory_for_a_step_one_client_is_told_and_the_other_served(
    launch: Callable[..., Process], tiny_model: Callable[..., Path]
) -> None:
    server = launch(tiny_model(max_length=4096), script=FAULTY)
    server.ready()
    url = server.origin + COMPLETIONS
    with opened(url, LONG | {"max_tokens": 1500, "stream": True}) as response:
        response.readline()
        plain: list[tuple[int, Any]] = []
        asking = threading.Thread(target=lambda: plain.append(ask(url, LONG)))
        asking.start()
        wait_for(server, "nybble_sequences_running 2.0")
        server.signal(signal.SIGUSR2)
        asking.join()
        (status, body) = plain[0]
        assert (status, body["error"]["code"]) == (503, "out_of_memory")
        assert response.read().endswith(b"data: [DONE]\n\n")
    assert ask(server.origin + "/health") == (200, {"status": "ok"})
