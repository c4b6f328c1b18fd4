"""The CPU kernels touch no byte outside their tensors, whatever the sizes.

Every tensor lies against a page that may not be touched, once at its end and once at its beginning,
so that it is aligned to nothing but its elements; a kernel that strays ends the process. `make
sanitize` runs these tests on kernels that the compiler has instrumented.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
import torch
from torch import Tensor

from nybble.kernels import PackedWeight, reference
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.library import CpuLibrary
from nybble.kernels.lora import LoRASlots, LowRank, Matrices, in_8_bits
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles
from nybble.kernels.reference import TokenChoice

_libc = ctypes.CDLL(None, use_errno=True)


class Guard:
    """Puts tensors into pages of their own between two that may not be touched."""

    def __init__(self, edge: str) -> None:
        self.edge = edge

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        count, page = prod(shape), mmap.PAGESIZE
        if count == 0:
            return torch.zeros(shape, dtype=dtype)
        inside = -(-count * dtype.itemsize // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for forbidden in (first, first + page + inside):
            failed = _libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0)
            assert not failed, os.strerror(ctypes.get_errno())
        at = page if self.edge == "beginning" else page + inside - count * dtype.itemsize
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=at).view(shape)

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


@pytest.fixture(params=["beginning", "end"])
def guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Guard:
    """What guards the inputs; what the kernels' wrappers allocate for outputs is guarded too."""
    guard = Guard(request.param)
    monkeypatch.setattr(torch, "empty", guard.empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: guard.empty(*x.shape, dtype=x.dtype))
    return guard


def test_a_guarded_tensor_has_no_neighbour(guard: Guard) -> None:
    tensor = guard(torch.arange(5, dtype=torch.int16))
    assert tensor.tolist() == [0, 1, 2, 3, 4]
    beyond = tensor.data_ptr() + (-1 if guard.edge == "beginning" else tensor.nbytes)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(beyond, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV


def packed(
    guard: Guard, out: int, columns: int, group: int, scales: torch.dtype, *, zeros: bool
) -> PackedWeight:
    """In tiles, with a bias; the last group and the last tile may be short."""
    groups = -(-columns // group)
    weight = PackedWeight(
        qweight=pack_nibbles(torch.randint(0, 16, (out, columns), dtype=torch.uint8)),
        scales=torch.rand(out, groups).to(scales),
        zeros=torch.randint(0, 16, (out, groups)).to(scales) if zeros else None,
        levels=INTEGER_LEVELS if zeros else SYMMETRIC_LEVELS,
        out_features=out,
        in_features=columns,
        group_size=group,
    ).to_layout("cpu_tiles")
    return PackedWeight(
        qweight=guard(weight.qweight),
        scales=guard(weight.scales),
        zeros=None if weight.zeros is None else guard(weight.zeros),
        levels=guard(weight.levels),
        bias=guard(torch.randn(out)),
        perm=guard(torch.randperm(columns).int()) if columns % 16 else None,
        out_features=out,
        in_features=columns,
        group_size=group,
        layout="cpu_tiles",
    )


@pytest.mark.parametrize(
    ("scales", "zeros"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, True)]
)
@pytest.mark.parametrize("out", [1, 63, 144])
@pytest.mark.parametrize(
    ("columns", "group"),
    [
        *((1, 1), (7, 7), (129, 64), (160, 160)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, 8), (40, 16), (72, 24))),
    ],
)
def test_packed_weights(
    cpu: CpuLibrary,
    guard: Guard,
    columns: int,
    group: int,
    out: int,
    scales: torch.dtype,
    zeros: bool,
) -> None:
    torch.manual_seed(0)
    weight = packed(guard, out, columns, group, scales, zeros=zeros)
    for rows in (0, 1, 2, 3, 4, 5, 9, 13):
        x = guard(torch.randn(rows, columns).bfloat16())
        found = cpu.packed_matmul(x, weight)
        expected = reference.packed_matmul(x, weight)
        # Of what is added, which may cancel.
        size = x.abs().sum(1, keepdim=True).float() * 32
        assert ((found - expected).abs() <= expected.abs() * 2**-7 + size * 2**-16).all()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(cpu.dequantize(weight, dtype), weight.dequantize(dtype))


