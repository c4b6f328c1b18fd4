"""Tiles of an 8-bit KV cache as operands of 16-bit products.

The interpreter cannot run PTX; tests/kernels/ptx.py runs it on the CPU over every input.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels.triton.unpack import INTERPRETED

# Four bytes to two registers of 16-bit floats, without a conversion. In the mantissa of 1024, a
# byte with its highest bit flipped adds itself and 128. bfloat16 has room for 7 bits: they are
# added to 128, from which 128 is subtracted, or 256 if the eighth bit says so.
INT8_F16 = tl.constexpr("""{
.reg .b32 flipped, bias;
xor.b32 flipped, $2, 0x80808080;
mov.b32 bias, 0x64806480;
prmt.b32 $0, flipped, 0x64646464, 0x4140;
prmt.b32 $1, flipped, 0x64646464, 0x4342;
sub.rn.f16x2 $0, $0, bias;
sub.rn.f16x2 $1, $1, bias;
}""")
INT8_BF16 = tl.constexpr("""{
.reg .b32 low, high, less, minus;
mov.b32 minus, 0xbf80bf80;
prmt.b32 low, $2, 0x43434343, 0x4140;
prmt.b32 high, $2, 0x43434343, 0x4342;
and.b32 $0, low, 0xff7fff7f;
and.b32 less, low, 0xff80ff80;
fma.rn.bf16x2 $0, less, minus, $0;
and.b32 $1, high, 0xff7fff7f;
and.b32 less, high, 0xff80ff80;
fma.rn.bf16x2 $1, less, minus, $1;
}""")


@triton.jit
def widened(values, dtype: tl.constexpr):
    """A tile of a cache in ``dtype``: exact."""
    if INTERPRETED or values.dtype.primitive_bitwidth != 8:
        wide = values.to(dtype)
    elif values.dtype != tl.int8:
        # By way of float32: Hopper's conversion from float16 to bfloat16 has a quarter of the rate.
        wide = values.to(tl.float16)
        wide = wide if dtype == tl.float16 else wide.to(tl.float32).to(dtype)
    elif dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            INT8_BF16, "=&r,=&r,r", [values], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        wide = tl.inline_asm_elementwise(
            INT8_F16, "=&r,=&r,r", [values], dtype=tl.float16, is_pure=True, pack=4
        )
    return wide


@triton.jit
def by_way_of_shared_memory(wide, number):
    """``wide``, which each thread has computed of what it has loaded, once.

    The compiler would convert a product's operand as a product reads it, in all warps that do, and
    byte by byte if the bytes of a register lie apart: but not if it also depends on a ``number``
    that is computed.
    """
    if INTERPRETED:
        same = wide
    elif wide.dtype == tl.bfloat16:
        same = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r", [wide, number], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        same = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r", [wide, number], dtype=tl.float16, is_pure=True, pack=2
        )
    return same
