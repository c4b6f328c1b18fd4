"""GPTQ checkpoints (AutoGPTQ and GPTQModel layouts, formats v1 and v2).

Per module, for codes of b bits: ``qweight`` int32 (in · b/32, out), codes one after another along
*in*, low bits first (one of 3 bits may lie across two words); ``qzeros`` int32 (groups,
out · b/32), likewise along *out*, holding zero − 1 in v1 and zero in v2; ``scales`` float16
(groups, out); ``g_idx`` int32 (in), the group of every input feature.

Codes of 2 and 3 bits are 4-bit codes that leave some levels unused. One of 8 is two 4-bit digits,
and so is its zero: s · (q − z) = 16 s · (q₁ − z₁) + s · (q₀ − z₀).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.packed import (
    INTEGER_LEVELS,
    SYMMETRIC_LEVELS,
    pack_nibbles,
    unpack_nibbles,
)
from nybble.loaders.errors import CheckpointError
from nybble.loaders.shards import Shards


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


def read_words(shards: Shards, name: str) -> Tensor | None:
    """The matrix of int32 words ``name``; None where there is none. Raises CheckpointError."""
    if name not in shards:
        return None
    words = shards.read(name)
    if words.dtype != torch.int32 or words.ndim != 2:
        raise CheckpointError(
            f"{shards.folder}: {name} is {words.dtype} {tuple(words.shape)}, expected an int32 "
            "matrix"
        )
    return words


_WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GptqReader:
    """``group_size`` −1 means one group per output."""

    group_size: int
    zeros_are_one_less: bool
    bits: int = 4
    name: str = "gptq"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> GptqReader:
        """Settings as in ``quantization_config`` or ``quantize_config.json``."""
        bits = settings.get("bits", 4)
        if bits not in _WIDTHS:
            raise CheckpointError(
                f"{bits}-bit weights are not supported; supported: "
                f"{', '.join(map(str, _WIDTHS))} bits"
            )
        layout = settings.get("checkpoint_format") or "gptq"
        if layout not in ("gptq", "gptq_v2"):
            raise CheckpointError(
                f"checkpoint_format {layout!r} is not supported; supported: gptq, gptq_v2"
            )
        return cls(checked_group_size(settings.get("group_size", 128)), layout == "gptq", bits)

    def read(self, shards: Shards, module: str) -> PackedWeight | None:
        """The module's weight, or None if it is not a GPTQ one."""
        qweight = read_words(shards, module + ".qweight")
        if qweight is None:
            return None
        in_features, out = qweight.shape[0] * 32 // self.bits, qweight.shape[1]
        group_size = in_features if self.group_size == -1 else self.group_size
        groups = -(-in_features // group_size)
        scales = shards.read(module + ".scales", (groups, out)).T.contiguous()
        qzeros = shards.read(module + ".qzeros", (groups, -(-out * self.bits // 32)))
        codes = _codes(qweight.T, self.bits)
        zeros = _codes(qzeros, self.bits)[:, :out].T
        if self.zeros_are_one_less:
            zeros = (zeros + 1) & (2**self.bits - 1)  # a zero of 0 was stored as −1
        perm = None
        if module + ".g_idx" in shards:
            g_idx = shards.read(module + ".g_idx", (in_features,))
            perm = _order_by_group(g_idx, group_size, groups, module)
            if perm is not None:
                codes = codes[:, perm.long()]
        symmetric = self.bits <= 4 and bool((zeros == 8).all())
        if self.bits == 8:
            if in_features % group_size or not (scales * 16).isfinite().all():
                raise CheckpointError(
                    f"{module}: an 8-bit weight needs whole groups and scales below 4,096; it has "
                    f"{in_features} inputs in groups of {group_size}, scales up to {scales.max()}"
                )
            codes = torch.cat((codes >> 4, codes & 0xF), dim=1)
            zeros = torch.cat((zeros >> 4, zeros & 0xF), dim=1)
            scales = torch.cat((scales * 16, scales), dim=1)
            in_order = torch.arange(in_features, dtype=torch.int32)
            perm = (in_order if perm is None else perm).repeat(2)
        bias = module + ".bias"
        return PackedWeight(
            qweight=pack_nibbles(codes),
            scales=scales,
            zeros=None if symmetric else zeros.to(scales.dtype).contiguous(),
            levels=SYMMETRIC_LEVELS if symmetric else INTEGER_LEVELS,
            out_features=out,
            in_features=in_features,
            group_size=group_size,
            perm=perm,
            bias=shards.read(bias, (out,)) if bias in shards else None,
        )


def _codes(words: Tensor, bits: int) -> Tensor:
    """int32 ``(rows, n)`` to the uint8 codes ``(rows, n · 32 / bits)`` that lie in its bits."""
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return octets
    if bits == 4:
        return unpack_nibbles(octets, 2 * octets.shape[1])
    each = np.unpackbits(octets.numpy(), axis=1, bitorder="little")
    each = each[:, : each.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return torch.from_numpy(np.packbits(each, axis=-1, bitorder="little")[..., 0])


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
