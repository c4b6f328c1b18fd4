"""NF4 and FP4 checkpoints written by transformers with bitsandbytes.

Per module: ``weight`` uint8 (out · in / 2, 1), codes flattened row-major over (out, in), high
nibble first; ``weight.absmax``, one per block; ``weight.quant_map`` float32 (16), the levels;
``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``), JSON as bytes. With double quantization
``absmax`` holds uint8 codes into ``weight.nested_quant_map``, scaled by ``weight.nested_absmax``
per block of blocks and shifted by an offset. ``bnb_4bit_quant_storage`` may name another dtype for
``weight``, which then holds the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.base import CodebookFormat, OptionError, WriteOptions, read_bias
from nybble.loaders.formats.codebook import BLOCKSIZE, CodebookWeight, NestedAbsmax, QuantType
from nybble.loaders.formats.settings import Settings
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_KINDS: tuple[QuantType, ...] = ("nf4", "fp4")
_BLOCKSIZES = tuple(32 << n for n in range(8))
_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class BitsAndBytes(CodebookFormat):
    quant_method: ClassVar[str] = "bitsandbytes"
    writes: ClassVar[tuple[str, ...]] = _KINDS
    options: ClassVar[frozenset[str]] = frozenset(("group_size", "double_quant"))
    marks: ClassVar[frozenset[str]] = frozenset(("weight.absmax",))
    required: ClassVar[frozenset[str]] = frozenset(("weight", "weight.absmax", "weight.quant_map"))
    optional: ClassVar[frozenset[str]] = frozenset(
        ("weight.nested_absmax", "weight.nested_quant_map", *(_STATE + kind for kind in _KINDS))
    )

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        if not settings.flag(settings.first("load_in_4bit", "_load_in_4bit"), False):
            raise CheckpointError(
                f"{settings.source}: neither load_in_4bit nor load_in_8bit is true"
            )
        return cls(
            {**settings, "quant_method": cls.quant_method},
            quant_type=settings.choice("bnb_4bit_quant_type", _KINDS, "fp4"),
            double_quant=settings.flag("bnb_4bit_use_double_quant", False),
        )

    @classmethod
    def for_writing(cls, name: str, options: WriteOptions) -> Self:
        values = {
            "quant_method": cls.quant_method,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": name,
            "bnb_4bit_use_double_quant": bool(options.double_quant),
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
        blocksize = options.group_size or BLOCKSIZE
        if blocksize not in _BLOCKSIZES:
            known = ", ".join(map(str, _BLOCKSIZES))
            raise OptionError("group_size", f"is {blocksize}, expected one of {known} for {name}")
        return replace(cls.from_settings(Settings(values, name)), blocksize=blocksize)

    @property
    def name(self) -> str:
        return self.quant_type

    @property
    def _state(self) -> str:
        return _STATE + self.quant_type

    @property
    def written(self) -> WriteOptions:
        return WriteOptions(double_quant=self.double_quant)

    def check_sizes(self, out: int, columns: int) -> None:
        if out * columns % self.blocksize:
            raise ValueError(
                f"{out}×{columns} is not a multiple of {self.blocksize}: choose another block size "
                "(--group-size)"
            )

    def quantized(self, shards: Shards, module: str) -> CodebookWeight:
        weight = module + ".weight"
        name = f"{module}.{self._state}"
        try:
            state = json.loads(bytes(shards.read(name).tolist()))
            out, columns = (int(size) for size in state["shape"])
            blocksize = int(state["blocksize"])
            dtype = getattr(torch, str(state.get("dtype", "bfloat16")))
            absmax = _absmax(shards, weight, state)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{shards.folder}: {name} is not a quantization state: {error!r}"
            ) from error
        if columns % 2:
            raise CheckpointError(f"{weight} has an odd number of inputs, {columns}")
        flat = shards.read(weight).contiguous().flatten().view(torch.uint8)
        if len(flat) != out * columns // 2 or blocksize < 1:
            raise CheckpointError(
                f"{shards.folder}: {weight} has {len(flat)} bytes in blocks of {blocksize}, "
                f"expected {out}×{columns} codes of 4 bits"
            )
        codes = torch.stack((flat >> 4, flat & 0xF), dim=-1)
        return CodebookWeight(
            codes.view(out, columns),
            absmax,
            self.quant_type,
            dtype,
            shards.read(weight + ".quant_map", (16,)).float(),
            blocksize,
            read_bias(shards, module, out),
        )

    def tensors(self, module: str, weight: CodebookWeight) -> Mapping[str, Tensor]:
        state: dict[str, Any] = {
            "quant_type": weight.quant_type,
            "blocksize": weight.blocksize,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "shape": list(weight.codes.shape),
        }
        pairs = weight.codes.reshape(-1, 2)
        words = (pairs[:, :1] << 4) | pairs[:, 1:]
        name = module + ".weight"
        storage = getattr(torch, str(self.settings.get("bnb_4bit_quant_storage") or "uint8"))
        tensors = {
            name: words.flatten().view(storage)[:, None],
            f"{name}.quant_map": weight.levels.clone(),
        }
        absmax = weight.absmax
        if isinstance(absmax, NestedAbsmax):
            state |= {
                "nested_blocksize": absmax.blocksize,
                "nested_dtype": "float32",
                "nested_offset": absmax.offset,
            }
            tensors |= {
                f"{name}.absmax": absmax.codes,
                f"{name}.nested_absmax": absmax.absmax,
                f"{name}.nested_quant_map": absmax.levels,
            }
        else:
            tensors[f"{name}.absmax"] = absmax
        encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return tensors | {f"{module}.{self._state}": encoded}

    def with_16_bits(self, modules: Sequence[str], quantized: Sequence[str]) -> Self:
        # If the list is empty, transformers leaves out the head by itself.
        kept = self.settings.get("llm_int8_skip_modules") or ["lm_head"]
        return replace(self, settings={**self.settings, "llm_int8_skip_modules": [*kept, *modules]})

    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        # Scales become float32.
        codes = leaves["weight"]
        return codes.elements * codes.itemsize + 4 * leaves["weight.absmax"].elements


def _absmax(shards: Shards, weight: str, state: Mapping[str, Any]) -> Tensor | NestedAbsmax:
    absmax = shards.read(weight + ".absmax")
    if weight + ".nested_absmax" not in shards:
        return absmax.float()
    return NestedAbsmax(
        absmax,
        shards.read(weight + ".nested_absmax").float(),
        shards.read(weight + ".nested_quant_map", (256,)).float(),
        float(state["nested_offset"]),
        int(state["nested_blocksize"]),
    )
