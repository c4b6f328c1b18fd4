"""What the CPU kernels compute between products: norms, activations, rotary, attention."""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.activation import ACTIVATIONS, Activation
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.build import machine
from nybble.kernels.cpu.library import CpuLibrary
from nybble.kernels.lora import LoRASlots, Matrices
from nybble.kernels.lora_batch import LoRABatch

from .cpu_kernels import random_weight, transposed

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128])
def test_attention_of_a_token_does_not_depend_on_its_chunk_or_its_company(
    cpu: CpuLibrary, dim: int
) -> None:
    torch.manual_seed(0)
    tokens, block_size, kv_heads = 70, 16, 2
    blocks = -(-tokens // block_size)
    q = torch.randn(tokens, 3 * kv_heads, dim).bfloat16()
    k_cache, v_cache = torch.randn(2, 2 * blocks, kv_heads, block_size, dim).bfloat16()
    own, other = torch.randperm(2 * blocks).int().view(2, -1)

    def attend(begin: int, end: int, others: int) -> Tensor:
        """Tokens ``begin`` to ``end`` of a sequence, behind ``others`` of another one."""
        batch = AttentionBatch(
            query_start=torch.tensor([0, others, others + end - begin], dtype=torch.int32),
            context_lens=torch.tensor([tokens, end], dtype=torch.int32),
            block_tables=torch.stack((other, own)),
            slot_mapping=torch.zeros(others + end - begin, dtype=torch.int64),
            max_query=max(others, end - begin),
        )
        rows = torch.cat((q[:others], q[begin:end]))
        return cpu.paged_attention(rows, k_cache, v_cache, batch, dim**-0.5, 0)[others:]

    whole = attend(0, tokens, others=1)
    for size, others in ((1, 1), (1, 9), (23, 1), (23, 40)):
        begins = range(0, tokens, size)
        parts = [attend(begin, min(tokens, begin + size), others) for begin in begins]
        assert torch.equal(torch.cat(parts), whole)


def test_norms_and_activation(cpu: CpuLibrary) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 7, 96).bfloat16()
    weight = torch.rand(96).bfloat16()
    torch.testing.assert_close(
        cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), rtol=2**-7, atol=0
    )
    found, expected = (kernels.rms_norm(x, weight, 1e-6, 1.0) for kernels in (cpu, reference))
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    before = residual.clone()
    found, total = cpu.add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, expected_total)
    assert torch.equal(residual, before)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    extremes = torch.tensor([[-100.0, -20, -1, 0, 1, 20, 90, 300] * 8]).bfloat16()
    both = torch.cat((extremes, torch.randn(1, 64).bfloat16()), dim=1)
    found, expected = cpu.gated(both, "silu"), reference.gated(both, "silu")
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-30)


def test_a_norm_is_rounded_once_or_twice_as_it_is_asked_for(cpu: CpuLibrary) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96).bfloat16(), torch.rand(96).bfloat16()
    twice, once = (reference.rms_norm(x, weight, 1e-6, offset) for offset in (None, 0.0))
    assert (once != twice).float().mean() > 0.1
    for offset, expected in ((None, twice), (0.0, once)):
        # Sums of squares in another order seldom show in bfloat16.
        assert (cpu.rms_norm(x, weight, 1e-6, offset) != expected).float().mean() < 0.01


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_the_exact_one_rounded_once(
    cpu: CpuLibrary, activation: Activation
) -> None:
    """Of every finite bfloat16 whose square is one too, times one: no second rounding."""
    every = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    gate = every[every.abs() < 1e19]  # NaN is not below
    gate = torch.nn.functional.pad(gate, (0, -len(gate) % 32)).view(-1, 32)
    found = cpu.gated(torch.cat((gate, torch.ones_like(gate)), dim=1), activation)
    exact = reference.activate(gate.double(), activation)
    # What float32 leaves of a negative number's tail is next to nothing.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_neither_hide_nor_make_what_is_not_a_number(
    cpu: CpuLibrary, activation: Activation
) -> None:
    gate = torch.tensor([float("nan"), float("inf"), 1e30, -1e30] * 4).bfloat16()
    if activation == "relu2":
        gate[2::4] = 1e19
    found = cpu.gated(torch.cat((gate, torch.ones(16).bfloat16()))[None], activation)[0]
    expected = reference.activate(gate.double(), activation).bfloat16()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-7, equal_nan=True)