@pytest.mark.parametrize("out", [1, 63, 144])
@pytest.mark.parametrize(("columns", "group"), [(1, 1), (7, 7), (40, 16), (129, 64)])
@pytest.mark.parametrize("rows", [0, 1, 5, 13])
def test_experts(
    cpu: CpuLibrary, guard: Guard, rows: int, columns: int, group: int, out: int
) -> None:
    torch.manual_seed(0)
    experts = [packed(guard, out, columns, group, torch.float16, zeros=True) for _ in range(4)]
    ids = guard(torch.arange(2 * rows).view(rows, 2) % 3)  # expert 3 has no rows
    kernel = cpu.grouped_linear(experts, torch.bfloat16)
    linears = [cpu.linear(expert, torch.bfloat16) for expert in experts]
    for x in (torch.randn(rows, columns), torch.randn(rows, 2, columns)):
        for weights in (None, guard(torch.rand(rows, 2))):
            given = guard(x.bfloat16())
            found = kernel(given, ids, weights)
            if rows:
                expected = reference.grouped_matmul(given, ids, weights, experts=linears)
                assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("width", [16, 48, 160])
def test_norms_and_gates(cpu: CpuLibrary, guard: Guard, width: int, rows: int) -> None:
    torch.manual_seed(0)
    x, residual = (guard(torch.randn(rows, width).bfloat16()) for _ in range(2))
    weight = guard(torch.rand(width).bfloat16())
    found, total = cpu.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(found, reference.rms_norm(total, weight, 1e-6), rtol=2**-7, atol=0)
    for offset in (None, 0.0, 1.0):
        found = cpu.rms_norm(x, weight, 1e-6, offset)
        expected = reference.rms_norm(x, weight, 1e-6, offset)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    gate_up = guard(torch.randn(rows, 2 * width).bfloat16())
    expected = reference.gated(gate_up, "silu")
    torch.testing.assert_close(cpu.gated(gate_up, "silu"), expected, rtol=2**-6, atol=1e-30)


