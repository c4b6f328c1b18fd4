"""AWQ checkpoints in the GEMM and GEMV packings.

GEMM: ``qweight`` int32 (in, out/8) and ``qzeros`` int32 (groups, out/8), eight values along *out*
in the order 0, 2, 4, 6, 1, 3, 5, 7 from the low nibble up; ``scales`` float16 (groups, out).

GEMV: ``qweight`` int32 (out, in/8) and ``qzeros`` int32 (out, width), eight values along *in* from
the low nibble up; ``scales`` float16 (out, 8 · width). The width is padded for AutoAWQ's
kernel; values beyond the groups are meaningless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.affine import (
    AffineSizes,
    AffineWeight,
    consecutive_groups,
    from_words,
    to_words,
)
from nybble.loaders.formats.base import AffineFormat, Method, WriteOptions, read_bias, read_words
from nybble.loaders.formats.settings import Settings
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight neighbouring outputs in a word, from the low nibble
_NIBBLE_OF = tuple(_ORDER.index(output) for output in range(8))


@dataclass(frozen=True)
class Awq(AffineFormat):
    """If ``sym``, there are no zero points and codes are offset by 8.

    gemv: whether the packing is GEMV, see above.
    """

    gemv: bool = False

    quant_method: ClassVar[str] = "awq"
    own_file: ClassVar[str | None] = "quant_config.json"
    writes: ClassVar[tuple[str, ...]] = ("awq",)
    options: ClassVar[frozenset[str]] = frozenset(("group_size",))
    method: ClassVar[Method | None] = "awq"
    marks: ClassVar[frozenset[str]] = frozenset(("qweight",))
    required: ClassVar[frozenset[str]] = frozenset(("qweight", "scales"))
    optional: ClassVar[frozenset[str]] = frozenset(("qzeros",))

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        settings.choice(settings.first("bits", "w_bit"), (4,), 4)
        version = settings.choice(settings.first("version", "format"), ("gemm", "gemv"), "gemm")
        return cls(
            {**settings, "quant_method": cls.quant_method},
            group_size=settings.group_size(settings.first("group_size", "q_group_size")),
            sym=not settings.flag("zero_point", True),
            gemv=version == "gemv",
        )

    @classmethod
    def for_writing(cls, name: str, options: WriteOptions) -> Self:
        values = {
            "quant_method": cls.quant_method,
            "bits": 4,
            "group_size": options.group_size or 128,
            "zero_point": True,
            "version": "gemm",
        }
        return cls.from_settings(Settings(values, name))

    def quantized(self, shards: Shards, module: str) -> AffineWeight:
        qweight = read_words(shards, module + ".qweight")
        codes, scales, zeros = (self._gemv if self.gemv else self._gemm)(shards, module, qweight)
        out, columns = codes.shape
        if zeros is None:
            zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
        g_idx = consecutive_groups(columns, self.group_size)
        return AffineWeight(codes, scales, zeros, g_idx, bias=read_bias(shards, module, out))

    def _groups(self, columns: int) -> int:
        return -(-columns // self.group_of(columns))

    def _gemm(
        self, shards: Shards, module: str, qweight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, groups = qweight.shape[1] * 8, self._groups(qweight.shape[0])
        scales = shards.read(module + ".scales", (groups, out)).T.contiguous()
        zeros: Tensor | None = None
        if not self.sym or module + ".qzeros" in shards:
            qzeros = shards.read(module + ".qzeros", (groups, out // 8))
            zeros = _by_eight(from_words(qzeros, 4), _NIBBLE_OF).T
        return _by_eight(from_words(qweight, 4), _NIBBLE_OF).T.contiguous(), scales, zeros

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
        if not self.sym or module + ".qzeros" in shards:
            packed = shards.read(module + ".qzeros", (out, scales.shape[1] // 8))
            zeros = from_words(packed, 4)[:, :groups]
        return from_words(qweight, 4), scales[:, :groups].contiguous(), zeros

    def tensors(self, module: str, weight: AffineWeight) -> Mapping[str, Tensor]:
        if self.gemv:
            groups = weight.scales.shape[1]
            # Words of a row of zeros, padded as AutoAWQ's kernels for small groups read them.
            multiple = max(1, 128 // self.group_of(weight.codes.shape[1]))
            width = -(-groups // (8 * multiple)) * multiple
            padding = (0, 8 * width - groups)
            return {
                f"{module}.qweight": to_words(weight.codes, 4),
                f"{module}.qzeros": to_words(
                    torch.nn.functional.pad(weight.zeros, padding).contiguous(), 4
                ),
                f"{module}.scales": torch.nn.functional.pad(weight.scales, padding),
            }
        return {
            f"{module}.qweight": to_words(_by_eight(weight.codes.T, _ORDER), 4),
            f"{module}.qzeros": to_words(_by_eight(weight.zeros.T, _ORDER), 4),
            f"{module}.scales": weight.scales.T.contiguous(),
        }

    def with_16_bits(self, modules: Sequence[str], quantized: Sequence[str]) -> Self:
        # If the list is empty, transformers leaves out the head by itself.
        kept = self.settings.get("modules_to_not_convert") or ["lm_head"]
        settings = {**self.settings, "modules_to_not_convert": [*kept, *modules]}
        return replace(self, settings=settings)

    def sizes(self, leaves: Mapping[str, TensorHeader]) -> AffineSizes:
        rows, words = leaves["qweight"].shape
        out, columns = (rows, words * 8) if self.gemv else (words * 8, rows)
        return AffineSizes(out, columns, self._groups(columns), leaves["scales"].itemsize)


def _by_eight(codes: Tensor, order: Sequence[int]) -> Tensor:
    """Reorder every eight codes of a row."""
    return codes.reshape(len(codes), -1, 8)[..., list(order)].flatten(1)
