"""What Triton's interpreter lacks to stand in for a GPU."""

from __future__ import annotations

import pytest
import torch


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
