"""NF4 and FP4 checkpoints written by transformers with bitsandbytes.

Per module: ``weight`` uint8 (out · in / 2, 1), codes flattened row-major over (out, in), high
nibble first; ``weight.absmax``, one per block; ``weight.quant_map`` float32 (16), the levels;
``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``), JSON as bytes. With double quantization
``absmax`` holds uint8 codes into ``weight.nested_quant_map``, scaled by ``weight.nested_absmax``
per block of blocks and shifted by an offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.loaders.errors import CheckpointError
from nybble.loaders.shards import Shards

_SMALLEST_GROUP = 16


@dataclass(frozen=True)
class BnbReader:
    """``name`` is nf4 or fp4."""

    name: str

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> BnbReader:
        if not settings.get("load_in_4bit", settings.get("_load_in_4bit", False)):
            raise CheckpointError("8-bit bitsandbytes weights are not supported; supported: 4 bits")
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise CheckpointError(f"bnb_4bit_quant_type {kind!r}: supported are nf4 and fp4")
        return cls(kind)

    def read(self, shards: Shards, module: str) -> PackedWeight | None:
        """The module's weight, or None if it is not a bitsandbytes 4-bit one."""
        weight = module + ".weight"
        if weight + ".absmax" not in shards:
            return None
        state_name = f"{weight}.quant_state.bitsandbytes__{self.name}"
        state = json.loads(bytes(shards.read(state_name).tolist()))
        out, in_features = state["shape"]
        blocksize = int(state["blocksize"])
        flat = shards.read(weight, (-(-out * in_features // 2), 1)).flatten()
        if in_features % 2:
            raise CheckpointError(f"{weight} has an odd number of inputs, {in_features}")
        absmax = _absmax(shards, weight, state)
        bias = module + ".bias"
        try:
            return pack_blocks(
                ((flat >> 4) | (flat << 4)).view(out, in_features // 2),
                absmax,
                shards.read(weight + ".quant_map", (16,)).float(),
                in_features,
                blocksize,
                shards.read(bias, (out,)) if bias in shards else None,
            )
        except ValueError as error:
            raise CheckpointError(f"{weight}: {error}") from error


def pack_blocks(
    rows: Tensor,
    absmax: Tensor,
    levels: Tensor,
    in_features: int,
    blocksize: int,
    bias: Tensor | None,
) -> PackedWeight:
    """A codebook weight quantized in blocks of the flattened matrix.

    rows: codes uint8 ``(out, in / 2)``, low nibble first; absmax float32 ``(blocks,)``. Blocks run
    over row ends; a group never does, and lies within one block. Raises ValueError where that would
    need groups below 16.
    """
    out = rows.shape[0]
    group_size = math.gcd(in_features, blocksize)
    if group_size < min(_SMALLEST_GROUP, blocksize):
        raise ValueError(
            f"{in_features} inputs and blocks of {blocksize} would need groups of "
            f"{group_size}; the smallest supported is {_SMALLEST_GROUP}"
        )
    block_of_group = torch.arange(out * in_features // group_size) * group_size // blocksize
    return PackedWeight(
        qweight=rows,
        scales=absmax[block_of_group].view(out, in_features // group_size),
        zeros=None,
        levels=levels,
        out_features=out,
        in_features=in_features,
        group_size=group_size,
        bias=bias,
    )


def _absmax(shards: Shards, weight: str, state: Mapping[str, Any]) -> Tensor:
    """float32 ``(blocks,)``, double quantization undone as bitsandbytes undoes it."""
    absmax = shards.read(weight + ".absmax")
    if weight + ".nested_absmax" not in shards:
        return absmax.float()
    values = shards.read(weight + ".nested_quant_map").float()[absmax.int()]
    outer = shards.read(weight + ".nested_absmax").float()
    block = torch.arange(len(absmax)) // int(state["nested_blocksize"])
    return values * outer[block] + float(state["nested_offset"])
