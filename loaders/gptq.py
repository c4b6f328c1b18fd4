"""GPTQ checkpoints (AutoGPTQ and GPTQModel layouts, formats v1 and v2).

Per module: ``qweight`` int32 (in/8, out), eight codes along *in*, low nibble first; ``qzeros``
int32 (groups, out/8), along *out*, low nibble first, holding zero − 1 in v1 and zero in v2;
``scales`` float16 (groups, out); ``g_idx`` int32 (in), the group of every input feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nybble.kernels import PackedWeight
from nybble.kernels.packed import (
    INTEGER_LEVELS,
    SYMMETRIC_LEVELS,
    pack_nibbles,
    unpack_nibbles,
)
from nybble.loaders.errors import CheckpointError
from nybble.loaders.shards import Shards
from torch import Tensor


def require_four_bits(settings: Mapping[str, Any], key: str = "bits") -> None:
    """Refuse any width but 4 by name."""
    if settings.get(key, 4) != 4:
        raise CheckpointError(f"{settings[key]}-bit weights are not supported; supported: 4 bits")


def checked_group_size(value: Any) -> int:
    """Rows of a group, −1 for all of them. Raises CheckpointError."""
    size = int(value)
    if size != -1 and not 1 <= size < 2**31:
        raise CheckpointError(f"group_size {size} is not supported; expected -1 or above 0")
    return size


@dataclass(frozen=True)
class GptqReader:
    """``group_size`` −1 means one group per output."""

    group_size: int
    zeros_are_one_less: bool
    name: str = "gptq"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> GptqReader:
        """Settings as in ``quantization_config`` or ``quantize_config.json``."""
        require_four_bits(settings)
        layout = settings.get("checkpoint_format") or "gptq"
        if layout not in ("gptq", "gptq_v2"):
            raise CheckpointError(
                f"checkpoint_format {layout!r} is not supported; supported: gptq, gptq_v2"
            )
        return cls(checked_group_size(settings.get("group_size", 128)), layout == "gptq")

    def read(self, shards: Shards, module: str) -> PackedWeight | None:
        """The module's weight, or None if it is not a GPTQ one."""
        if module + ".qweight" not in shards:
            return None
        qweight = shards.read(module + ".qweight")
        if qweight.dtype != torch.int32 or qweight.ndim != 2:
            raise CheckpointError(
                f"{shards.folder}: {module}.qweight is {qweight.dtype} {tuple(qweight.shape)}, "
                "expected an int32 matrix"
            )
        in_features, out = qweight.shape[0] * 8, qweight.shape[1]
        group_size = in_features if self.group_size == -1 else self.group_size
        groups = -(-in_features // group_size)
        scales = shards.read(module + ".scales", (groups, out))
        qzeros = shards.read(module + ".qzeros", (groups, -(-out // 8)))
        # The bytes of an int32 hold its eight columns in order, two to a byte, low nibble first:
        # the order of a packed row.
        rows = qweight.view(torch.uint8).view(in_features // 8, out, 4)
        rows = rows.transpose(0, 1).reshape(out, in_features // 2)
        zeros = unpack_nibbles(qzeros.view(torch.uint8), out)
        if self.zeros_are_one_less:
            zeros = (zeros + 1) & 0xF  # a zero of 0 was stored as −1, that is 15
        perm = None
        if module + ".g_idx" in shards:
            g_idx = shards.read(module + ".g_idx", (in_features,))
            perm = _order_by_group(g_idx, group_size, groups, module)
            if perm is not None:
                rows = pack_nibbles(unpack_nibbles(rows, in_features)[:, perm.long()])
        symmetric = bool((zeros == 8).all())
        bias = module + ".bias"
        return PackedWeight(
            qweight=rows,
            scales=scales.T.contiguous(),
            zeros=None if symmetric else zeros.T.to(scales.dtype).contiguous(),
            levels=SYMMETRIC_LEVELS if symmetric else INTEGER_LEVELS,
            out_features=out,
            in_features=in_features,
            group_size=group_size,
            perm=perm,
            bias=shards.read(bias, (out,)) if bias in shards else None,
        )


def _order_by_group(g_idx: Tensor, group_size: int, groups: int, module: str) -> Tensor | None:
    """The stable order that brings each group's features together; None if they already are."""
    g_idx = g_idx.long()
    expected = torch.arange(len(g_idx)) // group_size
    if torch.equal(g_idx, expected):
        return None
    perm = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[perm], expected):
        raise CheckpointError(
            f"{module}.g_idx does not put {group_size} features into each of {groups} groups"
        )
    return perm.int()
