"""What a checkpoint format is: its settings, its reader, its writer and its size estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.affine import (
    AffineSizes,
    AffineWeight,
    consecutive_groups,
    packed_bytes,
    words_for,
)
from nybble.loaders.formats.codebook import BLOCKSIZE, CodebookWeight, QuantType
from nybble.loaders.formats.settings import Settings
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader

QuantizedWeight = AffineWeight | CodebookWeight
Method = Literal["gptq", "awq"]


class OptionError(ValueError):
    """A format cannot be written with this option.

    option: the field of WriteOptions.
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option} {reason}")
        self.option = option
        self.reason = reason


@dataclass(frozen=True)
class WriteOptions:
    """How to write a format. None stands for the format's default.

    group_size: inputs which share a scale, −1 for all of them; for NF4 and FP4, the blocksize.
    bits: the width of a code.
    sym: whether the zero is fixed in the middle of the codes.
    desc_act: whether columns are quantized in the order of falling input power.
    double_quant: whether absmax is stored in 8 bits.
    """

    group_size: int | None = None
    bits: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    double_quant: bool | None = None


@dataclass(frozen=True)
class Format(ABC):
    """How one checkpoint is quantized.

    settings: the complete ``quantization_config``, including unknown fields.

    Class attributes:

    quant_method: as in ``quantization_config``.
    own_file: a file that older tools write instead of ``quantization_config``.
    writes: the names under which ``nybble quantize`` writes it; none if it can only be read.
    options: the fields of WriteOptions that can be set for it.
    method: how ``nybble quantize`` calibrates it; None if it needs no calibration.
    transforms: settings of transformed weights that it looks into itself; any other is refused.
    in_16_bits: whether its weights are dequantized to 16 bits while they are loaded.

    Tensor names, relative to their module:

    marks: a module with any of them is quantized.
    required: every quantized module has them.
    optional: a quantized module may have them, in addition to its bias.
    ignored: any module may have them; they are not used. Maps each to the reason.
    """

    settings: Mapping[str, Any]

    quant_method: ClassVar[str]
    own_file: ClassVar[str | None] = None
    writes: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[frozenset[str]] = frozenset()
    method: ClassVar[Method | None] = None
    transforms: ClassVar[frozenset[str]] = frozenset()
    in_16_bits: ClassVar[bool] = False

    marks: ClassVar[frozenset[str]]
    required: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]] = frozenset()
    ignored: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def name(self) -> str:
        """The name in ``nybble inspect`` and error messages."""
        return self.quant_method

    @classmethod
    def accepts(cls, settings: Settings) -> bool:
        """Whether ``settings`` describe this format."""
        return bool(settings.get("quant_method") == cls.quant_method)

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Raises CheckpointError naming the field that is not supported."""

    def owns(self, leaves: Collection[str]) -> bool:
        """Whether a module with these tensors is quantized."""
        return not self.marks.isdisjoint(leaves)

    @property
    def remark(self) -> str | None:
        """What of the settings is not used, and why, for one line in the log; None if nothing."""
        return None

    def rounding(self, shards: Shards) -> str | None:
        """Which weights loading rounds, and how; None if it keeps every value."""
        return None

    @abstractmethod
    def read(self, shards: Shards, module: str) -> PackedWeight | DenseWeight:
        """A quantized module's weight. Raises CheckpointError naming the tensor."""

    def embedding(self, shards: Shards, module: str) -> Tensor:
        """A quantized embedding in bfloat16 ``(vocab, hidden)``: it is looked up, not multiplied.

        Raises as :meth:`read`.
        """
        weight = self.read(shards, module)
        return (
            weight.weight if isinstance(weight, DenseWeight) else weight.dequantize(torch.bfloat16)
        )

    @abstractmethod
    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        """Bytes a quantized module takes in memory, without levels and bias.

        dtype: the dtype of the weights that are not quantized.
        """


