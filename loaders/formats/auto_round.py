"""auto-round checkpoints: the layouts of GPTQ and AWQ, with settings of their own.

``packing_format`` says which: ``auto_round:auto_gptq`` is GPTQ's v1, ``auto_round`` and
``auto_round:gptqmodel`` are its v2, ``auto_round:auto_awq`` is AWQ's GEMM packing. ``extra_config``
overrides the settings of modules, by their names or by regular expressions that match anywhere in
them; the first match is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import regex
from torch import Tensor

from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.affine import AffineSizes, AffineWeight
from nybble.loaders.formats.awq import Awq
from nybble.loaders.formats.base import AffineFormat
from nybble.loaders.formats.gptq import Gptq
from nybble.loaders.formats.settings import Settings
from nybble.loaders.patterns import match
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_GPTQ, _AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"
_GPTQ_V2 = ("auto_round", "auto_round:gptqmodel")


@dataclass(frozen=True)
class AutoRound(AffineFormat):
    """The settings of one auto-round checkpoint.

    packing: the GPTQ or AWQ layout in which modules are stored.
    extra: names or patterns, each with the settings it overrides.
    """

    packing: AffineFormat = field(kw_only=True)
    extra: tuple[tuple[str, Settings], ...] = ()

    quant_method: ClassVar[str] = "auto-round"
    marks: ClassVar[frozenset[str]] = Gptq.marks
    required: ClassVar[frozenset[str]] = Gptq.required
    optional: ClassVar[frozenset[str]] = Gptq.optional

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        packing = settings.choice("packing_format", (_GPTQ, _AWQ, *_GPTQ_V2), _GPTQ)
        settings.choice("data_type", ("int",), "int")
        if settings.integer("act_bits", 16) < 16:
            raise settings.refuse("act_bits", "16: quantized activations are not supported")
        kind = Awq if packing == _AWQ else Gptq
        stored = replace(
            kind({}),
            bits=settings.choice("bits", kind.widths, 4),
            group_size=settings.group_size("group_size"),
            sym=settings.flag("sym", True),
        )
        if isinstance(stored, Gptq):
            stored = replace(stored, zeros_are_one_less=packing == _GPTQ)
        return cls(
            {**settings, "quant_method": cls.quant_method},
            stored.bits,
            stored.group_size,
            stored.sym,
            packing=stored,
            extra=_extra(settings),
        )

    @property
    def least_zero(self) -> int:
        return self.packing.least_zero

    def for_module(self, module: str) -> Self:
        named = [found for name, found in self.extra if name == module]
        matched = [found for name, found in self.extra if match(name, module, "search")]
        overrides = (named or matched)[:1]
        if not overrides or overrides[0].integer("bits", self.bits) >= 16:
            return self
        (found,) = overrides
        found.choice("data_type", ("int",), "int")
        bits = found.choice("bits", self.packing.widths, self.bits)
        group_size = found.group_size("group_size", self.group_size)
        sym = found.flag("sym", self.sym)
        stored = replace(self.packing, bits=bits, group_size=group_size, sym=sym)
        return replace(self, bits=bits, group_size=group_size, sym=sym, packing=stored, extra=())

    def quantized(self, shards: Shards, module: str) -> AffineWeight:
        # Unlike AWQ's own files, symmetric modules have zero points here; the reader takes them.
        return self.for_module(module).packing.quantized(shards, module)

    def tensors(self, module: str, weight: AffineWeight) -> Mapping[str, Tensor]:
        return self.for_module(module).packing.tensors(module, weight)

    def with_16_bits(self, modules: Sequence[str], quantized: Sequence[str]) -> Self:
        kept: Mapping[str, Any] = {name: {"bits": 16} for name in modules}
        extra = {**kept, **(self.settings.get("extra_config") or {}), **kept}
        return replace(self, settings={**self.settings, "extra_config": extra})

    def sizes(self, leaves: Mapping[str, TensorHeader]) -> AffineSizes:
        return self.packing.sizes(leaves)


def _extra(settings: Settings) -> tuple[tuple[str, Settings], ...]:
    found = []
    for name, overrides in settings.table("extra_config").items():
        source = f"{settings.source}: extra_config.{name}"
        if not isinstance(overrides, Mapping):
            raise CheckpointError(f"{source} is {overrides!r}, expected an object")
        try:
            regex.compile(name)
        except regex.error as error:
            raise CheckpointError(f"{source} is not a regular expression: {error}") from error
        found.append((name, Settings(overrides, source)))
    return tuple(found)
