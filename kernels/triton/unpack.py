"""Four matrix operands out of one tile of packed words, without an int-to-float conversion.

A tile ``q`` is int16 ``(…, 32)`` of the ``gpu_tiles`` layout (:mod:`nybble.kernels.layout`); the
operands have its shape, one for every slice of 32 columns. The PTX handles two neighbouring words,
one 32-bit register, at a time, and yields one register of two 16-bit floats per operand. Nothing
moves between lanes.

*Affine.* A nibble placed in the mantissa of 1024.0 (float16, low bits), of 64.0 (float16, bits
4–7) or of 128.0 (bfloat16, low bits) adds its value to that number; subtracting the number plus 8
leaves ``code − 8`` exactly. (After Kim et al., "Who Says Elephants Can't Run", 2022, and Marlin.)

*Codebook.* Each level is two bytes. A byte permute reads 4 codes at a time from an 8-entry table;
two tables and a select on the codes' top bits make 16 entries.

*4-bit floats.* A rotation brings an e2m1 code's bits to their places in a bfloat16, whose exponent
is then 126 too small; a product with a power of two makes it exact, subnormal codes too.

The interpreter cannot run PTX, so each has a twin in plain Triton; tests/kernels/ptx.py runs the
PTX itself on the CPU over every input.
"""

import triton
import triton.language as tl

HALVES = tl.constexpr((tl.float16,) * 4)
BFLOATS = tl.constexpr((tl.bfloat16,) * 4)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

AFFINE_F16 = tl.constexpr("""{
.reg .b32 high, low_bias, high_bias;
shr.u32 high, $4, 8;
mov.b32 low_bias, 0x64086408;
mov.b32 high_bias, 0x54805480;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, $4, 0x00f000f0, 0x54005400, 0xea;
lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, high, 0x00f000f0, 0x54005400, 0xea;
sub.rn.f16x2 $0, $0, low_bias;
sub.rn.f16x2 $1, $1, high_bias;
sub.rn.f16x2 $2, $2, low_bias;
sub.rn.f16x2 $3, $3, high_bias;
}""")

# Multiply-add by one rather than subtract: bfloat16 subtraction begins with sm_90.
AFFINE_BF16 = tl.constexpr("""{
.reg .b32 s1, s2, s3, one, bias;
shr.u32 s1, $4, 4;
shr.u32 s2, $4, 8;
shr.u32 s3, $4, 12;
mov.b32 one, 0x3f803f80;
mov.b32 bias, 0xc308c308;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, s1, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $2, s2, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $3, s3, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, $0, one, bias;
fma.rn.bf16x2 $1, $1, one, bias;
fma.rn.bf16x2 $2, $2, one, bias;
fma.rn.bf16x2 $3, $3, one, bias;
}""")

# $5…$12 low bytes and $13…$20 high bytes of levels 0–3, 4–7, 8–11, 12–15, each given twice.
CODEBOOK = tl.constexpr("""{
.reg .b32 index, index_b, shifted, top, top_b, below, above, low, high;
and.b32 index, $4, 0x77777777;
shr.u32 index_b, index, 16;
shl.b32 shifted, $4, 4;
prmt.b32 top, shifted, $4, 0xd9c8;
prmt.b32 top_b, shifted, $4, 0xfbea;
prmt.b32 below, $5, $7, index;
prmt.b32 above, $9, $11, index;
lop3.b32 low, top, above, below, 0xca;
prmt.b32 below, $13, $15, index;
prmt.b32 above, $17, $19, index;
lop3.b32 high, top, above, below, 0xca;
prmt.b32 $0, low, high, 0x5140;
prmt.b32 $1, low, high, 0x7362;
prmt.b32 below, $5, $7, index_b;
prmt.b32 above, $9, $11, index_b;
lop3.b32 low, top_b, above, below, 0xca;
prmt.b32 below, $13, $15, index_b;
prmt.b32 above, $17, $19, index_b;
lop3.b32 high, top_b, above, below, 0xca;
prmt.b32 $2, low, high, 0x5140;
prmt.b32 $3, low, high, 0x7362;
}""")
CODEBOOK_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 17)

# The masks are those of a code's bits in two bfloat16 (kernels/layout.py: E2M1_PLACES), and of all
# but its highest bit of exponent, which the last slice has elsewhere. 2 ** 126 is 0x7e80.
E2M1_BF16 = tl.constexpr("""{
.reg .b32 turned, high, power, none;
mov.b32 power, 0x7e807e80;
mov.b32 none, 0x80008000;
and.b32 $0, $4, 0x81c081c0;
shf.l.wrap.b32 turned, $4, $4, 4;
and.b32 $1, turned, 0x81c081c0;
shf.l.wrap.b32 turned, $4, $4, 10;
and.b32 $2, turned, 0x81c081c0;
shf.l.wrap.b32 turned, $4, $4, 14;
and.b32 high, turned, 0x01000100;
shf.l.wrap.b32 turned, $4, $4, 6;
lop3.b32 $3, turned, 0x80c080c0, high, 0xea;
fma.rn.bf16x2 $0, $0, power, none;
fma.rn.bf16x2 $1, $1, power, none;
fma.rn.bf16x2 $2, $2, power, none;
fma.rn.bf16x2 $3, $3, power, none;
}""")

