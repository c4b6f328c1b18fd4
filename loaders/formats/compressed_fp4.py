"""compressed-tensors checkpoints of 4-bit floats: NVFP4 and MXFP4, with or without activations.

Per module: ``weight_packed`` uint8 (out, in / 2); ``weight_scale``, float8_e4m3fn (out, in / 16)
with ``weight_global_scale`` float32 (1) that divides it for NVFP4, uint8 exponents (out, in / 32)
for MXFP4. See :mod:`nybble.loaders.formats.microscaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from nybble.kernels import PackedWeight
from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.base import read_bias
from nybble.loaders.formats.compressed_tensors import OfCompressedTensors, config_groups
from nybble.loaders.formats.microscaling import mxfp4, nvfp4
from nybble.loaders.formats.settings import Settings
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_GROUPS = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}


@dataclass(frozen=True)
class CompressedTensorsFp4(OfCompressedTensors):
    """group: weights that share a scale, which tells the two formats apart."""

    group: int = 16

    marks: ClassVar[frozenset[str]] = frozenset(("weight_packed",))
    required: ClassVar[frozenset[str]] = frozenset(("weight_packed", "weight_scale"))
    optional: ClassVar[frozenset[str]] = frozenset(("weight_global_scale",))

    @property
    def name(self) -> str:
        return f"{self.quant_method} {'nvfp4' if self.group == 16 else 'mxfp4'}"

    @classmethod
    def accepts(cls, settings: Settings) -> bool:
        return super().accepts(settings) and settings.get("format") in tuple(_GROUPS)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        format = settings.choice("format", tuple(_GROUPS), "nvfp4-pack-quantized")
        for weights in config_groups(settings, (format,)).values():
            weights.choice("type", ("float",), "float")
            weights.choice("num_bits", (4,), 4)
            weights.choice("group_size", (_GROUPS[format],), _GROUPS[format])
            if not weights.flag("symmetric", True):
                raise weights.refuse("symmetric", "true")
        return cls({**settings, "quant_method": cls.quant_method}, _GROUPS[format])

    def read(self, shards: Shards, module: str) -> PackedWeight:
        pairs = shards.read(module + ".weight_packed")
        scales, expected = shards.read(module + ".weight_scale"), torch.uint8
        if self.group == 16:
            expected = torch.float8_e4m3fn
        if pairs.dtype != torch.uint8 or pairs.ndim != 2 or scales.dtype != expected:
            raise CheckpointError(
                f"{shards.folder}: {module} has {pairs.dtype} codes and {scales.dtype} scales, "
                f"expected a matrix of torch.uint8 and {expected}"
            )
        out, columns = pairs.shape[0], 2 * pairs.shape[1]
        if columns % self.group or scales.shape != (out, columns // self.group):
            raise CheckpointError(
                f"{shards.folder}: {module}.weight_scale has shape {tuple(scales.shape)}, expected "
                f"{(out, columns // self.group)} for {columns} inputs in groups of {self.group}"
            )
        bias = read_bias(shards, module, out)
        try:
            if self.group == 32:
                return mxfp4(pairs, scales, bias).packed()
            return nvfp4(
                pairs, scales, shards.read(module + ".weight_global_scale", (1,)), bias
            ).packed()
        except ValueError as error:
            raise CheckpointError(f"{shards.folder}: {module}: {error}") from error

    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        # Scales stay exponents for MXFP4, and become float32 for NVFP4.
        scale_bytes = 1 if self.group == 32 else 4
        return leaves["weight_packed"].elements + scale_bytes * leaves["weight_scale"].elements
