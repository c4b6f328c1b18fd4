"""Products in Triton's interpreter as tensor cores have them: in one order for every element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def dot_in_float64(interpreter: Any) -> Callable[..., Any]:
    """What takes the place of ``InterpreterBuilder.create_dot``.

    The interpreter multiplies by BLAS, whose sums have another order in another column on CPUs with
    AVX2 alone, so that an element's bits depend on where in the block it stands. In float64
    products of 16-bit floats are exact, and what their sums lose is far below a float32, in any
    order.

    interpreter: ``triton.runtime.interpreter``.
    """
    given, handle = interpreter.InterpreterBuilder.create_dot, interpreter.TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if d.data.dtype != "float32":
            return given(self, a, b, d, *options)
        nothing = d.data.astype("float64")
        nothing[...] = 0
        nothing = handle(nothing, interpreter.tl.float64)
        found = given(self, a, b, nothing, *options).data.astype("float32")
        return handle(found + d.data, d.dtype.scalar)

    return create_dot
