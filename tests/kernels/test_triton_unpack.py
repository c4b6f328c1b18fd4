"""The PTX that unpacks words yields, for every code in every place, what the format says."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from nybble.kernels import PackedWeight
from nybble.kernels.packed import E2M1_LEVELS, INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles
from nybble.kernels.triton import eight_bits, unpack
from nybble.kernels.triton.unpack import codebook_table

_spec = importlib.util.spec_from_file_location(
    "nybble_tests_ptx", Path(__file__).with_name("ptx.py")
)
assert _spec is not None
assert _spec.loader is not None
ptx = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ptx)

LEVELS = torch.tensor([-1.0, 1.0, 0.3, -0.0, 7e-5, *torch.linspace(-0.9, 0.8, 11).tolist()])


@triton.jit
def store_table(levels, out, dtype: tl.constexpr):
    l0, l1, l2, l3, h0, h1, h2, h3 = codebook_table(levels, dtype)
    at = out + tl.zeros((1, 1), tl.int32)
    tl.store(at, l0)
    tl.store(at + 1, l1)
    tl.store(at + 2, l2)
    tl.store(at + 3, l3)
    tl.store(at + 4, h0)
    tl.store(at + 5, h1)
    tl.store(at + 6, h2)
    tl.store(at + 7, h3)


def byte_tables(levels: torch.Tensor, dtype: torch.dtype) -> list[np.ndarray]:
    """Low then high bytes of the levels, four to a register, each register twice."""
    planes = levels.to(dtype).view(torch.uint8).view(16, 2).T.contiguous()
    return list(planes.numpy().view(np.uint32).reshape(8).repeat(2))


def operands(
    asm: str, weight: PackedWeight, dtype: torch.dtype, *inputs: np.ndarray
) -> torch.Tensor:
    """The weight as its tiles unpack, ``(64, 128)``: four slices of 32 columns side by side."""
    words = weight.to_layout("gpu_tiles").qweight[0, 0].contiguous().view(torch.int32)
    registers = ptx.run(asm, 4, words.numpy().view(np.uint32), *inputs)
    return torch.cat([torch.from_numpy(r.view(np.int16)).view(dtype) for r in registers], dim=1)


def one_tile(levels: torch.Tensor, seed: int, zeros: bool = False) -> PackedWeight:
    codes = torch.randint(0, 16, (64, 128), generator=torch.Generator().manual_seed(seed))
    return PackedWeight(
        qweight=pack_nibbles(codes.to(torch.uint8)),
        scales=torch.ones(64, 1),
        zeros=torch.zeros(64, 1) if zeros else None,
        levels=levels,
        out_features=64,
        in_features=128,
        group_size=128,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_affine_words_unpack_to_code_minus_eight(
    dtype: torch.dtype, zeros: bool, seed: int
) -> None:
    weight = one_tile(INTEGER_LEVELS if zeros else SYMMETRIC_LEVELS, seed, zeros)
    asm = unpack.AFFINE_F16 if dtype == torch.float16 else unpack.AFFINE_BF16
    found = operands(asm.value, weight, dtype)
    assert torch.equal(found.float(), weight.codes().float() - 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_codebook_words_unpack_to_their_levels(dtype: torch.dtype, seed: int) -> None:
    weight = one_tile(LEVELS, seed)
    found = operands(unpack.CODEBOOK.value, weight, dtype, *byte_tables(LEVELS, dtype))
    assert torch.equal(found.view(torch.int16), weight.dequantize(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_words_of_4_bit_floats_unpack_to_these(dtype: torch.dtype, seed: int) -> None:
    weight = one_tile(E2M1_LEVELS, seed)
    assert weight.code_kind == "e2m1"
    asm = unpack.E2M1_F16 if dtype == torch.float16 else unpack.E2M1_BF16
    found = operands(asm.value, weight, dtype)
    assert torch.equal(found.view(torch.int16), weight.dequantize(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bytes_of_a_cache_widen_to_their_values(dtype: torch.dtype) -> None:
    values = torch.arange(-128, 128, dtype=torch.int8)
    asm = eight_bits.INT8_F16 if dtype == torch.float16 else eight_bits.INT8_BF16
    # Of every byte in every place of a register.
    for shift in range(4):
        given = values.roll(shift)
        registers = ptx.run(asm.value, 2, given.numpy().view(np.uint32))
        pairs = np.stack(registers, -1).reshape(-1).view(np.int16)
        assert torch.equal(torch.from_numpy(pairs).view(dtype), given.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_builds_the_byte_tables_a_lookup_expects(dtype: torch.dtype) -> None:
    levels = LEVELS.to(dtype).float()  # the interpreter truncates, so nothing is left to round
    found = torch.zeros(8, dtype=torch.int32)
    name = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    store_table[(1,)](levels, found, dtype=name)
    assert found.numpy().view(np.uint32).tolist() == byte_tables(levels, dtype)[::2]
