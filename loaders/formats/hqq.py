"""HQQ checkpoints as transformers saves them, quantized along the inputs (``axis`` 1).

Per module: ``W_q``, the matrix's groups as rows, packed along the rows: of n rows of codes with b
bits, stored row i holds rows i, i + n/k, i + 2n/k, …, the first in the highest bits (k codes in a
byte; 10 codes of 3 bits in an int32, n filled up to tens); ``scale`` and ``zero`` floating
(groups, 1), with w = scale · (code − zero); ``nbits``, ``axis``, ``shape`` and other settings,
encoded as tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.packed import INTEGER_LEVELS, pack_nibbles
from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.affine import two_digits
from nybble.loaders.formats.base import Format, read_bias
from nybble.loaders.formats.settings import Settings
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_CODES = {1: 8, 2: 4, 3: 10, 4: 2, 8: 1}  # in a byte, or of 3 bits in an int32


@dataclass(frozen=True)
class Hqq(Format):
    """The settings are stored with each module."""

    quant_method: ClassVar[str] = "hqq"
    marks: ClassVar[frozenset[str]] = frozenset(("W_q",))
    required: ClassVar[frozenset[str]] = frozenset(
        ("W_q", "scale", "zero", "nbits", "axis", "shape")
    )
    optional: ClassVar[frozenset[str]] = frozenset(
        (
            *("group_size", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype"),
            *("quant_scale", "quant_zero", "offload_meta", "encoded_state_dict"),
            *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
        )
    )

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        for name, of_module in settings.table("quant_config").items():
            if name in ("scale_quant_params", "zero_quant_params") and of_module:
                raise settings.refuse(
                    "quant_config", f"none of {name}: scales and zeros as they are"
                )
        return cls({**settings, "quant_method": cls.quant_method})

    def read(self, shards: Shards, module: str) -> PackedWeight:
        bits, axis = (_integer(shards, f"{module}.{leaf}") for leaf in ("nbits", "axis"))
        if bits not in _CODES or axis != 1:
            known = ", ".join(map(str, _CODES))
            raise CheckpointError(
                f"{shards.folder}: {module} has {bits} bits along axis {axis}, expected {known} "
                "along axis 1"
            )
        if _set(shards, module, "view_as_float") or _set(shards, module, "quant_scale"):
            raise CheckpointError(
                f"{shards.folder}: {module} has view_as_float or quant_scale, which are not "
                "supported"
            )
        out, columns = (int(n) for n in shards.read(module + ".shape", (2,)))
        packed = shards.read(module + ".W_q")
        expected = torch.int32 if bits == 3 else torch.uint8
        size = packed.shape[-1]
        if packed.dtype != expected or packed.ndim != 2 or not size or columns % size:
            raise CheckpointError(
                f"{shards.folder}: {module}.W_q is {packed.dtype} {tuple(packed.shape)}, expected "
                f"a matrix of {expected} whose rows divide {columns} inputs"
            )
        groups = columns // size
        scales, zeros = (
            shards.read(f"{module}.{leaf}", (out * groups, 1)).view(out, groups)
            for leaf in ("scale", "zero")
        )
        places = range((_CODES[bits] - 1) * bits, -1, -bits)
        codes = torch.cat([packed >> place & 2**bits - 1 for place in places]).to(torch.uint8)
        if len(codes) < out * groups:
            raise CheckpointError(
                f"{shards.folder}: {module}.W_q has codes for {len(codes)} groups, expected "
                f"{out * groups}"
            )
        codes = codes[: out * groups].reshape(out, columns)
        perm: Tensor | None = None
        if bits == 8:
            codes, scales, zeros, perm = two_digits(codes, scales, zeros)
        if not scales.isfinite().all():
            raise CheckpointError(f"{shards.folder}: {module}.scale is too large or not finite")
        return PackedWeight(
            qweight=pack_nibbles(codes),
            scales=scales.contiguous(),
            zeros=zeros.to(scales.dtype).contiguous(),
            levels=INTEGER_LEVELS,
            out_features=out,
            in_features=columns,
            group_size=size,
            perm=perm,
            bias=read_bias(shards, module, out),
        )

    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        scale = leaves["scale"]
        codes = scale.elements * leaves["W_q"].shape[-1]
        # One code a byte means 8 bits, which become two digits. Their perm is not counted.
        digits = 2 if codes == leaves["W_q"].elements else 1
        return codes * digits // 2 + 2 * digits * scale.elements * scale.itemsize


def _integer(shards: Shards, name: str) -> int:
    value = shards.read(name)
    if value.numel() != 1:
        raise CheckpointError(f"{shards.folder}: {name} has {value.numel()} values, expected one")
    return int(value)


def _set(shards: Shards, module: str, leaf: str) -> bool:
    name = f"{module}.{leaf}"
    return name in shards and bool(_integer(shards, name))
