"""Fixtures that every folder of tests may use."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Triton reads this when it is first imported, so it is set before any test imports torch: kernels
# in the test process run in the interpreter, on the CPU. The proof on a GPU is `make gpu`.
os.environ["TRITON_INTERPRET"] = "1"
# Likewise OpenMP, when torch loads it: threads that spin while they wait for each other take, where
# processors are shared, many times as long for the small tensors here as the work itself.
os.environ["OMP_WAIT_POLICY"] = "passive"
# One thread each if several processes run tests: they share the processors. Tests of threads ask
# for them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Loaded by path: with `tests/` on sys.path, `tests/kernels` would answer `import kernels`,
# which transformers and bitsandbytes probe for.
_spec = importlib.util.spec_from_file_location(
    "nybble_tests_tiny", Path(__file__).with_name("tiny.py")
)
assert _spec is not None
assert _spec.loader is not None
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(**options)`` is the folder of a tiny model; see ``write_tiny_model``.

    Folders are built once per set of options and shared: do not write to them.
    """
    built: dict[tuple[tuple[str, object], ...], Path] = {}

    def build(**options: object) -> Path:
        key = tuple(sorted(options.items()))
        if key not in built:
            built[key] = _tiny.write_tiny_model(tmp_path_factory.mktemp("tiny"), **options)
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_adapter(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``tiny_adapter(family, **options)`` is the folder of a LoRA trained on that tiny model.

    See ``write_tiny_adapter``. Folders are shared: do not write to them.
    """
    built: dict[str, Path] = {}

    def build(family: str = "qwen2", **options: object) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in built:
            built[key] = _tiny.write_tiny_adapter(
                tmp_path_factory.mktemp("adapter"), tiny_model(family=family), **options
            )
        return built[key]

    return build
