"""Values the compiler cannot predict, which makes it recompute instead of keeping registers."""

import triton
import triton.language as tl

from nybble.kernels.triton.unpack import INTERPRETED


@triton.jit
def opaque(number):
    """``number``; but LLVM no longer keeps what follows from a loop's in registers of their own."""
    if not INTERPRETED:
        number = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=True, pack=1
        )
    return number


@triton.jit
def opaque_zero():
    """Zero, the number of a warp's first lane, which no compiler can tell: not ptxas either.

    What is computed with it cannot be what was computed before, so that is not kept for it.
    """
    if INTERPRETED:
        zero = 0
    else:
        zero = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid; shfl.sync.idx.b32 $0, $0, 0, 31, -1;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return zero