@pytest.mark.parametrize("window", [0, 1, 21])
@pytest.mark.parametrize(
    ("dim", "rotary_dim", "interleaved"), [(32, 32, False), (80, 36, False), (96, 96, True)]
)
@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize(
    "contexts", [[1], pytest.param([16, 17], marks=pytest.mark.slow), [33, 15, 0]]
)
def test_rotary_and_attention(
    cpu: CpuLibrary,
    guard: Guard,
    contexts: list[int],
    block_size: int,
    dim: int,
    rotary_dim: int,
    interleaved: bool,
    window: int,
) -> None:
    """Three query heads share each of two KV heads; a sequence has two new tokens, if it can.

    The last block in the cache is the last one of the last sequence.
    """
    torch.manual_seed(0)
    new = [min(context, 2) or 1 for context in contexts]
    blocks = [-(-context // block_size) for context in contexts]
    tables = torch.zeros(len(contexts), max(blocks), dtype=torch.int32)
    slots = []
    for row, context in enumerate(contexts):
        tables[row, : blocks[row]] = torch.arange(sum(blocks[:row]), sum(blocks[: row + 1]))
        for position in range(context - new[row], context):
            block = int(tables[row, position // block_size]) if context else 0
            slots.append(block * block_size + position % block_size if context else -1)
    batch = AttentionBatch(
        query_start=guard(torch.tensor([0, *new]).cumsum(0).int()),
        context_lens=guard(torch.tensor(contexts, dtype=torch.int32)),
        block_tables=guard(tables),
        slot_mapping=guard(torch.tensor(slots)),
        max_query=max(new),
    )
    qkv = torch.randn(sum(new), 10, dim).bfloat16()
    cos, sin = (guard(torch.randn(sum(new), rotary_dim)) for _ in range(2))
    cache = torch.randn(2, sum(blocks), 2, block_size, dim).bfloat16()
    results = []
    for kernels in (cpu, reference):
        q, k, v = guard(qkv).split((6, 2, 2), dim=1)  # type: ignore[no-untyped-call]
        caches = guard(cache[0]), guard(cache[1])
        kernels.rotary_store(
            q, k, v, cos, sin, *caches, batch.slot_mapping, interleaved=interleaved
        )
        results.append((q, *caches))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-6)
    options = {"softcap": 30.0, "sinks": guard(torch.randn(6))} if interleaved else {}
    found = cpu.paged_attention(*results[1], batch, dim**-0.5, window, **options)
    q, *caches_ = results[1]
    expected = reference.paged_attention(q.double(), *caches_, batch, dim**-0.5, window, **options)
    rows = [row for row, slot in enumerate(slots) if slot >= 0]
    torch.testing.assert_close(found.double()[rows], expected[rows], rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("dim", [32, 80])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_attention_in_8_bits(cpu: CpuLibrary, guard: Guard, block_size: int, dim: int) -> None:
    torch.manual_seed(0)
    blocks = [-(-context // block_size) for context in (33, 15)]
    tables = torch.zeros(2, max(blocks), dtype=torch.int32)
    tables[0, : blocks[0]] = torch.arange(blocks[0])
    tables[1, : blocks[1]] = torch.arange(blocks[0], sum(blocks))
    last = [int(tables[0, 32 // block_size]), int(tables[1, 14 // block_size])]
    slots = [last[0] * block_size + 32 % block_size, last[1] * block_size + 14 % block_size]
    batch = AttentionBatch(
        query_start=guard(torch.tensor([0, 1, 2], dtype=torch.int32)),
        context_lens=guard(torch.tensor([33, 15], dtype=torch.int32)),
        block_tables=guard(tables),
        slot_mapping=guard(torch.tensor(slots)),
        max_query=1,
    )
    q, k, v = guard(torch.randn(2, 10, dim).bfloat16()).split((6, 2, 2), dim=1)  # type: ignore[no-untyped-call]
    shape = (sum(blocks), 2, block_size, dim)
    caches = [guard(torch.randint(-127, 128, shape, dtype=torch.int8)) for _ in range(2)]
    scales = [guard(torch.rand(shape[:3]) / 64) for _ in range(2)]
    cos, sin = (guard(torch.randn(2, dim)) for _ in range(2))
    cpu.rotary_store(q, k, v, cos, sin, *caches, batch.slot_mapping, *scales)
    found = cpu.paged_attention(q, *caches, batch, dim**-0.5, 0, *scales)
    expected = reference.paged_attention(q.double(), *caches, batch, dim**-0.5, 0, *scales)
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("vocab", [1, 17, 64, 150])
def test_sampling(cpu: CpuLibrary, guard: Guard, vocab: int) -> None:
    torch.manual_seed(0)
    for rows in (1, 3):
        logits = guard(torch.randn(rows, vocab))
        for top_k, top_p, min_p in ((0, 1.0, 0.0), (3, 0.9, 0.0), (0, 0.9, 0.1), (vocab, 0.5, 0.1)):
            choices = [TokenChoice(0.8, top_k, top_p, min_p, row / 3) for row in range(rows)]
            found = cpu.sample_tokens(logits, choices)
            assert torch.equal(found, reference.sample_tokens(logits, choices))


@pytest.mark.parametrize(
    "inputs", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (31, 32)), 100]
)
@pytest.mark.parametrize("offsets", [(0, 1), (0, 16, 33), (0, 130, 131, 200), (0, 520)])
@pytest.mark.parametrize("max_rank", [1, 9, 16])
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_low_rank_additions(
    cpu: CpuLibrary, guard: Guard, max_rank: int, offsets: tuple[int, ...], inputs: int, int8: bool
) -> None:
    torch.manual_seed(0)

    def part(rank: int, out: int) -> LowRank:
        a, b = torch.randn(rank, inputs) * inputs**-0.5, torch.randn(rank, out)
        if not rank:
            return None
        if not int8:
            return Matrices(guard(a.bfloat16()), guard(b.bfloat16()))
        (a, of_a), (b, of_b) = in_8_bits(a), in_8_bits(b)
        return Matrices(guard(a), guard(b), guard(torch.stack((of_a, of_b))))

    widths = [end - start for start, end in pairwise(offsets)]
    each = [[part(r, w) for w in widths] for r in (max_rank, 0, 1)]
    lora = LoRASlots.of(each, inputs, offsets, torch.bfloat16)
    lora = replace(lora, table=guard(lora.table))
    for slots in ([0], [2, -1, 0, 1], [0] * 6 + [2] * 3):
        given = LoRABatch.of(slots, "cpu")
        assert given is not None
        batch = LoRABatch(
            slots=guard(given.slots),
            order=guard(given.order),
            segment_starts=guard(given.segment_starts),
            segment_slots=guard(given.segment_slots),
            max_segment=given.max_segment,
        )
        x = guard(torch.randn(len(slots), inputs).bfloat16())
        found, expected = (guard(torch.ones(len(slots), offsets[-1]).bfloat16()) for _ in range(2))
        cpu.lora_add(found, x, lora, batch)
        reference.lora_add(expected, x, lora, batch)
        assert all(widths)
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-4 * max_rank)
