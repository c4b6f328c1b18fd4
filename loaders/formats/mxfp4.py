"""MXFP4 checkpoints as gpt-oss is published: the experts in 4-bit floats, all else in 16 bits.

The files stack all experts of a layer. :func:`nybble.loaders.experts.open_shards` shows, for each
expert and linear layer, ``blocks`` uint8 (out, in / 32, 16), two codes in a byte, and ``scales``
uint8 (out, in / 32), exponents. See :mod:`nybble.loaders.formats.microscaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from nybble.kernels import PackedWeight
from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.base import Format, read_bias
from nybble.loaders.formats.microscaling import mxfp4
from nybble.loaders.formats.settings import Settings
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_GROUP = 32


@dataclass(frozen=True)
class Mxfp4(Format):
    quant_method: ClassVar[str] = "mxfp4"
    marks: ClassVar[frozenset[str]] = frozenset(("blocks",))
    required: ClassVar[frozenset[str]] = frozenset(("blocks", "scales"))

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls({**settings, "quant_method": cls.quant_method})

    def read(self, shards: Shards, module: str) -> PackedWeight:
        blocks, scales = shards.read(module + ".blocks"), shards.read(module + ".scales")
        if (
            blocks.dtype != torch.uint8
            or scales.dtype != torch.uint8
            or blocks.shape != (*scales.shape, _GROUP // 2)
        ):
            raise CheckpointError(
                f"{shards.folder}: {module} has blocks {blocks.dtype} {tuple(blocks.shape)} and "
                f"scales {scales.dtype} {tuple(scales.shape)}, expected uint8 (out, in / 32, 16) "
                "and (out, in / 32)"
            )
        bias = read_bias(shards, module, len(blocks))
        try:
            return mxfp4(blocks.flatten(1), scales, bias).packed()
        except ValueError as error:
            raise CheckpointError(f"{shards.folder}: {module}: {error}") from error

    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        return leaves["blocks"].elements + leaves["scales"].elements
