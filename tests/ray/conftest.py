"""Real Ray with servers of a tiny model; `make test-ray` runs it in an environment of its own."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import ray
from ray import serve
from ray._private import parameter


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
    """One machine's. Ray is told the ports of its agents: those whose ports it does not know have
    15 s each to say them (Ray 2.60, ``NodeManager::WaitForDashboardAgentPorts``), in which a busy
    machine may not start them, and no setting changes that. For others it waits as long as the
    setting says. ``ray.init`` has no argument for three of the ports, which ``ray start`` has."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(4)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        listening, grpc, environments, metrics = (each.getsockname()[1] for each in held)
    ports = {
        "dashboard_agent_listen_port": listening,
        "metrics_agent_port": grpc,
        "runtime_env_agent_port": environments,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_agent_register_timeout_ms", "600000")
        patch.setattr(parameter, "RayParams", partial(parameter.RayParams, **ports))
        ray.init("local", num_cpus=8, include_dashboard=False, _metrics_export_port=metrics)
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
    ray.shutdown()
