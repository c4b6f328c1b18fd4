"""Writes a quantized module as the tensors of a public checkpoint layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from nybble.quantizers.affine import AffineWeight
from nybble.quantizers.codebook import (
    BLOCKSIZE,
    LEVELS,
    NESTED_BLOCKSIZE,
    CodebookWeight,
    NestedAbsmax,
)
from torch import Tensor

Format = Literal["gptq", "awq", "nf4", "fp4"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantization_config(
    format: Format, group_size: int, *, sym: bool, desc_act: bool, double_quant: bool
) -> dict[str, Any]:
    """The ``quantization_config`` that other software reads."""
    if format == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
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
    """GPTQ's layout (v1: zeros stored less one) of linear layer ``name``."""
    return {
        f"{name}.qweight": _pack(weight.codes, range(8)).T.contiguous(),
        f"{name}.qzeros": _pack((weight.zeros.T - 1) & 0xF, range(8)),
        f"{name}.scales": weight.scales.T.contiguous(),
        f"{name}.g_idx": weight.g_idx.int(),
    }


def awq_tensors(name: str, weight: AffineWeight) -> Mapping[str, Tensor]:
    """AWQ's GEMM layout of linear layer ``name``, whose groups must be in order."""
    return {
        f"{name}.qweight": _pack(weight.codes.T, _AWQ_ORDER),
        f"{name}.qzeros": _pack(weight.zeros.T, _AWQ_ORDER),
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


def _pack(codes: Tensor, order: tuple[int, ...] | range) -> Tensor:
    """uint8 ``(rows, 8 n)`` to int32 ``(rows, n)``, nibble i holding column ``order[i]``."""
    octets = codes.reshape(codes.shape[0], -1, 8).long()
    words = sum(octets[..., column] << 4 * nibble for nibble, column in enumerate(order))
    assert isinstance(words, Tensor)
    # Two's complement of the same 32 bits.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().contiguous()
