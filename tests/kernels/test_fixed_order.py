"""The kernels of ``deterministic``: a row alone is what it is in any company, bit for bit.

They are interpreted here, and run as compiled in tests/ptx_emulator.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble.engine.parallel import TensorParallel, cut_outputs
from nybble.kernels import DenseWeight, reference
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.bench.gpu_lora import adapters
from nybble.kernels.bench.gpu_section import in_8_bits, paged
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import Weight

pytest.importorskip("triton", reason="Triton is for Linux")

from nybble.kernels.triton import attention_fixed, fixed_order, lora

from .test_triton_matmul import random_weight

CPU = torch.device("cpu")
# As many that 64 rows leave some without work, and 130 do not: parts side by side, and in turn.
PROCESSORS = 6


CAPABILITY = 90


@pytest.fixture(autouse=True)
def _small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fixed_order, attention_fixed):
        monkeypatch.setattr(
            module, "device_traits", lambda device: ("a small GPU", PROCESSORS, CAPABILITY)
        )
    torch.manual_seed(0)


def launches(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[tuple[int, ...]]:
    """The grids a kernel is launched with from now on."""
    kernel, grids = getattr(module, name), []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, name, Recorded())
    return grids


def close(found: Tensor, expected: Tensor, limit: float) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < limit


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        ("codebook", 16),
        pytest.param("symmetric", 128, marks=pytest.mark.slow),
        pytest.param("codebook", 64, marks=pytest.mark.slow),
        pytest.param("fractional", 32, marks=pytest.mark.slow),
    ],
)
def test_a_row_of_a_packed_product_is_the_same_in_any_batch(
    kind: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(kind, 130, 1024, group, bias=True)
    x = torch.randn(130, 1024).half()
    grids = launches(monkeypatch, fixed_order, "fixed_order_kernel")
    tiled = weight.to_layout("gpu_tiles")
    whole = fixed_order.fixed_order_matmul(x, tiled)
    close(whole, reference.packed_matmul(x.double(), weight), 2e-3)
    for rows in (slice(0, 1), slice(129, 130), slice(60, 90)):
        assert torch.equal(fixed_order.fixed_order_matmul(x[rows], tiled), whole[rows])
    assert {parts for _, parts in grids} == {1, 2}


def test_a_row_of_a_gated_product_is_the_same_in_any_batch_and_without_the_activation() -> None:
    weight = random_weight("symmetric", 256, 512, 128).to_layout("rows")
    gated = weight.to_layout("gpu_gated_tiles")
    x = torch.randn(70, 512).half()
    whole = fixed_order.fixed_order_matmul(x, gated, "silu")
    assert torch.equal(fixed_order.fixed_order_matmul(x[69:], gated, "silu"), whole[69:])
    both = fixed_order.fixed_order_matmul(x, gated)
    close(whole, reference.gated(both, "silu"), 1e-3)


@pytest.mark.parametrize(("out", "columns"), [(130, 1024), (33, 71)])
def test_a_row_of_a_16_bit_product_is_the_same_in_any_batch(
    out: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = DenseWeight(torch.randn(out, columns).half(), torch.randn(out).half())
    x = torch.randn(2, 65, columns).half()
    grids = launches(monkeypatch, fixed_order, "fixed_order_kernel")
    whole = fixed_order.fixed_order_matmul(x, weight)
    close(whole, x.double() @ weight.weight.double().T + weight.bias.double(), 1e-3)  # type: ignore[union-attr]
    rows, flat = x.flatten(0, 1), whole.flatten(0, 1)
    for part in (slice(0, 1), slice(129, 130), slice(60, 90)):
        assert torch.equal(fixed_order.fixed_order_matmul(rows[part], weight), flat[part])
    assert {parts for _, parts in grids} == ({1, 2} if columns == 1024 else {1})


@pytest.mark.parametrize(
    "kind", ["16 bits", "gated", "zeros", pytest.param("symmetric", marks=pytest.mark.slow)]
)
def test_a_rank_computes_its_outputs_as_one_that_has_them_all(kind: str) -> None:
    """The order of sums is that of the whole weight: a part alone would have another."""
    parallel = TensorParallel(1, 2)
    out, columns, group = (768, 1008, 24) if kind == "zeros" else (768, 1024, 128)
    weight: Weight
    if kind == "16 bits":
        weight = DenseWeight(torch.randn(out, columns).half(), torch.randn(out).half())
    else:
        weight = random_weight("zeros" if kind == "zeros" else "symmetric", out, columns, group)
        weight = weight.to_layout("gpu_gated_tiles" if kind == "gated" else "gpu_tiles")
    orders = [
        fixed_order.order_of(each, columns, group, PROCESSORS, dense=kind in ("16 bits", "zeros"))
        for each in (out, out // 2)
    ]
    assert orders[0].parts != orders[1].parts
    halves = (0, out // 2) if kind == "gated" else (0,)
    start, stop = parallel.share(out // len(halves))
    own = cut_outputs(weight, [(first + start, first + stop) for first in halves])
    x = torch.randn(3, columns).half()
    whole = fixed_order.fixed_order_matmul(x, weight)
    expected = torch.cat([whole[:, first + start : first + stop] for first in halves], 1)
    assert torch.equal(fixed_order.fixed_order_matmul(x, own), expected)


def test_a_weight_without_a_kernel_is_computed_in_16_bits() -> None:
    weight = random_weight("zeros", 40, 120, 24, bias=True)
    x = torch.randn(3, 120).half()
    close(
        fixed_order.fixed_order_matmul(x, weight), reference.packed_matmul(x.double(), weight), 1e-3
    )


def test_columns_are_cut_at_places_which_every_part_reaches() -> None:
    for out, columns in ((64, 64), (4096, 4096), (4096, 14336), (896, 4864), (4096, 4160)):
        for dense in (False, True):
            order = fixed_order.order_of(out, columns, 128, 132, dense=dense)
            steps = -(-columns // order.width)
            assert (order.parts - 1) * order.steps_each < steps <= order.parts * order.steps_each


def test_spans_cover_all_keys_in_order() -> None:
    def begin(span: int) -> int:
        return ((512 * (8 + span % 8)) << (span // 8)) - 4096

    assert [begin(span) for span in (0, 1, 8, 9, 16)] == [0, 512, 4096, 5120, 12288]
    for keys in (1, 511, 512, 513, 4096, 4097, 12288, 131072, 1 << 20):
        spans = attention_fixed.spans_in(keys)
        assert begin(spans - 1) < keys <= begin(spans)


def cut(batch: AttentionBatch, seq: int, first: int, stop: int) -> AttentionBatch:
    """The new tokens ``first`` … ``stop − 1`` of one sequence, alone."""
    begin, end = batch.query_start[seq : seq + 2].tolist()
    context = batch.context_lens[seq : seq + 1] - (end - begin - stop)
    return AttentionBatch(
        query_start=torch.tensor([0, stop - first], dtype=torch.int32),
        context_lens=context,
        block_tables=batch.block_tables[seq : seq + 1],
        slot_mapping=batch.slot_mapping[: stop - first],
        max_query=stop - first,
    )


@pytest.mark.parametrize(
    ("heads", "dim", "window", "options", "cache"),
    [
        pytest.param(4, 64, 0, {}, None, marks=pytest.mark.slow),
        (2, 64, 100, {"softcap": 2.0, "sinks": True}, torch.int8),
        pytest.param(
            7, 64, 100, {"softcap": 2.0, "sinks": True}, torch.int8, marks=pytest.mark.slow
        ),
        pytest.param(1, 80, 0, {"softcap": 2.0}, None, marks=pytest.mark.slow),
        pytest.param(2, 256, 530, {"sinks": True}, None, marks=pytest.mark.slow),
    ],
)
def test_a_tokens_attention_is_the_same_alone_and_in_any_chunk(
    heads: int,
    dim: int,
    window: int,
    options: dict[str, object],
    cache: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [(1, 1), (540, 1), (530, 40), (20, 20)]
    batch, keys, values = paged(lengths, 1, dim, torch.float16, CPU)
    scales: list[Tensor] = []
    if cache is not None:
        keys, values, *scales = in_8_bits(keys, cache)
    q = torch.randn(sum(new for _, new in lengths), heads, dim).half()
    capped = {"softcap": options.get("softcap", 0.0)}
    sinks = {"sinks": 2 * torch.randn(heads)} if "sinks" in options else {}
    grids = launches(monkeypatch, attention_fixed, "spans_kernel")

    def attended(q: Tensor, batch: AttentionBatch) -> Tensor:
        settings = (dim**-0.5, window, *scales)
        return attention_fixed.paged_attention(q, keys, values, batch, *settings, **capped, **sinks)  # type: ignore[arg-type]

    whole = attended(q, batch)
    wide = (keys, values) if scales else (keys.double(), values.double())
    expected = reference.paged_attention(
        q.double(),
        *wide,
        batch,
        dim**-0.5,
        window,
        *scales,
        **capped,
        **sinks,  # type: ignore[arg-type]
    )
    close(whole, expected, 2e-3)
    for seq, first, stop in ((1, 0, 1), (2, 39, 40), (2, 5, 31), (3, 3, 20)):
        rows = slice(int(batch.query_start[seq]) + first, int(batch.query_start[seq]) + stop)
        assert torch.equal(attended(q[rows], cut(batch, seq, first, stop)), whole[rows])
    monkeypatch.setattr(attention_fixed, "WORKSPACE", 0)  # spans in turn
    assert torch.equal(attended(q, batch), whole)
    assert {grid[2] for grid in grids} == {1, 2}


def test_rows_that_pad_a_step_are_of_no_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in memory behind those of the sequences: no row of its own is written."""
    batch, keys, values = paged([(9, 2), (540, 1)], 1, 64, torch.float16, CPU)
    q = torch.randn(5, 2, 64).half()
    expected = reference.paged_attention(q[:3].double(), keys.double(), values.double(), batch, 0.1)
    padded = replace(
        batch,
        query_start=torch.tensor([0, 2, 3, 4], dtype=torch.int32)[:3],
        context_lens=torch.tensor([9, 540, 20], dtype=torch.int32)[:2],
        max_query=5,
        rows=None,
    )
    merges = launches(monkeypatch, attention_fixed, "merge_kernel")
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: torch.full(shape, 7.0, **kind))
    found = attention_fixed.paged_attention(q, keys, values, padded, 0.1)
    assert merges == [(5, 2)]
    close(found[:3], expected, 2e-3)
    assert (found[3:] == 7.0).all()


def test_a_rows_lora_is_the_same_alone_and_among_many() -> None:
    rows, rank, inputs, offsets = 258, 16, 500, (0, 40, 64)
    given = adapters(3, rank, inputs, offsets, torch.float16, CPU)
    x, before = torch.randn(rows, inputs).half(), torch.randn(rows, 64).half()
    slots = [row % 4 - 1 for row in range(rows)]
    whole = before.clone()
    batch = LoRABatch.of(slots, CPU)
    assert batch is not None
    lora.lora_add(whole, x, given, batch)
    for row in (1, 257):
        alone = before[row : row + 1].clone()
        own = LoRABatch.of(slots[row : row + 1], CPU)
        assert own is not None
        lora.lora_add(alone, x[row : row + 1], given, own)
        assert torch.equal(alone, whole[row : row + 1])
