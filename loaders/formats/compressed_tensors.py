"""compressed-tensors checkpoints (llm-compressor): packed integers (``pack-quantized``), and FP8.

Per module, for codes of b bits: ``weight_packed`` int32 (out, in · b/32), codes one after another
along *in*, low bits first; ``weight_scale`` (out, groups), one group for the strategy ``channel``;
``weight_zero_point`` int32 (out · b/32, groups), packed along *out*, if not symmetric;
``weight_shape`` int64 (2); ``weight_g_idx`` int32 (in) for ``actorder: group``, −1 if it was
never filled. Codes and zero points are stored from 0 on, 2ᵇ⁻¹ above their values.

``config_groups`` give modules their settings. A module belongs to the group that names it, else to
one whose ``re:`` pattern matches the beginning of its name, else to one for its class, Linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import regex
import torch
from torch import Tensor

from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.affine import AffineSizes, AffineWeight, from_words, to_words
from nybble.loaders.formats.base import (
    AffineFormat,
    Format,
    Method,
    WriteOptions,
    read_bias,
    read_groups,
    read_words,
)
from nybble.loaders.formats.fp8 import Fp8
from nybble.loaders.formats.settings import Settings
from nybble.loaders.patterns import match
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

_PACKED = "pack-quantized"
_FLOAT = ("float-quantized", "naive-quantized")
_MIXED = "mixed-precision"  # every group states its own format
_LINEAR = "Linear"
_CACHE = "the KV cache's dtype is what --kv-cache-dtype says"
_ACTIVATIONS = "activations keep the dtype of the computation"


@dataclass(frozen=True)
class OfCompressedTensors(Format):
    """What all formats of the package have in common."""

    quant_method: ClassVar[str] = "compressed-tensors"
    transforms: ClassVar[frozenset[str]] = frozenset(("transform_config",))
    ignored: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("q_scale", "k_scale", "v_scale", "output_scale"), _CACHE),
        **dict.fromkeys(("k_zero_point", "v_zero_point", "output_zero_point"), _CACHE),
        **dict.fromkeys(("input_scale", "input_zero_point", "input_global_scale"), _ACTIVATIONS),
    }

    @property
    def remark(self) -> str | None:
        """Of weights that were calibrated for quantized activations (W8A8, W4A8) or a quantized
        cache."""
        groups = self.settings["config_groups"].values()
        found = []
        if any(group.get("input_activations") for group in groups):
            found.append(f"input_activations of config_groups are not used: {_ACTIVATIONS}")
        if self.settings.get("kv_cache_scheme"):
            found.append(f"kv_cache_scheme is not used: {_CACHE}")
        return "; ".join(found) or None


@dataclass(frozen=True)
class CompressedTensors(OfCompressedTensors, AffineFormat):
    """groups: targets, with the settings of the modules they match."""

    groups: tuple[tuple[str, CompressedTensors], ...] = ()

    writes: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    options: ClassVar[frozenset[str]] = frozenset(("group_size", "bits", "sym"))
    method: ClassVar[Method | None] = "gptq"
    widths: ClassVar[tuple[int, ...]] = (4, 8)
    marks: ClassVar[frozenset[str]] = frozenset(("weight_packed",))
    required: ClassVar[frozenset[str]] = frozenset(("weight_packed", "weight_scale"))
    optional: ClassVar[frozenset[str]] = frozenset(
        ("weight_zero_point", "weight_shape", "weight_g_idx")
    )

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        groups = [
            (target, cls._of_group(weights))
            for target, weights in config_groups(settings, (_PACKED,)).items()
        ]
        first = groups[0][1]
        return replace(
            cls({**settings, "quant_method": cls.quant_method}, groups=_by_rank(groups)),
            bits=first.bits,
            group_size=first.group_size,
            sym=first.sym,
            desc_act=any(group.desc_act for _, group in groups),
        )

    @classmethod
    def _of_group(cls, weights: Settings) -> CompressedTensors:
        weights.choice("type", ("int",), "int")
        if weights.flag("dynamic", False):
            raise weights.refuse("dynamic", "false")
        strategy = weights.choice("strategy", ("group", "channel"), "group")
        order = weights.get("actorder")
        if order not in (None, True, False, "weight", "static", "group", "dynamic"):
            raise weights.refuse("actorder", "null, weight, static, group or dynamic")
        return cls(
            {},
            bits=weights.choice("num_bits", cls.widths, 8),
            group_size=-1 if strategy == "channel" else weights.group_size("group_size"),
            sym=weights.flag("symmetric", True),
            desc_act=order in (True, "group", "dynamic"),
        )

    @classmethod
    def for_writing(cls, name: str, options: WriteOptions) -> Self:
        size = options.group_size or 128
        weights = {
            "num_bits": options.bits or 4,
            "type": "int",
            "symmetric": bool(options.sym),
            "strategy": "channel" if size == -1 else "group",
            "group_size": None if size == -1 else size,
            "dynamic": False,
        }
        group = {"targets": [_LINEAR], "weights": weights, "format": _PACKED}
        values = {
            "quant_method": cls.quant_method,
            "format": _PACKED,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
        return cls.from_settings(Settings(values, name))

    def for_module(self, module: str) -> Self:
        for target, group in self.groups:
            pattern = target.removeprefix("re:")
            if target in (module, _LINEAR) or (
                pattern != target and match(pattern, module) is not None
            ):
                return replace(
                    self,
                    bits=group.bits,
                    group_size=group.group_size,
                    sym=group.sym,
                    desc_act=group.desc_act,
                )
        raise CheckpointError(f"{module} is packed, and no target in config_groups matches it")

    def quantized(self, shards: Shards, module: str) -> AffineWeight:
        own = self.for_module(module)
        packed = read_words(shards, module + ".weight_packed")
        out, columns = packed.shape[0], packed.shape[1] * 32 // own.bits
        if module + ".weight_shape" in shards:
            out, columns = (int(n) for n in shards.read(module + ".weight_shape", (2,)))
        words = -(-columns * own.bits // 32)
        if packed.shape != (out, words):
            raise CheckpointError(
                f"{shards.folder}: {module}.weight_packed has shape {tuple(packed.shape)}, "
                f"expected {(out, words)}"
            )
        groups = -(-columns // own.group_of(columns))
        scales = shards.read(module + ".weight_scale", (out, groups))
        zeros = torch.full((out, groups), 2 ** (own.bits - 1), dtype=torch.uint8)
        if not own.sym:
            shape = (-(-out * own.bits // 32), groups)
            points = shards.read(module + ".weight_zero_point", shape)
            zeros = from_words(points.T, own.bits)[:, :out].T.contiguous()
        g_idx = module + ".weight_g_idx"
        filled = g_idx in shards and bool((shards.read(g_idx) >= 0).all())
        return AffineWeight(
            from_words(packed, own.bits)[:, :columns],
            scales,
            zeros,
            read_groups(shards, module, "weight_g_idx" if filled else "", columns, own.group_size),
            own.bits,
            read_bias(shards, module, out),
        )

    def tensors(self, module: str, weight: AffineWeight) -> Mapping[str, Tensor]:
        own = self.for_module(module)
        tensors = {
            f"{module}.weight_packed": to_words(weight.codes, weight.bits),
            f"{module}.weight_scale": weight.scales,
            f"{module}.weight_shape": torch.tensor(weight.codes.shape),
        }
        if not own.sym:
            points = to_words(weight.zeros.T, weight.bits).T.contiguous()
            tensors[f"{module}.weight_zero_point"] = points
        if own.desc_act:
            tensors[f"{module}.weight_g_idx"] = weight.g_idx.int()
        return tensors

    def with_16_bits(self, modules: Sequence[str], quantized: Sequence[str]) -> Self:
        ignored = [*(self.settings.get("ignore") or []), *modules]
        return replace(self, settings={**self.settings, "ignore": ignored})

    def sizes(self, leaves: Mapping[str, TensorHeader]) -> AffineSizes:
        (out, words), scales = leaves["weight_packed"].shape, leaves["weight_scale"]
        return AffineSizes(out, words * 32 // self.bits, scales.shape[1], scales.itemsize)


def config_groups(settings: Settings, formats: Sequence[str]) -> Mapping[str, Settings]:
    """Each target with the settings of the weights that it matches.

    Raises CheckpointError for a group in another format, and for sparse or transformed weights.
    """
    format = settings.choice("format", (*formats, _MIXED), formats[0])
    sparsity = settings.table("sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise settings.refuse("sparsity_config", "none: sparse weights are not supported")
    if settings.table("transform_config").get("config_groups"):
        raise settings.refuse("transform_config", "none: transforms are not supported")
    found: dict[str, Settings] = {}
    for name, group in settings.table("config_groups").items():
        source = f"{settings.source}: config_groups.{name}"
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{source} is {group!r}, expected an object")
        of_group = Settings(group, source)
        if of_group.table("weights"):
            of_group.choice("format", formats, formats[0] if format == _MIXED else format)
            weights = Settings(of_group.table("weights"), f"{source}.weights")
            found |= dict.fromkeys(of_group.names("targets"), weights)
    if not found:
        raise settings.refuse("config_groups", "groups with targets and weights")
    return found


def _block(weights: Settings) -> tuple[int, int] | None:
    """Outputs and inputs of a block; None for one scale a matrix or an output."""
    known = ("tensor", "channel", "block")
    if weights.choice("strategy", known, "tensor") != "block":
        return None
    block = weights.get("block_structure")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int for n in block):
        raise weights.refuse("block_structure", "two integers")
    return block[0], block[1]


def _by_rank(
    groups: Sequence[tuple[str, CompressedTensors]],
) -> tuple[tuple[str, CompressedTensors], ...]:
    """Targets in order of precedence; of duplicate targets the last is kept."""

    def rank(target: str) -> tuple[int, str]:
        return (2 if target == _LINEAR else 1 if target.startswith("re:") else 0, target)

    chosen = dict(groups)
    for target in chosen:
        try:
            regex.compile(target.removeprefix("re:"))
        except regex.error as error:
            raise CheckpointError(
                f"config_groups has the target {target!r}, which is not a regular expression: "
                f"{error}"
            ) from error
    return tuple((target, chosen[target]) for target in sorted(chosen, key=rank))


@dataclass(frozen=True)
class CompressedTensorsFp8(OfCompressedTensors, Fp8):
    """The same package's FP8 (``float-quantized``): ``weight`` with ``weight_scale``."""

    @property
    def name(self) -> str:
        return f"{self.quant_method} fp8"

    @classmethod
    def accepts(cls, settings: Settings) -> bool:
        format = settings.get("format")
        if not super().accepts(settings) or format not in _FLOAT:
            return False
        groups = config_groups(settings, _FLOAT).values()
        return format == _FLOAT[0] or any(group.get("type") == "float" for group in groups)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        blocks = set()
        for weights in config_groups(settings, _FLOAT).values():
            weights.choice("type", ("float",), "float")
            weights.choice("num_bits", (8,), 8)
            blocks.add(_block(weights))
        found = [block for block in blocks if block is not None]
        if len(found) > 1:
            raise settings.refuse("config_groups", "one block_structure for all groups")
        values = {**settings, "quant_method": cls.quant_method}
        return cls(values, found[0] if found else None)
