"""AWQ checkpoints in the GEMM packing.

Per module: ``qweight`` int32 (in, out/8) and ``qzeros`` int32 (groups, out/8), eight values along
*out* in the order 0, 2, 4, 6, 1, 3, 5, 7 from the low nibble up; ``scales`` float16 (groups, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nybble.kernels import PackedWeight
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles
from nybble.loaders.errors import CheckpointError
from nybble.loaders.gptq import require_four_bits
from nybble.loaders.shards import Shards
from torch import Tensor

# The nibble in which each of eight neighbouring outputs lies.
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqReader:
    """``group_size`` −1 means one group per output. Without zero points codes are offset by 8."""

    group_size: int
    zero_point: bool
    name: str = "awq"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> AwqReader:
        require_four_bits(settings, "bits" if "bits" in settings else "w_bit")
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise CheckpointError(f"AWQ version {version!r} is not supported; supported: gemm")
        group_size = settings.get("group_size", settings.get("q_group_size", 128))
        return cls(int(group_size), bool(settings.get("zero_point", True)))

    def read(self, shards: Shards, module: str) -> PackedWeight | None:
        """The module's weight, or None if it is not an AWQ one."""
        if module + ".qweight" not in shards:
            return None
        qweight = shards.read(module + ".qweight")
        in_features, out = qweight.shape[0], qweight.shape[1] * 8
        group_size = in_features if self.group_size == -1 else self.group_size
        groups = -(-in_features // group_size)
        scales = shards.read(module + ".scales", (groups, out))
        zeros: Tensor | None = None
        if self.zero_point or module + ".qzeros" in shards:
            codes = _unpack(shards.read(module + ".qzeros", (groups, out // 8)))
            zeros = codes.T.to(scales.dtype).contiguous()
        bias = module + ".bias"
        return PackedWeight(
            qweight=pack_nibbles(_unpack(qweight).T.contiguous()),
            scales=scales.T.contiguous(),
            zeros=zeros,
            levels=SYMMETRIC_LEVELS if zeros is None else INTEGER_LEVELS,
            out_features=out,
            in_features=in_features,
            group_size=group_size,
            bias=shards.read(bias, (out,)) if bias in shards else None,
        )


def _unpack(packed: Tensor) -> Tensor:
    """int32 ``(rows, out / 8)`` to uint8 codes ``(rows, out)``."""
    octets = packed.view(torch.uint8).view(*packed.shape, 4)
    nibbles = torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(2)
    return nibbles[..., list(_NIBBLE_OF)].flatten(1)
