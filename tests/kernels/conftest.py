"""The CPU kernels, which of them are tested by default, and what Triton's interpreter lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nybble.kernels.cpu.build import (
    ARM_TARGETS,
    TARGETS,
    Target,
    missing_cpu_features,
    usable_targets,
)
from nybble.kernels.cpu.library import CpuLibrary

from .cpu_kernels import compiled

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the CPU kernels those this machine would use and the plainest are tested by default.

    To compile those of another target takes a quarter of a minute.
    """
    targets = (*TARGETS, *ARM_TARGETS)
    native = next((target for target in targets if not missing_cpu_features(target)), None)
    for item in items:
        if HERE in item.path.parents and isinstance(item, pytest.Function):
            values = getattr(item, "callspec", None)
            used = [v for v in values.params.values() if isinstance(v, Target)] if values else []
            if any(target not in (native, TARGETS[-1]) for target in used):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", params=(*TARGETS, *ARM_TARGETS), ids=lambda target: target.name)
def cpu(request: pytest.FixtureRequest) -> CpuLibrary:
    """The kernels compiled for each target this machine runs, which must be one at least.

    On x86 those for ARM are emulated.
    """
    usable_targets()
    return compiled(request.param)


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """The kernels split their work among torch's threads, however many processes run tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _bfloat16_products_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps bfloat16 as 16-bit integers, and would multiply those."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tl = interpreter.tl
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):  # type: ignore[no-untyped-def]
        a, b = (
            self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return original(self, a, b, d, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
