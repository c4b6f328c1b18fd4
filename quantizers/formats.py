"""Writes a quantized module as the tensors of a public checkpoint layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from nybble.quantizers.rtn import NF4_LEVELS, quantize_affine, quantize_nf4
from torch import Tensor

Format = Literal["gptq", "awq", "nf4"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NF4_BLOCKSIZE = 64


def quantization_config(format: Format, group_size: int, *, sym: bool) -> dict[str, Any]:
    """The ``quantization_config`` that other software reads."""
    if format == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": group_size,
            "sym": sym,
            "desc_act": False,
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
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def module_tensors(
    format: Format, name: str, weight: Tensor, group_size: int, *, sym: bool
) -> Mapping[str, Tensor]:
    """The tensors of linear layer ``name`` with ``weight (out, in)``, quantized by rounding.

    Raises ValueError naming the layer where its sizes do not fit the format.
    """
    out, columns = weight.shape
    if format == "nf4":
        if weight.numel() % _NF4_BLOCKSIZE:
            raise ValueError(f"{name}: {out}×{columns} is not a multiple of {_NF4_BLOCKSIZE}")
        return _nf4(name + ".weight", weight)
    size = columns if group_size == -1 else group_size
    if columns % size or columns % 8 or out % 8:
        raise ValueError(
            f"{name}: {out} outputs and {columns} inputs do not divide into groups of {size} "
            "inputs and words of 8"
        )
    codes, scales, zeros = quantize_affine(weight, size, sym=sym)
    by_group = {f"{name}.scales": scales.T.contiguous()}
    if format == "gptq":
        return by_group | {
            f"{name}.qweight": _pack(codes, range(8)).T.contiguous(),
            f"{name}.qzeros": _pack((zeros.T - 1) & 0xF, range(8)),
            f"{name}.g_idx": (torch.arange(columns) // size).int(),
        }
    return by_group | {
        f"{name}.qweight": _pack(codes.T, _AWQ_ORDER),
        f"{name}.qzeros": _pack(zeros.T, _AWQ_ORDER),
    }


def _pack(codes: Tensor, order: tuple[int, ...] | range) -> Tensor:
    """uint8 ``(rows, 8 n)`` to int32 ``(rows, n)``, nibble i holding column ``order[i]``."""
    octets = codes.reshape(codes.shape[0], -1, 8).long()
    words = sum(octets[..., column] << 4 * nibble for nibble, column in enumerate(order))
    assert isinstance(words, Tensor)
    # Two's complement of the same 32 bits.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().contiguous()


def _nf4(name: str, weight: Tensor) -> Mapping[str, Tensor]:
    codes, absmax = quantize_nf4(weight, _NF4_BLOCKSIZE)
    pairs = codes.view(-1, 2)
    state = {
        "quant_type": "nf4",
        "blocksize": _NF4_BLOCKSIZE,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    return {
        name: (pairs[:, :1] << 4) | pairs[:, 1:],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": NF4_LEVELS.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