# float16 has its exponent three bits higher. 2 ** 14 is 0x7400.
_TO_F16 = """
shl.b32 turned, ${0}, 3;
and.b32 turned, turned, 0x0e000e00;
lop3.b32 ${0}, ${0}, 0x80008000, turned, 0xea;
mul.rn.f16x2 ${0}, ${0}, power;"""
E2M1_F16 = tl.constexpr(
    E2M1_BF16.value.split("fma")[0].replace("0x7e807e80", "0x74007400")
    + "".join(_TO_F16.format(slice_) for slice_ in range(4))
    + "}"
)


@triton.jit
def unpack_affine(q, dtype: tl.constexpr):
    """``code − 8`` of each slice, exact in ``dtype``."""
    if INTERPRETED:
        w0 = ((q & 15) - 8).to(tl.float32).to(dtype)
        w1 = (((q >> 4) & 15) - 8).to(tl.float32).to(dtype)
        w2 = (((q >> 8) & 15) - 8).to(tl.float32).to(dtype)
        w3 = (((q >> 12) & 15) - 8).to(tl.float32).to(dtype)
    elif dtype == tl.float16:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            AFFINE_F16, "=&r,=&r,=&r,=&r,r", [q], dtype=HALVES, is_pure=True, pack=2
        )
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            AFFINE_BF16, "=&r,=&r,=&r,=&r,r", [q], dtype=BFLOATS, is_pure=True, pack=2
        )
    return w0, w1, w2, w3


@triton.jit
def _bits(levels, index: tl.constexpr, dtype: tl.constexpr):
    # A 1 × 1 tensor, not a scalar: the compiler keeps unpacking in the matrix operand's layout only
    # if every input of it is loaded.
    value = tl.load(levels + index + tl.zeros((1, 1), tl.int32)).to(dtype)
    return value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _four(levels, first: tl.constexpr, dtype: tl.constexpr):
    """Bytes of levels first…first+3: the four low ones and the four high ones."""
    a = _bits(levels, first, dtype)
    b = _bits(levels, first + 1, dtype)
    c = _bits(levels, first + 2, dtype)
    d = _bits(levels, first + 3, dtype)
    low = (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | ((d & 255) << 24)
    high = (a >> 8) | ((b >> 8) << 8) | ((c >> 8) << 16) | ((d >> 8) << 24)
    return low, high


@triton.jit
def codebook_table(levels, dtype: tl.constexpr):
    """The 16 levels, rounded to ``dtype``, as the eight registers a lookup permutes."""
    l0, h0 = _four(levels, 0, dtype)
    l1, h1 = _four(levels, 4, dtype)
    l2, h2 = _four(levels, 8, dtype)
    l3, h3 = _four(levels, 12, dtype)
    return l0, l1, l2, l3, h0, h1, h2, h3


@triton.jit
def _look_up(levels, even, odd, like, dtype: tl.constexpr):
    pair = tl.join(tl.load(levels + (even & 15)), tl.load(levels + (odd & 15)))
    return pair.reshape(like.shape).to(dtype)


@triton.jit
def unpack_codebook(q, levels, table, dtype: tl.constexpr):
    """``levels[code]``, rounded to ``dtype``, of each slice."""
    if INTERPRETED:
        first, second = tl.split(q.reshape((q.numel // 32, 16, 2)))
        w0 = _look_up(levels, first, first >> 4, q, dtype)
        w1 = _look_up(levels, first >> 8, first >> 12, q, dtype)
        w2 = _look_up(levels, second, second >> 4, q, dtype)
        w3 = _look_up(levels, second >> 8, second >> 12, q, dtype)
    else:
        l0, l1, l2, l3, h0, h1, h2, h3 = table
        words = [q, l0, l1, l2, l3, h0, h1, h2, h3]
        if dtype == tl.float16:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                CODEBOOK, CODEBOOK_REGISTERS, words, dtype=HALVES, is_pure=True, pack=2
            )
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                CODEBOOK, CODEBOOK_REGISTERS, words, dtype=BFLOATS, is_pure=True, pack=2
            )
    return w0, w1, w2, w3


@triton.jit
def _turned(pair, LEFT: tl.constexpr):
    """32 bits rotated to the left."""
    return (pair << LEFT) | ((pair >> (32 - LEFT)) & ((1 << LEFT) - 1))


@triton.jit
def _floats(bits, levels, like, dtype: tl.constexpr):
    """The levels of two codes whose bits are in their places."""
    even = (bits >> 12 & 8) | (bits >> 6 & 7)
    odd = (bits >> 28 & 8) | (bits >> 22 & 7)
    pair = tl.join(tl.load(levels + even), tl.load(levels + odd))
    return pair.reshape(like.shape).to(dtype)


@triton.jit
def unpack_e2m1(q, levels, dtype: tl.constexpr):
    """The 4-bit float that a code is, of each slice; ``levels`` are the interpreter's alone."""
    if INTERPRETED:
        first, second = tl.split(q.reshape((q.numel // 32, 16, 2)))
        pair = (first.to(tl.int32) & 0xFFFF) | (second.to(tl.int32) << 16)
        last = (_turned(pair, 14) & 0x01000100) | (_turned(pair, 6) & ~0x01000100)
        w0 = _floats(pair, levels, q, dtype)
        w1 = _floats(_turned(pair, 4), levels, q, dtype)
        w2 = _floats(_turned(pair, 10), levels, q, dtype)
        w3 = _floats(last, levels, q, dtype)
    elif dtype == tl.float16:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            E2M1_F16, "=&r,=&r,=&r,=&r,r", [q], dtype=HALVES, is_pure=True, pack=2
        )
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            E2M1_BF16, "=&r,=&r,=&r,=&r,r", [q], dtype=BFLOATS, is_pure=True, pack=2
        )
    return w0, w1, w2, w3
