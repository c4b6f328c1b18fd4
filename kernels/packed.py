"""The packed-weight format: one value for every 4-bit linear layer, whatever file it came from.

A code ``q`` (0–15) of output row ``n`` and stored column ``k`` becomes a weight by

    w[n, k] = scale[n, k // group_size] · (levels[q] − zero[n, k // group_size])

which covers every format we read without loss:

==================  ======================  =========================
format              ``levels``              ``zeros``
==================  ======================  =========================
GPTQ asym, AWQ      0, 1, …, 15             per group, real numbers
GPTQ sym            −8, −7, …, 7            absent
NF4, FP4            the 16-entry codebook   absent; scale is absmax
MXFP4, NVFP4        4-bit floats (e2m1)     absent
==================  ======================  =========================

Stored column ``k`` multiplies input feature ``perm[k]``: act-order checkpoints (GPTQ's ``g_idx``)
are stored with their columns sorted by group, so groups are always contiguous. A feature may be
stored more than once; its weight is then the sum. So an 8-bit weight is two planes of 4-bit digits,

    s · (16 · (high − 8) + (low − 8)),    with scale 16 · s for the high digits,

side by side along the columns (:func:`pack_int8`). It needs no kernel of its own.

The same weight can be laid out for different back ends (:mod:`nybble.kernels.layout`); the layout
moves codes, scales and zeros and never changes a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nybble.kernels.layout import CodeKind, Layout, from_rows, padded_shape, tile_rows, to_rows

INTEGER_LEVELS = torch.arange(16, dtype=torch.float32)
SYMMETRIC_LEVELS = INTEGER_LEVELS - 8
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LEVELS = torch.tensor([*_E2M1, *(-level for level in _E2M1)])

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.uint8)


@dataclass(frozen=True)
class DenseWeight:
    """A linear layer kept in 16 bits: ``weight (out_features, in_features)``, optional ``bias``.

    part_of: see :class:`PackedWeight`.
    """

    weight: Tensor
    bias: Tensor | None = None
    part_of: int = 0

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True)
class PackedWeight:
    """An immutable 4-bit weight matrix of logical shape ``(out_features, in_features)``.

    In the ``rows`` layout (see :mod:`nybble.kernels.layout` for the others):

    qweight: uint8 ``(out_features, ceil(columns / 2))``; the even column is the low nibble.
    scales: float16, bfloat16 or float32 ``(out_features, groups)``; or uint8, powers of two by
        their exponents (:func:`e8m0`), which have no zeros beside them.
    zeros: ``(out_features, groups)`` in the dtype of ``scales``, or None if every zero is 0.

    In every layout:

    levels: float32 ``(16,)``, the value of each code before zero and scale.
    perm: int32 ``(columns,)``, the input feature of each stored column, or None if column k is
        feature k. Each feature occurs at least once.
    bias: ``(out_features,)`` or None.
    part_of: if above 0, this weight is some outputs of one that has so many. Kernels whose sums
        have one order (:mod:`nybble.kernels.triton.fixed_order`) take that one's, so that a part's
        outputs are those of the whole, bit for bit.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    levels: Tensor
    out_features: int
    in_features: int
    group_size: int
    perm: Tensor | None = None
    bias: Tensor | None = None
    layout: Layout = "rows"
    part_of: int = 0

    def __post_init__(self) -> None:
        def check(name: str, found: object, expected: object) -> None:
            if found != expected:
                raise ValueError(f"packed weight: {name} is {found}, expected {expected}")

        if min(self.out_features, self.in_features, self.group_size) < 1:
            raise ValueError(
                f"packed weight: out_features {self.out_features}, in_features {self.in_features} "
                f"and group_size {self.group_size} must be positive"
            )
        codes, groups = padded_shape(self.layout, self.out_features, self.columns, self.groups)
        check("qweight dtype", self.qweight.dtype, torch.uint8)
        check("qweight shape", tuple(self.qweight.shape), codes)
        if self.scales.dtype not in _SCALE_DTYPES:
            raise ValueError(
                f"packed weight: scales dtype {self.scales.dtype} is neither floating nor uint8"
            )
        check("scales shape", tuple(self.scales.shape), groups)
        check("levels shape", tuple(self.levels.shape), (16,))
        check("levels dtype", self.levels.dtype, torch.float32)
        if self.zeros is not None:
            check("zeros shape", tuple(self.zeros.shape), groups)
            check("zeros dtype", self.zeros.dtype, self.scales.dtype)
            if self.scales.dtype == torch.uint8:
                raise ValueError("packed weight: scales which are exponents have no zeros")
        if self.perm is not None:
            check("perm dtype", self.perm.dtype, torch.int32)
        if self.perm is not None and (self.perm.ndim != 1 or self.perm.shape[0] < self.in_features):
            raise ValueError(
                f"packed weight: perm shape is {tuple(self.perm.shape)}, "
                f"expected ({self.in_features},) or more"
            )
        if self.bias is not None:
            check("bias shape", tuple(self.bias.shape), (self.out_features,))

    @cached_property
    def columns(self) -> int:
        """Stored columns of a row: ``in_features``, unless some features are stored repeatedly."""
        return self.in_features if self.perm is None else self.perm.shape[0]

    @cached_property
    def groups(self) -> int:
        """Groups in a row; the last one is short if group_size does not divide ``columns``."""
        return -(-self.columns // self.group_size)

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether every tensor is contiguous, as the kernels require."""
        tensors = (self.qweight, self.scales, self.zeros, self.levels, self.perm)
        return all(t.is_contiguous() for t in tensors if t is not None)

    @cached_property
    def wide_bias(self) -> Tensor | None:
        """``bias`` as the CPU kernels add it: float32, contiguous."""
        return None if self.bias is None else self.bias.float().contiguous()

    @cached_property
    def level_values(self) -> tuple[float, ...]:
        """``levels`` on the host. The first call waits for the device: make it while loading."""
        return tuple(self.levels.tolist())

    @cached_property
    def is_affine(self) -> bool:
        """Whether the codes are plain integers: 0…15 with zeros, or −8…7 without."""
        first = -8 if self.zeros is None else 0
        return self.level_values == tuple(range(first, first + 16))

    @cached_property
    def code_kind(self) -> CodeKind:
        """What the codes are; the first call waits for the device."""
        if self.is_affine:
            return "integer"
        return "e2m1" if self.level_values == tuple(E2M1_LEVELS.tolist()) else "codebook"

    @cached_property
    def has_two_digits(self) -> bool:
        """Whether this is an 8-bit weight as two planes of digits, side by side along the columns.

        Then stored column ``k`` of the second half has the low digit of that of the first half, of
        the same feature, and its scale is a sixteenth. The first call waits for the device.
        """
        half, odd = divmod(self.columns, 2)
        if odd or self.perm is None or half % self.group_size or not self.is_affine:
            return False
        high, low = self.scales.chunk(2, dim=1)  # groups are the second dimension in every layout
        same_features = torch.equal(self.perm[:half], self.perm[half:])
        return same_features and torch.equal(high, low * 16)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the weight."""
        tensors = (self.qweight, self.scales, self.zeros, self.levels, self.perm, self.bias)
        return sum(t.nbytes for t in tensors if t is not None)

    def to_layout(self, layout: Layout) -> PackedWeight:
        """The same weight laid out for another back end; every value is kept exactly."""
        if layout == self.layout:
            return self
        out, columns, groups = self.out_features, self.columns, self.groups
        qweight, scales, zeros = to_rows(
            self.layout, self.qweight, self.scales, self.zeros, out, columns, groups, self.code_kind
        )
        qweight, scales, zeros = from_rows(layout, qweight, scales, zeros, self.code_kind)
        return replace(self, qweight=qweight, scales=scales, zeros=zeros, layout=layout)

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight with its tensors on ``device``."""
        if self.qweight.device == device:
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            qweight=self.qweight.to(device),
            scales=self.scales.to(device),
            zeros=move(self.zeros),
            levels=self.levels.to(device),
            perm=move(self.perm),
            bias=move(self.bias),
        )

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Outputs ``start``…``stop``−1 as a weight of their own, without copying codes.

        In a tiled layout ``start`` must be at the beginning of a tile. A ``gpu_gated_tiles`` weight
        is converted to ``rows`` first, because its halves are interleaved.
        """
        if self.layout == "gpu_gated_tiles":
            return self.to_layout("rows").rows(start, stop)
        stop = min(stop, self.out_features)
        tile = tile_rows(self.layout)
        if start % tile:
            raise ValueError(f"rows from {start}: {self.layout} is cut at multiples of {tile}")
        tiles = slice(start // tile, -(-stop // tile))
        return replace(
            self,
            qweight=self.qweight[tiles],
            scales=self.scales[tiles],
            zeros=None if self.zeros is None else self.zeros[tiles],
            bias=None if self.bias is None else self.bias[start:stop],
            out_features=stop - start,
        )

    def outputs(self, ranges: Sequence[tuple[int, int]]) -> PackedWeight:
        """The outputs ``start``…``stop``−1 of each range, one after another, in the same layout.

        One range of whole tiles is not copied.
        """
        tile, end = tile_rows(self.layout), self.out_features
        whole = all(start % tile == 0 for start, _ in ranges)
        whole &= all(stop % tile == 0 for _, stop in ranges[:-1])
        whole &= ranges[-1][1] % tile == 0 or ranges[-1][1] == end
        if self.layout == "gpu_gated_tiles" or not whole:
            return self.to_layout("rows").outputs(ranges).to_layout(self.layout)
        parts = [self.rows(start, stop) for start, stop in ranges]
        stacked = parts[0] if len(parts) == 1 else stack_outputs(parts)
        assert stacked is not None  # they are of one weight
        return stacked

    def codes(self) -> Tensor:
        """The 4-bit codes, uint8 ``(out_features, columns)``, in stored column order."""
        return unpack_nibbles(self.to_layout("rows").qweight, self.columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``(out_features, in_features)`` in input order: the format's definition.

        The product is taken in float32 and rounded once to ``dtype``. With float16 scales the
        float32 product is exact, so float16 output equals that of GPTQ and AWQ. The sum of an
        8-bit weight's two digits is exact too.
        """
        rows = self.to_layout("rows")
        # Both weights of a byte are looked up at once: several times faster than nibble by nibble.
        pairs = torch.stack((self.levels.repeat(16), self.levels.repeat_interleave(16)), dim=1)
        weight = torch.nn.functional.embedding(rows.qweight.int(), pairs).flatten(1)
        # Pad to whole groups, so that scales and zeros broadcast; the last group may be short.
        short = self.groups * self.group_size - weight.shape[1]
        if short > 0:
            weight = torch.nn.functional.pad(weight, (0, short))
        shape = (self.out_features, self.groups, self.group_size)
        grouped = weight[:, : self.groups * self.group_size].view(shape)
        if rows.zeros is not None:
            grouped -= rows.zeros.float()[..., None]
        grouped *= scale_values(rows.scales)[..., None]
        weight = weight[:, : self.columns]
        if self.perm is not None:
            by_feature = weight.new_zeros(self.out_features, self.in_features)
            weight = by_feature.index_add_(1, self.perm, weight)
        return weight.to(dtype)


Weight = PackedWeight | DenseWeight
# Computes ``x @ W.T + bias`` of one weight for ``x (..., in_features)``, in the dtype of ``x``.
LinearKernel = Callable[[Tensor], Tensor]
# See :func:`nybble.kernels.reference.grouped_matmul`: x, expert_ids, weights.
GroupedKernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def e8m0(exponents: Tensor) -> Tensor:
    """``2 ** (exponent − 127)`` in float32 for uint8 exponents; NaN for 255 (OCP Microscaling)."""
    bits = exponents.int() << 23
    bits = bits.masked_fill(exponents == 0, 1 << 22)  # 2 ** −127 is a subnormal number
    bits = bits.masked_fill(exponents == 255, 0x7FC00000)
    return bits.view(torch.float32)


def scale_values(scales: Tensor) -> Tensor:
    """Scales of a packed weight in float32, whichever way it has them."""
    return e8m0(scales) if scales.dtype == torch.uint8 else scales.float()


_ROWS_AT_A_TIME = 4096
# The digits reach from 16 · −8 − 8 to 16 · 7 + 7; codes are chosen symmetric.
INT8_MAX = 119


def pack_int8(codes: Tensor, scales: Tensor, group_size: int) -> PackedWeight:
    """An 8-bit weight ``scale · code`` as two planes of 4-bit digits.

    codes: int16 ``(out, in)`` within ±INT8_MAX.
    scales: floating ``(out, in / group_size)``; 16 · scale must be finite in their dtype.
    """
    out, columns = codes.shape
    if columns % group_size:
        raise ValueError(f"{columns} columns are not a multiple of group_size {group_size}")
    shifted = codes + 136
    planes = torch.cat((shifted >> 4, shifted & 0xF), dim=1).to(torch.uint8)
    return PackedWeight(
        qweight=pack_nibbles(planes),
        scales=torch.cat((scales * 16, scales), dim=1),
        zeros=None,
        levels=SYMMETRIC_LEVELS,
        out_features=out,
        in_features=columns,
        group_size=group_size,
        perm=torch.arange(columns, dtype=torch.int32).repeat(2),
    )


def round_to_int8(weight: Tensor, group_size: int) -> PackedWeight:
    """The nearest 8-bit weight to ``(out, in)``, with a scale for each group of inputs.

    Raises ValueError if ``in`` is not a multiple of the group.
    """
    out, columns = weight.shape
    if columns % group_size:
        raise ValueError(f"{columns} columns are not a multiple of group_size {group_size}")
    codes = torch.empty(out, columns, dtype=torch.int16)
    # bfloat16 keeps the range of float32: rows of rare tokens can be very small.
    scales = torch.empty(out, columns // group_size, dtype=torch.bfloat16)
    smallest = torch.finfo(torch.bfloat16).tiny
    for start in range(0, out, _ROWS_AT_A_TIME):  # in parts, to keep float32 copies small
        part = slice(start, start + _ROWS_AT_A_TIME)
        groups = weight[part].float().view(-1, columns // group_size, group_size)
        scales[part] = (groups.abs().amax(-1) / INT8_MAX).clamp(min=smallest)
        nearest = (groups / scales[part].float()[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
        codes[part] = nearest.flatten(1).short()
    return pack_int8(codes, scales, group_size)


def stack_outputs(weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """One weight computing the concatenated outputs of several that share an input.

    All must be in one layout, and all but the last whole tiles of it. Returns None if they cannot
    be stacked: levels, group_size, perm, scale dtype, or the presence of zeros or of a bias differ.
    """
    first = weights[0]

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

    for other in weights[1:]:
        if not (
            other.in_features == first.in_features
            and other.group_size == first.group_size
            and other.scales.dtype == first.scales.dtype
            and (other.zeros is None) == (first.zeros is None)
            and (other.bias is None) == (first.bias is None)
            and same(other.levels, first.levels)
            and same(other.perm, first.perm)
        ):
            return None
    return replace(
        first,
        qweight=torch.cat([w.qweight for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        zeros=_cat([w.zeros for w in weights]),
        bias=_cat([w.bias for w in weights]),
        out_features=sum(w.out_features for w in weights),
    )


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present) if present else None


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8 codes ``(rows, columns)`` into uint8 ``(rows, ceil(columns / 2))``.

    The even column is the low nibble; an odd last column leaves its high nibble zero.
    """
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Invert :func:`pack_nibbles`: uint8 ``(rows, columns)`` with values 0–15."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return codes.flatten(1)[:, :columns]
