"""CPU kernels compiled for a target, and weights for them."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.cpu.build import ARM_TARGETS, Target, build, machine, missing_cpu_features
from nybble.kernels.cpu.library import CpuLibrary
from nybble.kernels.packed import (
    INT8_MAX,
    INTEGER_LEVELS,
    SYMMETRIC_LEVELS,
    pack_int8,
    pack_nibbles,
)
from nybble.loaders.formats.affine import two_digits

from .emulated_arm import emulated

# The instructions of AVX-VNNI for CPUs which have them as a part of AVX-512 alone.
AVX_VNNI_ENCODED = Target(
    "avx2_vnni_as_avx512",
    ("avx512f", "avx512vl", "avx512_vnni"),
    ("-march=haswell", "-mavx512f", "-mavx512vl", "-mavx512vnni"),
)

CODEBOOK = torch.linspace(-1, 1, 16).bfloat16().float()


def compiled(target: Target, activation_bits: Literal[8, 16] = 16) -> CpuLibrary:
    """The kernels for a target; a test of one that this machine lacks is skipped.

    Those for ARM are emulated on other machines.
    """
    if target in ARM_TARGETS and machine() != target.machine:
        library: Any = emulated(target)
        return CpuLibrary(library, activation_bits)
    if missing := missing_cpu_features(target):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    return CpuLibrary(ctypes.CDLL(str(build(target))), activation_bits)


def random_weight(
    out: int,
    columns: int,
    group: int,
    kind: str,
    dtype: torch.dtype,
    *,
    act_order: bool,
    bias: bool,
) -> PackedWeight:
    """dtype: of scales; uint8 for exponents, which have no zeros (kinds sym and codebook)."""
    groups = -(-columns // group)
    zeros = torch.randint(0, 16, (out, groups)).to(dtype) if kind == "asym" else None
    levels = {"asym": INTEGER_LEVELS, "sym": SYMMETRIC_LEVELS, "codebook": CODEBOOK}[kind]
    return PackedWeight(
        qweight=pack_nibbles(torch.randint(0, 16, (out, columns), dtype=torch.uint8)),
        scales=torch.randint(118, 128, (out, groups)).to(dtype)
        if dtype == torch.uint8
        else torch.rand(out, groups).to(dtype),
        zeros=zeros,
        levels=levels,
        out_features=out,
        in_features=columns,
        group_size=group,
        perm=torch.randperm(columns).int() if act_order else None,
        bias=torch.randn(out).bfloat16() if bias else None,
    )


def random_8_bit_weight(
    out: int,
    columns: int,
    group: int,
    dtype: torch.dtype,
    *,
    zeros: bool,
    act_order: bool,
    bias: bool,
) -> PackedWeight:
    """A weight as two planes of digits. ``group`` must divide ``columns``."""
    scales = torch.rand(out, columns // group).to(dtype)
    if zeros:
        codes = torch.randint(0, 256, (out, columns), dtype=torch.uint8)
        # Such as GPTQ's, or not whole, as GGUF's.
        points = torch.randint(0, 256, scales.shape) + (torch.rand(scales.shape) - 0.5) * bias
        order = torch.randperm(columns).int() if act_order else None
        codes, scales, points, perm = two_digits(codes, scales, points, order)
        weight = PackedWeight(
            qweight=pack_nibbles(codes),
            scales=scales,
            zeros=points.to(dtype),
            levels=INTEGER_LEVELS,
            out_features=out,
            in_features=columns,
            group_size=group,
            perm=perm,
        )
    else:
        signed = torch.randint(-INT8_MAX, INT8_MAX + 1, (out, columns), dtype=torch.int16)
        weight = pack_int8(signed, scales, group)
        if act_order:
            weight = replace(weight, perm=torch.randperm(columns).int().repeat(2))
    return replace(weight, bias=torch.randn(out).bfloat16() if bias else None)


def transposed(x: Tensor) -> Tensor:
    """The same values and shape, the first two dimensions' strides exchanged."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)
