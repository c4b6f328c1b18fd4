"""AWQ checkpoints in the GEMM and GEMV packings.

GEMM: ``qweight`` int32 (in, out/8) and ``qzeros`` int32 (groups, out/8), eight values along *out*
in the order 0, 2, 4, 6, 1, 3, 5, 7 from the low nibble up; ``scales`` float16 (groups, out).

GEMV: ``qweight`` int32 (out, in/8) and ``qzeros`` int32 (out, width), eight values along *in* from
the low nibble up; ``scales`` float16 (out, 8 · width). The width is padded for the kernel it was
made for; what lies beyond the groups means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles, unpack_nibbles
from nybble.loaders.errors import CheckpointError
from nybble.loaders.gptq import checked_group_size, read_words, require_four_bits
from nybble.loaders.shards import Shards

# The nibble in which each of eight neighbouring outputs lies.
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqReader:
    """``group_size`` −1 means one group per output. Without zero points codes are offset by 8."""

    group_size: int
    zero_point: bool
    gemv: bool = False
    name: str = "awq"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> AwqReader:
        require_four_bits(settings, "bits" if "bits" in settings else "w_bit")
        version = str(settings.get("version", "gemm")).lower()
        if version not in ("gemm", "gemv"):
            raise CheckpointError(
                f"AWQ version {version!r} is not supported; supported: gemm, gemv"
            )
        group_size = settings.get("group_size", settings.get("q_group_size", 128))
        size = checked_group_size(group_size)
        return cls(size, bool(settings.get("zero_point", True)), version == "gemv")

    def read(self, shards: Shards, module: str) -> PackedWeight | None:
        """The module's weight, or None if it is not an AWQ one."""
        qweight = read_words(shards, module + ".qweight")
        if qweight is None:
            return None
        rows, scales, zeros = (self._gemv if self.gemv else self._gemm)(shards, module, qweight)
        out = rows.shape[0]
        in_features = qweight.shape[1] * 8 if self.gemv else qweight.shape[0]
        bias = module + ".bias"
        return PackedWeight(
            qweight=rows,
            scales=scales,
            zeros=zeros,
            levels=SYMMETRIC_LEVELS if zeros is None else INTEGER_LEVELS,
            out_features=out,
            in_features=in_features,
            group_size=in_features if self.group_size == -1 else self.group_size,
            bias=shards.read(bias, (out,)) if bias in shards else None,
        )

    def _groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def _gemm(
        self, shards: Shards, module: str, qweight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, groups = qweight.shape[1] * 8, self._groups(qweight.shape[0])
        scales = shards.read(module + ".scales", (groups, out)).T.contiguous()
        zeros: Tensor | None = None
        if self.zero_point or module + ".qzeros" in shards:
            codes = _unpack(shards.read(module + ".qzeros", (groups, out // 8)))
            zeros = codes.T.to(scales.dtype).contiguous()
        return pack_nibbles(_unpack(qweight).T.contiguous()), scales, zeros

    def _gemv(
        self, shards: Shards, module: str, qweight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, groups = qweight.shape[0], self._groups(qweight.shape[1] * 8)
        scales = shards.read(module + ".scales")
        if scales.shape[0] != out or scales.shape[1] < groups or scales.shape[1] % 8:
            raise CheckpointError(
                f"{shards.folder}: {module}.scales has shape {tuple(scales.shape)}, expected "
                f"({out}, {-(-groups // 8) * 8} or a greater multiple of 8)"
            )
        zeros: Tensor | None = None
        if self.zero_point or module + ".qzeros" in shards:
            packed = shards.read(module + ".qzeros", (out, scales.shape[1] // 8))
            zeros = unpack_nibbles(packed.view(torch.uint8), groups).to(scales.dtype)
        # A row's bytes hold its columns in order, two to a byte: already a packed row.
        return qweight.view(torch.uint8), scales[:, :groups].contiguous(), zeros


def _unpack(packed: Tensor) -> Tensor:
    """int32 ``(rows, out / 8)`` to uint8 codes ``(rows, out)``."""
    octets = packed.view(torch.uint8).view(*packed.shape, 4)
    nibbles = torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(2)
    return nibbles[..., list(_NIBBLE_OF)].flatten(1)
