"""GPTQ checkpoints (AutoGPTQ and GPTQModel layouts, formats v1 and v2).

Per module, for codes of b bits: ``qweight`` int32 (in · b/32, out), codes one after another along
*in*, low bits first (one of 3 bits may lie across two words); ``qzeros`` int32 (groups,
out · b/32), likewise along *out*, holding zero − 1 in v1 and zero in v2; ``scales`` float16
(groups, out); ``g_idx`` int32 (in), the group of every input feature. ``pack_dtype`` may name words
of another width, which hold the same codes one after another.

GPTQModel's ``dynamic`` maps regular expressions to settings that override the general ones. The
first expression that matches the beginning of a module's name is used. The prefix ``-:`` leaves the
modules in 16 bits; the prefix ``+:`` has no effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import regex
import torch
from torch import Tensor

from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.affine import (
    WIDTHS,
    AffineSizes,
    AffineWeight,
    from_words,
    to_words,
)
from nybble.loaders.formats.base import (
    AffineFormat,
    Method,
    WriteOptions,
    read_bias,
    read_groups,
    read_words,
)
from nybble.loaders.formats.settings import Settings
from nybble.loaders.patterns import match
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_LAYOUTS = ("gptq", "gptq_v2")
_WORDS = {"int32": torch.int32, "int8": torch.int8, "int16": torch.int16, "int64": torch.int64}


@dataclass(frozen=True)
class Gptq(AffineFormat):
    """The settings of one GPTQ checkpoint.

    zeros_are_one_less: whether it is format v1.
    words: the dtype of the words that hold codes.
    dynamic: patterns, each with the settings it overrides.
    """

    zeros_are_one_less: bool = True
    words: torch.dtype = torch.int32
    dynamic: tuple[tuple[regex.Pattern[str], Mapping[str, Any]], ...] = ()

    quant_method: ClassVar[str] = "gptq"
    own_file: ClassVar[str | None] = "quantize_config.json"
    writes: ClassVar[tuple[str, ...]] = ("gptq",)
    options: ClassVar[frozenset[str]] = frozenset(("group_size", "bits", "sym", "desc_act"))
    method: ClassVar[Method | None] = "gptq"
    marks: ClassVar[frozenset[str]] = frozenset(("qweight",))
    required: ClassVar[frozenset[str]] = frozenset(("qweight", "qzeros", "scales"))
    optional: ClassVar[frozenset[str]] = frozenset(("g_idx",))
    widths: ClassVar[tuple[int, ...]] = WIDTHS

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        words = settings.choice("pack_dtype", tuple(_WORDS), "int32")
        layout = settings.choice(settings.first("checkpoint_format", "format"), _LAYOUTS, "gptq")
        return cls(
            {**settings, "quant_method": cls.quant_method},
            bits=settings.choice("bits", WIDTHS, 4),
            group_size=settings.group_size("group_size"),
            sym=settings.flag("sym", False),
            desc_act=settings.flag("desc_act", False),
            zeros_are_one_less=layout == "gptq",
            words=_WORDS[words],
            dynamic=_dynamic(settings),
        )

    @classmethod
    def for_writing(cls, name: str, options: WriteOptions) -> Self:
        values = {
            "quant_method": cls.quant_method,
            "bits": options.bits or 4,
            "group_size": options.group_size or 128,
            "sym": bool(options.sym),
            "desc_act": bool(options.desc_act),
            "checkpoint_format": "gptq",
        }
        return cls.from_settings(Settings(values, name))

    @property
    def least_zero(self) -> int:
        # v1 stores zero − 1. Readers differ on a zero of 0, which is stored as all ones: some add 1
        # to whole words, others do not mask the sum to the code's width. So it is never written.
        return 1 if self.zeros_are_one_less else 0

    @property
    def _word_bits(self) -> int:
        return self.words.itemsize * 8

    def for_module(self, module: str) -> Self:
        for pattern, overrides in self.dynamic:
            if match(pattern, module):
                found = Settings(overrides, f"dynamic {pattern.pattern!r}")
                return replace(
                    self,
                    bits=found.choice("bits", WIDTHS, self.bits),
                    group_size=found.group_size("group_size", self.group_size),
                    sym=found.flag("sym", self.sym),
                    desc_act=found.flag("desc_act", self.desc_act),
                    dynamic=(),
                )
        return self

    def quantized(self, shards: Shards, module: str) -> AffineWeight:
        own = self.for_module(module)
        qweight = read_words(shards, module + ".qweight", self.words)
        columns, out = qweight.shape[0] * self._word_bits // own.bits, qweight.shape[1]
        groups = -(-columns // own.group_of(columns))
        scales = shards.read(module + ".scales", (groups, out)).T.contiguous()
        shape = (groups, -(-out * own.bits // self._word_bits))
        qzeros = read_words(shards, module + ".qzeros", self.words, shape)
        zeros = from_words(qzeros, own.bits)[:, :out].T
        if self.zeros_are_one_less:
            zeros = (zeros + 1) & (2**own.bits - 1)  # a zero of 0 was stored as −1
        g_idx = read_groups(shards, module, "g_idx", columns, own.group_size)
        bias = read_bias(shards, module, out)
        return AffineWeight(from_words(qweight.T, own.bits), scales, zeros, g_idx, own.bits, bias)

    def tensors(self, module: str, weight: AffineWeight) -> Mapping[str, Tensor]:
        zeros = weight.zeros.T
        if self.zeros_are_one_less:
            zeros = (zeros - 1) & (2**weight.bits - 1)
        return {
            f"{module}.qweight": to_words(weight.codes, weight.bits, self.words).T.contiguous(),
            f"{module}.qzeros": to_words(zeros, weight.bits, self.words),
            f"{module}.scales": weight.scales.T.contiguous(),
            f"{module}.g_idx": weight.g_idx.int(),
        }

    def with_16_bits(self, modules: Sequence[str], quantized: Sequence[str]) -> Self:
        # GPTQModel and vLLM read `dynamic`, in which the first match is used; transformers reads
        # only the list.
        dynamic: dict[str, Any] = {f"-:{re.escape(name)}$": {} for name in modules}
        dynamic |= self.settings.get("dynamic") or {}
        lists = {"dynamic": dynamic, "modules_in_block_to_quantize": [list(quantized)]}
        return replace(self, settings={**self.settings, **lists})

    def sizes(self, leaves: Mapping[str, TensorHeader]) -> AffineSizes:
        words, out = leaves["qweight"].shape
        scales = leaves["scales"]
        columns = words * self._word_bits // self.bits
        return AffineSizes(out, columns, scales.shape[0], scales.itemsize)


def _dynamic(settings: Settings) -> tuple[tuple[regex.Pattern[str], Mapping[str, Any]], ...]:
    found = []
    for written, overrides in settings.table("dynamic").items():
        pattern = written[2:] if written.startswith(("-:", "+:")) else written
        try:
            compiled = regex.compile(pattern)
        except regex.error as error:
            raise CheckpointError(
                f"{settings.source}: dynamic has {written!r}, which is not a regular expression: "
                f"{error}"
            ) from error
        if not isinstance(overrides, Mapping):
            raise settings.refuse("dynamic", "an object of objects")
        found.append((compiled, {} if written.startswith("-:") else overrides))
    return tuple(found)