def test_an_activation_that_does_not_exist_is_refused(cpu: CpuLibrary) -> None:
    for kernels in (cpu, reference):
        with pytest.raises(ValueError, match="'swish': expected one of silu, gelu"):
            kernels.gated(torch.zeros(1, 32).bfloat16(), "swish")  # type: ignore[arg-type]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 70)), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 3]),
    share=st.sampled_from([1, 4, 7]),
    dim=st.sampled_from([16, 32, 64, 80, 112, 128, 256]),
    rotary=st.sampled_from([0.25, 0.4, 0.5, 1.0]),
    interleaved=st.booleans(),
    window=st.sampled_from([0, 1, 13, 16, 40, 200]),
    softcap=st.sampled_from([0.0, 0.0, 1.5]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_rotary_and_paged_attention(
    cpu: CpuLibrary,
    lengths: list[tuple[int, int]],
    kv_heads: int,
    share: int,
    dim: int,
    rotary: float,
    interleaved: bool,
    window: int,
    softcap: float,
    with_sinks: bool,
    seed: int,
) -> None:
    """Sequences of (new tokens, tokens already cached) over blocks in random order."""
    torch.manual_seed(seed)
    block_size = 16
    needed = [-(-(new + old) // block_size) for new, old in lengths]
    order = torch.randperm(sum(needed) + 3).int()
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    slots = []
    for row, (new, old) in enumerate(lengths):
        start = sum(needed[:row])
        tables[row, : needed[row]] = order[start : start + needed[row]]
        positions = torch.arange(old, old + new)
        slots.append(tables[row, positions // block_size].long() * block_size + positions % 16)
    batch = AttentionBatch(
        query_start=torch.tensor([0] + [new for new, _ in lengths]).cumsum(0).int(),
        context_lens=torch.tensor([new + old for new, old in lengths]).int(),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        max_query=max(new for new, _ in lengths),
    )
    tokens = int(batch.query_start[-1])
    qkv = torch.randn(tokens, (share + 2) * kv_heads, dim).bfloat16()
    angles = torch.rand(tokens, 2 * int(rotary * dim / 2)) * 6
    caches = torch.randn(2, len(order), kv_heads, block_size, dim).bfloat16()
    results = []
    for kernels in (cpu, reference):
        q, k, v = qkv.clone().split((share * kv_heads, kv_heads, kv_heads), dim=1)  # type: ignore[no-untyped-call]
        k_cache, v_cache = caches.clone()
        kernels.rotary_store(
            q,
            k,
            v,
            angles.cos(),
            angles.sin(),
            k_cache,
            v_cache,
            batch.slot_mapping,
            interleaved=interleaved,
        )
        results.append((q, k_cache, v_cache))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    q, k_cache, v_cache = results[1]
    sinks = (2 * torch.randn(share * kv_heads)).bfloat16() if with_sinks else None

    def attend(kernels: Any, q: Tensor) -> Tensor:
        inputs = q, k_cache, v_cache, batch, dim**-0.5, window
        found: Tensor = kernels.paged_attention(*inputs, softcap=softcap, sinks=sinks)
        return found

    found, expected = attend(cpu, q), attend(reference, q.double())
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)
    # Blocks that no new token sees may be gone: whatever is there now is not read.
    for row, (_, old) in enumerate(lengths):
        unseen = max(0, old - window + 1) // block_size if window else 0
        for cache in (k_cache, v_cache):
            cache[tables[row, :unseen].long()] = float("nan")
    assert torch.equal(attend(cpu, q), found)
    assert torch.equal(attend(reference, q.double()), expected)


def one_decode(context_lens: list[int], blocks_each: int = 2) -> AttentionBatch:
    """A token for each sequence; sequence ``i`` has blocks ``i · blocks_each`` and following."""
    seqs = len(context_lens)
    return AttentionBatch(
        query_start=torch.arange(seqs + 1, dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=torch.arange(seqs * blocks_each, dtype=torch.int32).view(seqs, -1),
        slot_mapping=torch.arange(seqs) * blocks_each * 16,
        max_query=1,
    )


@pytest.mark.parametrize(("share", "dim"), [(1, 128), (3, 80), (7, 64), (40, 16)])
@pytest.mark.parametrize("window", [0, 21])
def test_keys_and_values_in_8_bits(cpu: CpuLibrary, share: int, dim: int, window: int) -> None:
    """Stored to within half a step, and attended to as what is stored."""
    torch.manual_seed(0)
    tokens, slots = 70, torch.randperm(7 * 16)[:70]
    slots[3] = -1
    q, k, v = (
        torch.randn(tokens, (share + 2) * 2, dim)
        .bfloat16()
        .split(  # type: ignore[no-untyped-call]
            (share * 2, 2, 2), dim=1
        )
    )
    k[0, 1] = 0
    angles = torch.rand(tokens, dim) * 6
    stored = []
    for kernels in (cpu, reference):
        caches = [torch.zeros(7, 2, 16, dim, dtype=torch.int8) for _ in range(2)]
        scales = [torch.zeros(7, 2, 16) for _ in range(2)]
        kernels.rotary_store(q.clone(), k, v, angles.cos(), angles.sin(), *caches, slots, *scales)
        stored.append((*caches, *scales))
    (k_cache, v_cache, k_scales, v_scales), expected = stored
    assert torch.equal(v_cache, expected[1])
    assert torch.equal(v_scales, expected[3])
    rotated, exact = (c * s[..., None] for c, s in ((k_cache, k_scales), expected[::2]))
    # Half a step, and a rounding of the rotated key, which may carry it over the next one.
    assert ((rotated - exact).abs() <= expected[2][..., None] * 1.01).all()
    batch = AttentionBatch(
        query_start=torch.tensor([0, 40, 70], dtype=torch.int32),
        context_lens=torch.tensor([60, 30], dtype=torch.int32),
        block_tables=torch.tensor([[6, 2, 0, 5], [1, 3, 4, 4]], dtype=torch.int32),
        slot_mapping=slots,
        max_query=40,
    )
    inputs = k_cache, v_cache, batch, dim**-0.5, window, k_scales, v_scales
    found = cpu.paged_attention(q, *inputs)
    wanted = reference.paged_attention(q.double(), *inputs)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_8_bits_hide_nothing_that_is_not_a_number(cpu: CpuLibrary, value: float) -> None:
    q, k, v = torch.randn(3, 1, 1, 32).bfloat16()
    caches = [torch.zeros(1, 1, 16, 32, dtype=torch.int8) for _ in range(2)]
    scales = [torch.zeros(1, 1, 16) for _ in range(2)]
    for bad in (k, v):
        before, bad[0, 0, 3] = bad[0, 0, 3].clone(), value
        slots, turn = torch.zeros(1, dtype=torch.int64), torch.ones(1, 32)
        cpu.rotary_store(q, k, v, turn, 0 * turn, *caches, slots, *scales)
        found = cpu.paged_attention(q, *caches, one_decode([1], 1), 0.2, 0, *scales)
        assert not found.isfinite().all()
        bad[0, 0, 3] = before


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("window", [0, 1, 21, 50])
@pytest.mark.parametrize(("share", "dim"), [(1, 128), (3, 80), (7, 64), (40, 16)])
def test_a_tokens_attention_does_not_depend_on_those_beside_it(
    cpu: CpuLibrary, share: int, dim: int, window: int, eight_bits: bool
) -> None:
    """To the bit: in a prompt, in a piece of it, alone, and whatever later tokens hold."""
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 7, 2, 16, dim).bfloat16()
    scales: tuple[Tensor, ...] = ()
    if eight_bits:
        k_cache, v_cache = ((32 * cache).clamp(-127, 127).char() for cache in (k_cache, v_cache))
        scales = tuple(torch.rand(2, 7, 2, 16) / 32)
    q = torch.randn(70, 2 * share, dim).bfloat16()

    def attend(first: int, end: int, k: Tensor = k_cache, v: Tensor = v_cache) -> Tensor:
        """Of the tokens at positions 30 + first to 30 + end."""
        batch = AttentionBatch(
            query_start=torch.tensor([0, end - first], dtype=torch.int32),
            context_lens=torch.tensor([30 + end], dtype=torch.int32),
            block_tables=torch.tensor([[6, 2, 0, 5, 1, 3, 4]], dtype=torch.int32),
            slot_mapping=torch.zeros(end - first, dtype=torch.int64),
            max_query=end - first,
        )
        return cpu.paged_attention(q[first:end], k, v, batch, dim**-0.5, window, *scales)

    together = attend(0, 70)
    for first, end in ((0, 1), (0, 33), (33, 34), (34, 70), (69, 70), (5, 12)):
        assert torch.equal(attend(first, end), together[first:end])
    if eight_bits:
        return
    k, v = k_cache.clone(), v_cache.clone()
    k[4, :, 3], v[4, :, 3] = float("nan"), float("inf")  # position 99, the last
    found = attend(0, 70, k, v)
    assert torch.equal(found[:-1], together[:-1])
    assert not found[-1].isfinite().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_attention_hides_nothing_that_is_not_a_number(
    cpu: CpuLibrary, value: float, where: str, softcap: float
) -> None:
    torch.manual_seed(0)
    q, (k_cache, v_cache) = (
        torch.randn(1, 4, 32).bfloat16(),
        torch.randn(2, 2, 2, 16, 32).bfloat16(),
    )
    # Two query heads share a KV head: one query is bad, or a key or value of the other KV head.
    {"query": q[0, 0], "key": k_cache[0, 1, 5], "value": v_cache[0, 1, 5]}[where][3] = value
    batch = one_decode([20])
    options = {"softcap": softcap, "sinks": torch.zeros(4)}
    found = cpu.paged_attention(q, k_cache, v_cache, batch, 0.2, **options)
    expected = reference.paged_attention(q, k_cache, v_cache, batch, 0.2, **options)
    if softcap == 0 or where == "value" or value != float("inf"):
        assert not expected.isfinite().all()  # a soft cap makes infinite logits finite
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_sequences_without_context_only_pad_the_batch(cpu: CpuLibrary) -> None:
    q, (k_cache, v_cache) = (
        torch.randn(3, 4, 32).bfloat16(),
        torch.randn(2, 6, 2, 16, 32).bfloat16(),
    )
    padded = cpu.paged_attention(q, k_cache, v_cache, one_decode([20, 0, 7]), 0.2)
    expected = reference.paged_attention(q, k_cache, v_cache, one_decode([20, 0, 7]), 0.2)
    torch.testing.assert_close(padded[::2], expected[::2], rtol=2**-7, atol=2**-7)
    assert cpu.paged_attention(q, k_cache, v_cache, one_decode([0, 0, 0]), 0.2).shape == (3, 128)


class Step:
    """The arguments of rotary and attention for two sequences of one new token each."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.qkv = torch.randn(2, 8, 32).bfloat16()
        self.q, self.k, self.v = self.qkv.split((4, 2, 2), dim=1)  # type: ignore[no-untyped-call]
        self.cos, self.sin = torch.randn(2, 2, 32)
        self.k_cache, self.v_cache = torch.randn(2, 4, 2, 16, 32).bfloat16()
        self.batch = one_decode([20, 7])

    def attend(self, cpu: CpuLibrary) -> None:
        caches = self.k_cache, self.v_cache
        cpu.paged_attention(self.q, *caches, self.batch, 0.2)
        slots = self.batch.slot_mapping
        cpu.rotary_store(self.q, self.k, self.v, self.cos, self.sin, *caches, slots)


@pytest.mark.parametrize(
    ("name", "make", "shown"),
    [
        ("q", lambda x: x[:, :, :24], "q: torch.bfloat16 (2, 4, 24)"),
        ("q", lambda x: x[:, :3], "q: torch.bfloat16 (2, 3, 32)"),
        ("q", lambda x: x[:1], "q: torch.bfloat16 (1, 4, 32)"),
        ("q", transposed, "q: torch.bfloat16 (2, 4, 32) strides (32, 64, 1)"),
        ("k", lambda x: x[..., :16], "k: torch.bfloat16 (2, 2, 16)"),
        ("v", lambda x: x[:, :1], "v: torch.bfloat16 (2, 1, 32)"),
        ("v", transposed, "v: torch.bfloat16 (2, 2, 32) strides (32, 64, 1)"),
        (
            "k_cache",
            transposed,
            "k_cache: torch.bfloat16 (4, 2, 16, 32) strides (512, 2048, 32, 1)",
        ),
        ("v_cache", lambda x: x[:2], "v_cache: torch.bfloat16 (2, 2, 16, 32)"),
        ("cos", lambda x: x.bfloat16(), "cos: torch.bfloat16"),
        ("cos", lambda x: x[:, :31], "31 entries for a token"),
        ("sin", lambda x: x[:, :16], "sin: torch.float32 (2, 16)"),
        ("sin", lambda x: x[:1], "sin: torch.float32 (1, 32)"),
    ],
)
def test_what_attention_would_misread_is_refused(
    cpu: CpuLibrary, name: str, make: Callable[[Tensor], Tensor], shown: str
) -> None:
    step = Step()
    step.attend(cpu)
    setattr(step, name, make(getattr(step, name)))
    with pytest.raises(ValueError, match=re.escape(shown)):
        step.attend(cpu)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("query_start", lambda x: x.long()),
        ("context_lens", lambda x: x[:1]),
        ("block_tables", lambda x: x[:, :1]),
        ("slot_mapping", lambda x: x.int()),
    ],
)
def test_a_batch_of_sequences_is_what_it_says(name: str, make: Callable[[Tensor], Tensor]) -> None:
    batch = one_decode([20, 7])
    with pytest.raises(ValueError, match="expected contiguous"):
        replace(batch, **{name: make(getattr(batch, name))})


def test_rows_are_those_of_every_sequence_of_a_batch() -> None:
    with pytest.raises(ValueError, match="rows has 1 entries, expected one of 2 sequences"):
        replace(one_decode([20, 7]), rows=(1,))


def test_norms_and_products_refuse_what_they_would_misread(cpu: CpuLibrary) -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.ones(64).bfloat16()
    with pytest.raises(ValueError, match=r"weight: .* \(32,\)"):
        cpu.rms_norm(x, weight[:32], 1e-6)
    with pytest.raises(ValueError, match=r"residual: .* \(1, 64\)"):
        cpu.add_rms_norm(x, x[:1], weight, 1e-6)
    packed = random_weight(16, 64, 32, "sym", torch.float16, act_order=False, bias=False)
    with pytest.raises(ValueError, match=r"x: .* \(3, 32\)"):
        cpu.packed_matmul(x[:, :32], packed.to_layout("cpu_tiles"))


def test_what_the_vectors_do_not_divide_is_the_references(cpu: CpuLibrary) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 40).bfloat16(), torch.rand(40).bfloat16()
    assert torch.equal(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    for found, expected in zip(
        cpu.add_rms_norm(x, x, weight, 1e-6),
        reference.add_rms_norm(x, x, weight, 1e-6),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert torch.equal(cpu.gated(x, "silu"), reference.gated(x, "silu"))
    steps = [Step(), Step()]
    narrow = []
    for step in steps:
        step.q, step.k, step.v = (t[..., :24] for t in (step.q, step.k, step.v))
        caches = step.k_cache[..., :24], step.v_cache[..., :24]
        narrow.append((step, caches, (step.cos[:, :24], step.sin[:, :24])))
    for kernels, (step, caches, angles) in zip((cpu, reference), narrow, strict=True):
        heads = step.q, step.k, step.v
        kernels.rotary_store(*heads, *angles, *caches, step.batch.slot_mapping)
    (one, ours, _), (other, theirs, _) = narrow
    assert torch.equal(one.q, other.q)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(
        cpu.paged_attention(one.q, *ours, one.batch, 0.2),
        reference.paged_attention(other.q, *theirs, other.batch, 0.2),
    )


def test_attention_over_a_cache_of_another_dtype_is_the_references(cpu: CpuLibrary) -> None:
    step = Step()
    caches = step.k_cache.float(), step.v_cache.float()
    found = cpu.paged_attention(step.q, *caches, step.batch, 0.2)
    assert torch.equal(found, reference.paged_attention(step.q, *caches, step.batch, 0.2))


def test_norms_of_other_dtypes_and_strides_are_the_references(cpu: CpuLibrary) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64).bfloat16(), torch.rand(128)
    expected = reference.rms_norm(x, weight[:64], 1e-6)
    torch.testing.assert_close(cpu.rms_norm(x, weight[:64], 1e-6), expected)
    strided = weight.bfloat16()[::2]
    expected = reference.rms_norm(x, strided, 1e-6)
    torch.testing.assert_close(cpu.rms_norm(x, strided, 1e-6), expected, rtol=2**-7, atol=0)


def test_gates_may_have_any_dimensions(cpu: CpuLibrary) -> None:
    gate_up = torch.randn(2, 3, 64).bfloat16()
    found, expected = cpu.gated(gate_up, "silu"), reference.gated(gate_up, "silu")
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-30)


@contextmanager
def little_memory(spare: int = 24 << 20) -> Iterator[None]:
    """No block of more than ``spare`` bytes can be had, and one of them can.

    What the process maps is limited; and what earlier tests have freed, which the allocator keeps
    and would give out again, is taken up.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * spare, before[1]))
    taken = list(iter(lambda: libc.malloc(spare), None))
    try:
        libc.free(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        for block in taken:
            libc.free(block)


@pytest.mark.parametrize("kernel", ["packed_matmul", "dequantize", "paged_attention", "lora_add"])
def test_running_out_of_memory_is_an_error_of_the_call(
    cpu: CpuLibrary, kernel: str, request: pytest.FixtureRequest
) -> None:
    """Each needs buffers of 64 MiB or more here, and less than 16 MiB for its result."""
    if request.node.callspec.params["cpu"].machine != machine():
        pytest.skip("the memory of emulated kernels is that of another process")
    if kernel == "packed_matmul":
        weight = random_weight(1, 1 << 16, 8, "asym", torch.float16, act_order=False, bias=False)
        x, tiled = torch.zeros(2048, 1 << 16).bfloat16(), weight.to_layout("cpu_tiles")

        def call() -> object:
            return cpu.packed_matmul(x, tiled)

    elif kernel == "dequantize":
        weight = random_weight(1, 1 << 22, 16, "sym", torch.float16, act_order=True, bias=False)
        large = weight.to_layout("cpu_tiles")

        def call() -> object:
            return cpu.dequantize(large, torch.bfloat16)

    elif kernel == "paged_attention":
        q, caches = torch.zeros(1, 32, 32).bfloat16(), torch.zeros(2, 1 << 15, 1, 16, 32).bfloat16()
        batch = one_decode([1 << 19], 1 << 15)

        def call() -> object:
            return cpu.paged_attention(q, *caches, batch, 1.0)

    else:
        matrices = torch.zeros(2, 1 << 14, 8).bfloat16()
        slots = LoRASlots.of([[Matrices(matrices[0], matrices[1])]], 8, (0, 8))
        rows = LoRABatch.of([0] * 1024, "cpu")
        assert rows is not None
        low = torch.zeros(1024, 8).bfloat16()

        def call() -> object:
            return cpu.lora_add(low.clone(), low, slots, rows)

    with little_memory(), pytest.raises(MemoryError, match=f"buffers of nybble_{kernel}"):
        call()
    call()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shared", [True, False], ids=["one input", "an input for each expert"])
def test_adapters_on_experts(cpu: CpuLibrary, rows: int, shared: bool) -> None:
    """One row that several experts share is the first step of every answer to be decoded."""
    torch.manual_seed(0)
    each = [
        [Matrices(torch.randn(4, 64).bfloat16() / 8, torch.randn(4, 40).bfloat16())]
        for _ in range(6)
    ]
    given = LoRASlots.of(each, 64, (0, 40))
    slots = torch.tensor([[0, 5, 2], [-1, 1, 3], [4, -1, 0]])[:rows]
    x = torch.randn(rows, *(() if shared else (3,)), 64).bfloat16()
    found, expected = torch.ones(2, rows, 3, 40).bfloat16()
    add, plain = cpu.grouped_lora(slots, 6), reference.grouped_lora(slots, 6)
    assert add is not None
    assert plain is not None
    add(found, x, given)
    plain(expected, x, given)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-4)
    assert (found[slots < 0] == 1).all()
