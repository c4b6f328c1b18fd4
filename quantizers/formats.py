"""Writes a quantized module as the tensors of a public checkpoint layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nybble.quantizers.affine import AffineWeight
from nybble.quantizers.codebook import (
    BLOCKSIZE,
    LEVELS,
    NESTED_BLOCKSIZE,
    CodebookWeight,
    NestedAbsmax,
)

Format = Literal["gptq", "awq", "nf4", "fp4"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantization_config(
    format: Format,
    group_size: int,
    *,
    sym: bool,
    desc_act: bool,
    double_quant: bool,
    bits: int = 4,
) -> dict[str, Any]:
    """The ``quantization_config`` that other software reads."""
    if format == "gptq":
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": sym,
            "desc_act": desc_act,
            "checkpoint_format": "gptq",
        }
    if format == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
        }
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": format,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def gptq_tensors(name: str, weight: AffineWeight) -> Mapping[str, Tensor]:
    """GPTQ's layout (v1: zeros stored less one) of linear layer ``name``, 2, 3, 4 or 8 bits."""
    zeros = (weight.zeros.T - 1) & (2**weight.bits - 1)
    return {
        f"{name}.qweight": _pack(weight.codes, weight.bits).T.contiguous(),
        f"{name}.qzeros": _pack(zeros, weight.bits),
        f"{name}.scales": weight.scales.T.contiguous(),
        f"{name}.g_idx": weight.g_idx.int(),
    }


def awq_tensors(name: str, weight: AffineWeight) -> Mapping[str, Tensor]:
    """AWQ's GEMM layout of linear layer ``name``, whose groups must be in order."""
    return {
        f"{name}.qweight": _pack(_reordered(weight.codes.T), 4),
        f"{name}.qzeros": _pack(_reordered(weight.zeros.T), 4),
        f"{name}.scales": weight.scales.T.contiguous(),
    }


def bnb_tensors(name: str, weight: CodebookWeight) -> Mapping[str, Tensor]:
    """bitsandbytes' layout of linear layer ``name``, as transformers saves it."""
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": BLOCKSIZE,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    name += ".weight"
    tensors = {
        name: codebook_words(weight.codes),
        f"{name}.quant_map": LEVELS[weight.quant_type].clone(),
    }
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": absmax.offset,
        }
        tensors |= {
            f"{name}.absmax": absmax.codes,
            f"{name}.nested_absmax": absmax.absmax,
            f"{name}.nested_quant_map": absmax.levels,
        }
    else:
        tensors[f"{name}.absmax"] = absmax
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"{name}.quant_state.bitsandbytes__{weight.quant_type}": encoded}


def codebook_words(codes: Tensor) -> Tensor:
    """bitsandbytes' ``weight`` of uint8 codes in row-major order: uint8 ``(codes / 2, 1)``."""
    pairs = codes.view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def whole_words(bits: int) -> int:
    """The fewest codes of ``bits`` bits that fill whole int32 words."""
    return 32 // math.gcd(bits, 32)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``(rows, n)`` to int32 ``(rows, n · bits / 32)``, codes one after another, low first.

    A code of 3 bits may lie across two words, as in AutoGPTQ's layout.
    """
    each = np.unpackbits(codes.cpu().numpy()[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(each.reshape(len(codes), -1), axis=-1, bitorder="little")
    return torch.from_numpy(packed).view(torch.int32)


def _reordered(codes: Tensor) -> Tensor:
    """Every eight of a row's codes in the order in which AWQ's words hold them."""
    return codes.reshape(len(codes), -1, 8)[..., _AWQ_ORDER].flatten(1)
