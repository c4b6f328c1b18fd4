"""Real Ray with servers of a tiny model; `make test-ray` runs it in an environment of its own."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import ray
from ray import serve


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny.py, which writes models and adapters."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.write_tiny_model(folder, max_length=4096)
    return folder


@pytest.fixture(scope="session")
def adapters(tiny: ModuleType, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters a0 to a7 and b0 to b3."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in (*(f"a{i}" for i in range(8)), *(f"b{i}" for i in range(4))):
        (folder / name).mkdir()
        tiny.write_tiny_adapter(folder / name, model, seed=1)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One machine's. Ray is told all ports of its agents: to those that it chooses itself they have
    15 s each (Ray 2.60, ``NodeManager::WaitForDashboardAgentPorts``), in which a busy machine may
    not start them. It then waits for them as long as the setting says."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(5)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        gcs, listening, grpc, environments, metrics = (each.getsockname()[1] for each in held)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--port={gcs}", "--num-cpus=8", "--include-dashboard=false"),
            *(f"--dashboard-agent-listen-port={listening}", f"--dashboard-agent-grpc-port={grpc}"),
            *(f"--runtime-env-agent-port={environments}", f"--metrics-export-port={metrics}"),
            "--disable-usage-stats",
        ],
        env={**os.environ, "RAY_agent_register_timeout_ms": "600000"},
    )
    try:
        _connect(f"{ray.util.get_node_ip_address()}:{gcs}", process)
        serve.start(proxy_location="Disabled")
        yield
        serve.shutdown()
        ray.shutdown()
    finally:
        process.terminate()
        process.wait(60)


def _connect(address: str, cluster: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while True:
        assert cluster.poll() is None
        try:
            ray.init(address, log_to_driver=True)
            return
        except ConnectionError:  # it is not there yet
            if time.monotonic() > deadline:
                raise
