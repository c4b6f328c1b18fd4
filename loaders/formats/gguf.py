"""GGUF: quantized blocks of llama.cpp, each tensor in a type of its own.

``weight.TYPE`` uint8 (out, bytes of a row). The types, and what is exact, are in
:mod:`nybble.loaders.formats.gguf_blocks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.base import Format, read_bias
from nybble.loaders.formats.gguf_blocks import BLOCK_TYPES, BlockType
from nybble.loaders.formats.settings import Settings
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_WEIGHT = "weight."
_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Gguf(Format):
    quant_method: ClassVar[str] = "gguf"
    marks: ClassVar[frozenset[str]] = frozenset(_WEIGHT + name for name in BLOCK_TYPES)
    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = marks

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls({**settings, "quant_method": cls.quant_method})

    def rounding(self, shards: Shards) -> str | None:
        kinds = Counter(
            leaf.removeprefix(_WEIGHT)
            for leaves in shards.modules.values()
            for leaf in self.marks.intersection(leaves)
        )
        rounded = [f"{n} {kind}" for kind, n in kinds.items() if BLOCK_TYPES[kind].is_rounded]
        if not rounded:
            return None
        return (
            f"{' and '.join(rounded)} tensors keep their minima as zero points, rounded to "
            "float32; the others are exact, embeddings in bfloat16"
        )

    def read(self, shards: Shards, module: str) -> PackedWeight:
        block, rows = self._stored(shards, module)
        try:
            weight = block.packed(rows)
        except ValueError as error:
            raise CheckpointError(f"{shards.folder}: {module}: {error}") from error
        return replace(weight, bias=read_bias(shards, module, weight.out_features))

    def embedding(self, shards: Shards, module: str) -> Tensor:
        # Some rows at a time: a large vocabulary's would need several times their memory.
        block, rows = self._stored(shards, module)
        columns = rows.shape[1] // block.nbytes * block.weights
        whole = torch.empty(len(rows), columns, dtype=torch.bfloat16)
        parts = zip(
            torch.split(rows, _ROWS_AT_A_TIME), torch.split(whole, _ROWS_AT_A_TIME), strict=True
        )
        try:
            for part, target in parts:
                target.copy_(block.packed(part).dequantize())
        except ValueError as error:
            raise CheckpointError(f"{shards.folder}: {module}: {error}") from error
        return whole

    def _stored(self, shards: Shards, module: str) -> tuple[BlockType, Tensor]:
        (leaf,) = self.marks.intersection(shards.modules[module])
        return BLOCK_TYPES[leaf.removeprefix(_WEIGHT)], shards.read(f"{module}.{leaf}")

    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        (leaf,) = self.marks.intersection(leaves)
        block, (out, row_bytes) = BLOCK_TYPES[leaf.removeprefix(_WEIGHT)], leaves[leaf].shape
        if module.endswith("embed_tokens"):  # is loaded in 16 bits
            return out * row_bytes // block.nbytes * block.weights * dtype.itemsize
        return round(block.packed_bytes(out, row_bytes))
