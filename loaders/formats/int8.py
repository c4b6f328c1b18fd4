"""Weights of 8-bit integers with plain names, computed with 16-bit activations (W8A16).

compressed-tensors (``int-quantized``, ``naive-quantized``): ``weight`` int8 (out, in) with
``weight_scale``, one, one for each output, or (out, groups), and ``weight_zero_point`` int8 of the
same shape if not symmetric: w = scale · (code − zero).

bitsandbytes (LLM.int8): ``weight`` int8 (out, in), ``SCB`` float32 (out), the largest absolute
weight of each output: w = code · SCB / 127. The activations that LLM.int8 keeps in 16 bits are not
told apart: all are. ``weight_format`` is 0, for rows in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.affine import AffineWeight, consecutive_groups
from nybble.loaders.formats.base import Format, read_bias
from nybble.loaders.formats.compressed_tensors import OfCompressedTensors, config_groups
from nybble.loaders.formats.settings import Settings
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_INTEGERS = ("int-quantized", "naive-quantized")


@dataclass(frozen=True)
class CompressedTensorsInt8(OfCompressedTensors):
    marks: ClassVar[frozenset[str]] = frozenset(("weight_scale",))
    required: ClassVar[frozenset[str]] = frozenset(("weight", "weight_scale"))
    optional: ClassVar[frozenset[str]] = frozenset(("weight_zero_point",))

    @property
    def name(self) -> str:
        return f"{self.quant_method} int8"

    @classmethod
    def accepts(cls, settings: Settings) -> bool:
        if not super().accepts(settings) or settings.get("format") not in _INTEGERS:
            return False
        return all(
            group.get("type", "int") == "int"
            for group in config_groups(settings, _INTEGERS).values()
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        for weights in config_groups(settings, _INTEGERS).values():
            weights.choice("num_bits", (4, 8), 8)  # 4 bits are stored in 8 as well
            weights.choice("strategy", ("tensor", "channel", "group"), "tensor")
            weights.choice("actorder", ("weight", "static"), "weight")
        return cls({**settings, "quant_method": cls.quant_method})

    def read(self, shards: Shards, module: str) -> PackedWeight:
        scales, zeros = shards.read(module + ".weight_scale"), None
        if module + ".weight_zero_point" in shards:
            zeros = shards.read(module + ".weight_zero_point", tuple(scales.shape))
        return _packed(shards, module, scales, zeros)

    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        scales = leaves["weight_scale"]
        out = leaves["weight"].shape[0]
        return _loaded_bytes(leaves["weight"], max(scales.elements, out), scales.itemsize)


@dataclass(frozen=True)
class BitsAndBytesInt8(Format):
    quant_method: ClassVar[str] = "bitsandbytes"
    marks: ClassVar[frozenset[str]] = frozenset(("SCB",))
    required: ClassVar[frozenset[str]] = frozenset(("weight", "SCB"))
    optional: ClassVar[frozenset[str]] = frozenset(("weight_format",))

    @property
    def name(self) -> str:
        return "LLM.int8"

    @classmethod
    def accepts(cls, settings: Settings) -> bool:
        return super().accepts(settings) and settings.flag(
            settings.first("load_in_8bit", "_load_in_8bit"), False
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls({**settings, "quant_method": cls.quant_method})

    def read(self, shards: Shards, module: str) -> PackedWeight:
        layout = module + ".weight_format"
        if layout in shards and (found := int(shards.read(layout))) != 0:
            raise CheckpointError(
                f"{shards.folder}: {layout} is {found}, expected 0: rows in order"
            )
        return _packed(shards, module, shards.read(module + ".SCB").float() / 127, None)

    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        return _loaded_bytes(leaves["weight"], leaves["SCB"].elements, 4)


def _packed(shards: Shards, module: str, scales: Tensor, zeros: Tensor | None) -> PackedWeight:
    codes = shards.read(module + ".weight")
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise CheckpointError(
            f"{shards.folder}: {module}.weight is {codes.dtype} {tuple(codes.shape)}, expected an "
            "int8 matrix"
        )
    out, columns = codes.shape
    groups = scales.shape[1] if scales.ndim == 2 else 1
    if scales.numel() not in (1, out * groups) or columns % groups:
        raise CheckpointError(
            f"{shards.folder}: {module} has scales {tuple(scales.shape)}, expected one, {out}, or "
            f"{out} rows of groups that divide {columns} inputs"
        )
    points = torch.zeros_like(scales) if zeros is None else zeros
    weight = AffineWeight(
        codes.view(torch.uint8) ^ 0x80,
        scales.reshape(-1, groups).expand(out, groups),
        (points.reshape(-1, groups).expand(out, groups).short() + 128).to(torch.uint8),
        consecutive_groups(columns, columns // groups),
        bits=8,
        bias=read_bias(shards, module, out),
    )
    try:
        return weight.packed()
    except ValueError as error:
        raise CheckpointError(f"{shards.folder}: {module}: {error}") from error


def _loaded_bytes(codes: TensorHeader, scales: int, itemsize: int) -> int:
    # Two digits, each with scales, zeros and the columns' numbers.
    return codes.elements + 4 * scales * itemsize + 8 * codes.shape[1]
