"""Real Ray with servers of a tiny model; `make test-ray` runs it in an environment of its own."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
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
    _start_ray()
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
    ray.shutdown()


def _start_ray() -> None:
    """Ray gives the agents of its raylet 15 s each to tell their ports, in which a busy machine may
    not manage it, and dies. The limit is in its C++ (Ray 2.60): no setting changes it."""
    deadline = time.monotonic() + 600
    while True:
        try:
            ray.init(num_cpus=8, include_dashboard=False, log_to_driver=True)
            return
        except Exception:
            ray.shutdown()
            if time.monotonic() > deadline:
                raise