@dataclass(frozen=True)
class WritableFormat(Format):
    """A format that can be written too, module by module."""

    @classmethod
    def for_writing(cls, name: str, options: WriteOptions) -> Self:
        """The format as ``nybble quantize`` writes it under ``name``, one of ``writes``.

        Raises ValueError for a format that is written only because a base has it.
        """
        raise ValueError(f"{cls.quant_method} is written only if a base has it")

    @property
    def written(self) -> WriteOptions:
        """The options which a format written ``like`` this one takes over."""
        return WriteOptions()

    @abstractmethod
    def check_sizes(self, out: int, columns: int) -> None:
        """Raises ValueError for a weight that the format cannot hold."""

    @abstractmethod
    def quantized(self, shards: Shards, module: str) -> QuantizedWeight:
        """A quantized module as it is stored. Raises CheckpointError naming the tensor."""

    @abstractmethod
    def tensors(self, module: str, weight: Any) -> Mapping[str, Tensor]:
        """The tensors of a quantized module as they are stored, by full name, without its bias."""

    @abstractmethod
    def with_16_bits(self, modules: Sequence[str], quantized: Sequence[str]) -> Self:
        """The format with ``modules`` added to the list of those that are not quantized.

        quantized: all modules that remain quantized.
        """

    def read(self, shards: Shards, module: str) -> PackedWeight | DenseWeight:
        weight = self.quantized(shards, module)
        try:
            return weight.packed()
        except ValueError as error:
            raise CheckpointError(f"{shards.folder}: {module}: {error}") from error


@dataclass(frozen=True)
class AffineFormat(WritableFormat):
    """A format of integer codes, scales and zeros.

    bits: the width of a code.
    group_size: inputs which share a scale, −1 for all of them.
    sym: whether every zero is in the middle of the codes.
    desc_act: whether groups may be out of the order of the inputs.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    desc_act: bool = False

    widths: ClassVar[tuple[int, ...]] = (4,)

    @property
    def least_zero(self) -> int:
        """The smallest zero that every reader of the format understands."""
        return 0

    def for_module(self, module: str) -> Self:
        """The format with the settings of one module, for checkpoints that mix settings."""
        return self

    def group_of(self, columns: int) -> int:
        """The group size of a layer with ``columns`` inputs."""
        return columns if self.group_size == -1 else self.group_size

    @property
    def written(self) -> WriteOptions:
        return WriteOptions(group_size=self.group_size, sym=self.sym)

    def check_sizes(self, out: int, columns: int) -> None:
        size, word = self.group_of(columns), words_for(self.bits)
        if columns % size or columns % word or out % word:
            hint = ": choose another group size (--group-size), or -1 for all inputs"
            raise ValueError(
                f"{out} outputs and {columns} inputs do not divide into groups of {size} "
                f"inputs and words of {word}{hint if columns % size else ''}"
            )

    @abstractmethod
    def quantized(self, shards: Shards, module: str) -> AffineWeight:
        """A quantized module as it is stored. Raises CheckpointError naming the tensor."""

    @abstractmethod
    def sizes(self, leaves: Mapping[str, TensorHeader]) -> AffineSizes:
        """The sizes of a module, from its tensors' headers."""

    def loaded_bytes(
        self, module: str, leaves: Mapping[str, TensorHeader], dtype: torch.dtype
    ) -> int:
        own = self.for_module(module)
        return packed_bytes(own.sizes(leaves), own.bits, zeros=not own.sym, act_order=own.desc_act)


@dataclass(frozen=True)
class CodebookFormat(WritableFormat):
    """A format of codes into a table of levels, in blocks with an absmax each.

    blocksize: for weights that are being quantized; stored weights carry their own.
    """

    quant_type: QuantType = field(kw_only=True)
    double_quant: bool = False
    blocksize: int = BLOCKSIZE


def read_bias(shards: Shards, module: str, out: int) -> Tensor | None:
    """The bias of a quantized module; None if it has none."""
    name = module + ".bias"
    return shards.read(name, (out,)) if name in shards else None


def read_words(
    shards: Shards,
    name: str,
    dtype: torch.dtype = torch.int32,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """A matrix of words. Raises CheckpointError."""
    words = shards.read(name, shape)
    if words.dtype != dtype or words.ndim != 2:
        raise CheckpointError(
            f"{shards.folder}: {name} is {words.dtype} {tuple(words.shape)}, expected an "
            f"{str(dtype).removeprefix('torch.')} matrix"
        )
    return words


def read_groups(shards: Shards, module: str, leaf: str, columns: int, group_size: int) -> Tensor:
    """The group of every input, int64 ``(columns,)``; in order if there is no such tensor.

    Raises CheckpointError if the tensor does not fill every group.
    """
    in_order, name = consecutive_groups(columns, group_size), f"{module}.{leaf}"
    if name not in shards:
        return in_order
    given = shards.read(name, (columns,)).long()
    if not torch.equal(given.sort().values, in_order):
        raise CheckpointError(
            f"{shards.folder}: {name} does not put {group_size} features into each of "
            f"{int(in_order[-1]) + 1} groups"
        )
    return given
