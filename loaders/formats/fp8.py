"""FP8 checkpoints, whose weights are loaded in 16 bits.

Per module: ``weight`` float8_e4m3fn (out, in), which is multiplied by ``weight_scale_inv``
(despite its name) or ``weight_scale``. ``weight_scale_inv`` has one scale for every block of
``weight_block_size`` outputs and inputs, as DeepSeek and Qwen publish them; blocks at the ends may
be partial. ``weight_scale`` is one scale for the whole matrix, or one for each output.
Scales are floating, or bytes b that stand for 2ᵇ⁻¹²⁷.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from nybble.kernels import DenseWeight
from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.base import Format, read_bias
from nybble.loaders.formats.settings import Settings
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_ACTIVATIONS = "activations keep the dtype of the computation"
_CACHE = "the KV cache's dtype is what --kv-cache-dtype says"


@dataclass(frozen=True)
class Fp8(Format):
    """block: outputs and inputs that share a scale; None: derived from the scales' shape."""

    block: tuple[int, int] | None = None

    quant_method: ClassVar[str] = "fp8"
    in_16_bits: ClassVar[bool] = True
    marks: ClassVar[frozenset[str]] = frozenset(("weight_scale_inv", "weight_scale"))
    required: ClassVar[frozenset[str]] = frozenset(("weight",))
    optional: ClassVar[frozenset[str]] = marks
    ignored: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("input_scale", "activation_scale"), _ACTIVATIONS),
        **dict.fromkeys(("k_scale", "v_scale"), _CACHE),
    }

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        settings.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        settings.choice("expert_dtype", ("fp8",), "fp8")
        block = settings.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list | tuple)
            and len(block) == 2
            and all(type(n) is int and n > 0 for n in block)
        ):
            raise settings.refuse("weight_block_size", "two positive integers")
        return cls(
            {**settings, "quant_method": cls.quant_method},
            None if block is None else (block[0], block[1]),
        )

    def read(self, shards: Shards, module: str) -> DenseWeight:
        weight = shards.read(module + ".weight")
        if weight.dtype != torch.float8_e4m3fn or weight.ndim != 2:
            raise CheckpointError(
                f"{shards.folder}: {module}.weight is {weight.dtype} {tuple(weight.shape)}, "
                "expected a float8_e4m3fn matrix"
            )
        names = [f"{module}.{leaf}" for leaf in sorted(self.marks)]
        name = next(name for name in names if name in shards)
        scales = _floating(shards.read(name))
        out, columns = weight.shape
        if scales.numel() == 1:
            each = scales.reshape(1, 1)
        elif scales.shape in ((out,), (out, 1)):
            each = scales.reshape(out, 1)
        elif self.block is not None and scales.shape == self._grid(out, columns):
            each = scales.repeat_interleave(self.block[0], 0)[:out]
            each = each.repeat_interleave(self.block[1], 1)[:, :columns]
        else:
            expected = "" if self.block is None else f", {self._grid(out, columns)}"
            raise CheckpointError(
                f"{shards.folder}: {name} has shape {tuple(scales.shape)}, expected one scale, "
                f"{out}{expected}"
            )
        return DenseWeight((weight.float() * each).bfloat16(), read_bias(shards, module, out))

    def _grid(self, out: int, columns: int) -> tuple[int, int]:
        assert self.block is not None
        return -(-out // self.block[0]), -(-columns // self.block[1])

    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        return leaves["weight"].elements * dtype.itemsize


def _floating(scales: Tensor) -> Tensor:
    """float32; bytes are exponents."""
    if scales.dtype == torch.uint8:
        return (scales.float() - 127).exp2()
    return scales.float()
