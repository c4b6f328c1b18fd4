"""The Triton norms, activation, rotary and attention compute what their references do.

On a machine without a GPU they run through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.activation import ACTIVATIONS, Activation
from nybble.kernels.attention_batch import AttentionBatch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from nybble.kernels.triton import (  # noqa: E402
    activation,
    attention,
    attention_decode,
    attention_prefill,
    attention_splits,
    norm,
    rotary,
)

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Relative error of the whole and no stray element; NaN never passes."""
    if tolerance is None:
        # The interpreter truncates to bfloat16 where the GPU rounds.
        tolerance = 1e-2 if found.dtype == torch.bfloat16 else 5e-4
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, f"relative error {error}"


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 5120), (3, 96), (7, 128), (33, 64), (2, 1000)])
def test_rms_norm_equals_the_reference(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = random(rows, width, dtype=dtype), random(width, dtype=dtype)
    for offset in (None, 0.0, 1.0):
        expected = reference.rms_norm(x, weight, 1e-5, offset)
        close(norm.rms_norm(x, weight, 1e-5, offset), expected)


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(5, 3, 64), (1, 40, 128), (33, 1, 80)])
def test_heads_are_normed_within_the_rows_of_all_projections(
    tokens: int, heads: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of queries, keys and values in one tensor, which is not copied."""
    fused = random(tokens, heads + 4, dim, dtype=torch.float16)
    weight = random(dim, dtype=torch.float16)
    copies: list[Tensor] = []
    monkeypatch.setattr(Tensor, "contiguous", lambda self: copies.append(self) or self.clone())
    for each in (fused[:, :heads], fused[:, heads : heads + 2]):
        found = norm.rms_norm(each, weight, 1e-5)
        assert found.is_contiguous()
        close(found, reference.rms_norm(each, weight, 1e-5))
    assert copies == []


def test_a_norm_is_rounded_once_or_twice_as_it_is_asked_for() -> None:
    # In float16: the interpreter cuts bfloat16 off.
    x, weight = (random(*shape, dtype=torch.float16) for shape in ((33, 200), (200,)))
    twice, once = (reference.rms_norm(x, weight, 1e-6, offset) for offset in (None, 0.0))
    assert (once != twice).float().mean() > 0.1
    for offset, expected in ((None, twice), (0.0, once)):
        assert (norm.rms_norm(x, weight, 1e-6, offset) != expected).float().mean() < 0.02


@dtypes
def test_adding_the_residual_rounds_as_the_reference_does(dtype: torch.dtype) -> None:
    x, residual = random(5, 200, dtype=dtype), random(5, 200, dtype=dtype, seed=1)
    weight = random(200, dtype=dtype)
    normed, total = norm.add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    if dtype == torch.float16 or DEVICE == "cuda":
        assert torch.equal(total, expected_total)
    close(total, expected_total)
    close(normed, expected)


@dtypes
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (3, 1500), (2, 33)])
def test_a_gate_times_what_it_multiplies_equals_the_reference(
    dtype: torch.dtype, kind: Activation, rows: int, width: int
) -> None:
    gate_up = 4 * random(rows, 2 * width, dtype=dtype)
    close(activation.gated(gate_up, kind), reference.gated(gate_up, kind))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_of_very_large_numbers_and_of_none_are_the_references(kind: Activation) -> None:
    gate = torch.tensor([-6e4, -200, -20, 0, 20, 200, float("nan")]).half().to(DEVICE)
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    expected = reference.gated(gate_up, kind)
    torch.testing.assert_close(
        activation.gated(gate_up, kind), expected, rtol=1e-3, atol=1e-7, equal_nan=True
    )


@dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim", "rotary_dim"),
    [
        (4, 2, 64, 64),
        (3, 1, 80, 32),
        (2, 1, 112, 82),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((9, 9, 128, 64), (2, 1, 96, 96), (1, 2, 256, 2))
        ),
    ],
)
def test_rotary_store_equals_the_reference_and_touches_nothing_else(
    dtype: torch.dtype,
    q_heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int,
    interleaved: bool,
) -> None:
    tokens, block_size = 5, 4
    fused = random(tokens, q_heads + 2 * kv_heads, dim, dtype=dtype)
    angle = random(tokens, rotary_dim)
    slots = torch.tensor([9, -1, 0, 15, 2], device=DEVICE)
    results = []
    for function in (reference.rotary_store, rotary.rotary_store):
        q, k, v = fused.clone().split([q_heads, kv_heads, kv_heads], dim=1)
        caches = torch.full((2, 4, kv_heads, block_size, dim), 7.0, dtype=dtype, device=DEVICE)
        options = {"interleaved": interleaved}
        function(q, k, v, angle.cos(), angle.sin(), caches[0], caches[1], slots, **options)
        results.append((q, k, v, caches))
    for expected, found in zip(*results, strict=True):
        close(found, expected)
    assert torch.equal(results[0][3] == 7, results[1][3] == 7)


@pytest.mark.parametrize("rotary_dim", [0, 7, 34])
def test_angles_that_fit_no_head_are_refused(rotary_dim: int) -> None:
    q, angle = random(1, 1, 32).half(), random(1, rotary_dim)
    caches, slots = torch.zeros(2, 1, 1, 16, 32).half(), torch.zeros(1, dtype=torch.int64)
    for function in (reference.rotary_store, rotary.rotary_store):
        with pytest.raises(ValueError, match=f"{rotary_dim} entries .* at most the head_dim of 32"):
            function(q, q, q, angle, angle, *caches, slots)


def paged(
    lengths: list[tuple[int, int]], kv_heads: int, dim: int, block_size: int, dtype: torch.dtype
) -> tuple[AttentionBatch, Tensor, Tensor]:
    """A batch of (context, new tokens) whose blocks are scattered, and caches full of noise."""
    counts = [-(-context // block_size) for context, _ in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
    tables = torch.full((len(lengths), max(counts) + 1), -(10**6), dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts)):
        tables[row, : len(blocks)] = blocks
    queries = [new for _, new in lengths]
    batch = AttentionBatch(
        query_start=torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE),
        context_lens=torch.tensor([c for c, _ in lengths], dtype=torch.int32, device=DEVICE),
        block_tables=tables.to(DEVICE),
        slot_mapping=torch.empty(0, dtype=torch.int64, device=DEVICE),
        max_query=max(queries),
    )
    shape = (max(sum(counts), 1), kv_heads, block_size, dim)
    return batch, random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)


def on_device_of(
    multiprocessors: int, monkeypatch: pytest.MonkeyPatch, capability: int = 90
) -> None:
    """As many programs as fill such a device."""
    for module in (attention, attention_decode, attention_prefill, attention_splits):
        traits = "any", multiprocessors, capability
        monkeypatch.setattr(module, "device_traits", lambda device, traits=traits: traits)


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs are interpreted sooner than those that fill an H100."""
    if DEVICE == "cpu":
        on_device_of(8, monkeypatch)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim", "block_size", "dtype"),
    [
        (4, 2, 64, 16, torch.float16),
        pytest.param(3, 3, 32, 8, torch.bfloat16, marks=pytest.mark.slow),
        (7, 1, 80, 4, torch.bfloat16),
        pytest.param(32, 1, 16, 32, torch.float16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1), (700, 1), (300, 1)],  # decodes: one key, three splits, two splits
        [(5, 5), (130, 2)],  # prefills: a whole prompt, the end of a longer one
        [(90, 1), (150, 70), (257, 1)],  # both
    ],
    ids=["decode", "prefill", "mixed"],
)
def test_paged_attention_equals_the_reference(
    lengths: list[tuple[int, int]],
    q_heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int,
) -> None:
    batch, keys, values = paged(lengths, kv_heads, dim, block_size, dtype)
    fused = random(sum(new for _, new in lengths), q_heads + 2, dim, dtype=dtype)
    q = fused[:, :q_heads]
    expected = reference.paged_attention(
        q.double(), keys.double(), values.double(), batch, dim**-0.5, window
    )
    close(attention.paged_attention(q, keys, values, batch, dim**-0.5, window), expected)


@pytest.mark.parametrize(
    ("softcap", "sinks", "window", "kept"),
    [
        (2.0, False, 40, None),
        (0.0, True, 0, None),
        (3.0, True, 40, torch.int8),
        *(
            pytest.param(*logits, window, kept, marks=pytest.mark.slow)
            for logits in ((2.0, False), (0.0, True), (3.0, True))
            for window in (0, 40)
            for kept in (None, torch.int8)
        ),
    ],
)
def test_capped_logits_and_sinks_equal_the_reference(
    softcap: float, sinks: bool, window: int, kept: torch.dtype | None
) -> None:
    """Of decodes in one and in several splits, and of prefills; the cap and the sinks matter."""
    lengths, dim = [(1, 1), (700, 1), (300, 1), (5, 5), (130, 2), (150, 70)], 32
    batch, *caches = paged(lengths, 2, dim, 16, torch.float16)
    scales: list[Tensor] = []
    if kept is not None:
        caches = [(40 * cache).clamp(-127, 127).to(kept) for cache in caches]
        scales = [torch.full(cache.shape[:3], 1 / 40, device=DEVICE) for cache in caches]
    q = random(sum(new for _, new in lengths), 6, dim, dtype=torch.float16)
    given = 4 * random(6, dtype=torch.float16) if sinks else None
    inputs = q, *caches, batch, 0.5, window, *scales
    found = attention.paged_attention(*inputs, softcap=softcap, sinks=given)
    close(found, reference.paged_attention(*inputs, softcap=softcap, sinks=given), 1e-3)
    plain = reference.paged_attention(*inputs).double()
    assert (found.double() - plain).norm() > 0.1 * plain.norm()


@pytest.mark.parametrize("context", [17, pytest.param(1600, marks=pytest.mark.slow)])
def test_prompts_find_programs_where_only_their_rows_together_are_known(
    context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many prompts as so many rows can be, and padded sequences and rows behind them."""
    lengths = [*[(context, 17)] * 3, (5, 5), (0, 0), (0, 0)]
    batch, keys, values = paged(lengths, 2, 16, 16, torch.float16)
    batch = replace(batch, max_query=64)
    q = random(64, 4, 16, dtype=torch.float16)
    on_device_of(4, monkeypatch)  # which several programs of each prompt keep busy
    assert batch.rows is None
    known = replace(batch, rows=tuple(new for _, new in lengths))
    own = q[:56]
    expected = reference.paged_attention(own.double(), keys.double(), values.double(), known, 0.2)
    for each in (batch, known):
        close(attention.paged_attention(q, keys, values, each, 0.2)[:56], expected)


def test_what_splits_take_is_bounded_and_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are decoded a few at a time if all of them would take too much."""
    lengths = [(260, 1), (1, 1), (4, 3), (7, 1), (257, 1)]
    batch, keys, values = paged(lengths, 2, 32, 16, torch.float16)
    q = random(sum(new for _, new in lengths), 4, 32, dtype=torch.float16)
    on_device_of(4, monkeypatch)
    at_once = attention.paged_attention(q, keys, values, batch, 0.2)
    monkeypatch.setattr(attention_splits, "PARTS", 5 * 1000)
    splitting = attention.splitting_of(4, 2, 32, 4)
    few = attention_splits.batches_of(batch, splitting, q, 32)
    assert [len(each.context_lens) for each, _ in few] == [4, 1]
    assert torch.equal(attention.paged_attention(q, keys, values, batch, 0.2), at_once)


LLAMA_3_8B = (32, 128, attention.splitting_of(32, 8, 128, 132))
DEEPSEEK_V3 = (128, 512, attention_splits.Splitting(33, 16))


@pytest.mark.parametrize(
    ("model", "rows", "known"),
    [
        (LLAMA_3_8B, [1] * 512, False),
        (DEEPSEEK_V3, [1] * 256, False),
        (LLAMA_3_8B, [9] * 256, False),  # drafts, in a captured graph
        (LLAMA_3_8B, [1] * 100 + [900, 5, 40, 1000] + [7] * 30, True),
        (LLAMA_3_8B, [1] * 100 + [900, 5, 40, 1000] + [7] * 30, False),
        (LLAMA_3_8B, [100] * 90, True),
        (LLAMA_3_8B, [100] * 90, False),
    ],
)
def test_the_splits_of_a_large_batch_take_at_most_256_mib(
    model: tuple[int, int, attention_splits.Splitting], rows: list[int], known: bool
) -> None:
    """On an H100, where each has all splits that its rows may have."""
    heads, dim, splitting = model
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    zeros = torch.zeros(len(rows), dtype=torch.int32)
    given = tuple(rows) if known else None
    batch = AttentionBatch(starts, zeros, zeros[:, None], zeros.long(), max(rows), given)
    q = torch.empty(sum(rows), heads, 1, device="meta")
    few = list(attention_splits.batches_of(batch, splitting, q, dim))
    assert torch.equal(torch.cat([each.query_start[:-1] for each, _ in few]), starts[:-1])
    for each, parts in few:
        own = each.query_start.diff().tolist()
        most = [splitting.most(count) for count in own]
        needed = sum(count * splits for count, splits in zip(own, most, strict=True) if splits > 1)
        assert heads * needed <= len(parts.peak)
        assert len(parts.out) * dim * 4 <= 256 << 20 or len(own) <= 4
        assert parts.rows >= sum(c for c, splits in zip(own, most, strict=True) if splits > 1)
        # Else kernels are compiled anew.
        assert each.query_start.data_ptr() % 16 == starts.data_ptr() % 16
        assert parts.peak.storage_offset() % 4 == parts.total.storage_offset() % 4 == 0


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own number of programs")
@pytest.mark.parametrize(
    ("group", "window", "kept", "softcap", "split"),
    [
        (2, 600, torch.int8, 3.0, [2, 2, 2, 1, 2, 1, 2]),
        pytest.param(2, 0, None, 0.0, [3, 2, 3, 1, 3, 1, 3], marks=pytest.mark.slow),
        pytest.param(7, 600, torch.int8, 3.0, [2, 2, 2, 1, 2, 1, 2], marks=pytest.mark.slow),
        pytest.param(1, 600, None, 0.0, [2, 2, 2, 1, 2, 1, 2], marks=pytest.mark.slow),
        pytest.param(4, 0, torch.int8, 3.0, [3, 2, 3, 1, 3, 1, 3], marks=pytest.mark.slow),
    ],
)
def test_tokens_are_split_over_the_keys_of_a_long_context(
    group: int,
    window: int,
    kept: torch.dtype | None,
    softcap: float,
    split: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Single ones, few, and turns of more than a program decodes, beside prompts."""
    lengths = [(1100, 9), (300, 1), (1300, 40), (20, 20), (1030, 2), (5, 5), (1250, 75)]
    room: list[Tensor] = []

    def batches_of(*given: Any) -> Iterator[tuple[AttentionBatch, attention_splits.Parts]]:
        for each, parts in attention_splits.batches_of(*given):
            room.append(parts.total.fill_(float("nan")))
            yield each, parts

    monkeypatch.setattr(attention, "batches_of", batches_of)
    batch, *caches = paged(lengths, 1, 32, 16, torch.float16)
    scales: list[Tensor] = []
    if kept is not None:
        caches = [(40 * cache).clamp(-127, 127).to(kept) for cache in caches]
        scales = [torch.full(cache.shape[:3], 1 / 40, device=DEVICE) for cache in caches]
    q = random(sum(new for _, new in lengths), group, 32, dtype=torch.float16)
    given = 4 * random(group, dtype=torch.float16) if softcap else None
    options = (batch, 0.2, window, *scales)
    wide = caches if scales else [cache.double() for cache in caches]
    expected = reference.paged_attention(q.double(), *wide, *options, softcap=softcap, sinks=given)
    found = attention.paged_attention(q, *caches, *options, softcap=softcap, sinks=given)
    close(found, expected, 1e-3)
    stored = group * sum(new * n for (_, new), n in zip(lengths, split, strict=True) if n > 1)
    assert room[0].isfinite().sum() == stored
    # What the host knows of the rows changes which kernels run, and nothing else.
    known = replace(batch, rows=tuple(new for _, new in lengths))
    inputs = q, *caches, known, *options[1:]
    assert torch.equal(attention.paged_attention(*inputs, softcap=softcap, sinks=given), found)


def test_kernels_of_which_no_sequence_has_the_rows_are_not_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[str] = []
    for name in ("prefill", "decode", "reduce"):
        monkeypatch.setattr(
            attention,
            name,
            lambda *_, name=name, **kinds: launched.append(
                name + " of few" * kinds.get("short", False)
            ),
        )

    def launches(rows: list[int], *, known: bool = True) -> list[str]:
        launched.clear()
        batch, keys, values = paged([(50, new) for new in rows], 2, 32, 16, torch.float16)
        batch = replace(batch, rows=tuple(rows) if known else None)
        q = random(sum(rows), 4, 32, dtype=torch.float16)
        attention.paged_attention(q, keys, values, batch, 0.2)
        return launched[:]

    assert launches([1, 1]) == launches([1, 1], known=False) == ["decode", "reduce"]
    assert launches([40]) == ["prefill", "reduce"]
    assert launches([40, 1]) == ["prefill", "decode", "reduce"]
    assert launches([9, 9]) == ["decode of few", "reduce"]
    everything = ["prefill", "decode of few", "decode", "reduce"]
    assert launches([40, 1], known=False) == launches([40, 2, 1]) == everything


def test_sinks_that_fit_no_heads_are_refused() -> None:
    batch, keys, values = paged([(20, 1)], 1, 32, 16, torch.float16)
    q = random(1, 4, 32, dtype=torch.float16)
    for wrong in (random(3), random(8)[::2], torch.zeros(4, dtype=torch.int32)):
        for kernels in (attention, reference):
            with pytest.raises(ValueError, match=r"expected contiguous numbers \(4,\)"):
                kernels.paged_attention(q, keys, values, batch, 0.2, sinks=wrong)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has only its own settings")
@pytest.mark.parametrize("kept", [None, torch.int8])
@pytest.mark.parametrize(
    ("capability", "group", "dim"),
    [
        (100, 2, 256),
        *(
            pytest.param(capability, group, dim, marks=pytest.mark.slow)
            for capability, group, dim in (
                *((80, 1, 80), (90, 1, 96)),
                *((80, 1, 96), (80, 2, 256)),
                *((90, 1, 80), (90, 2, 256)),
                *((100, 1, 80), (100, 1, 96)),
            )
        ),
    ],
)
def test_attention_equals_the_reference_with_every_devices_settings(
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    kept: torch.dtype | None,
    group: int,
    dim: int,
) -> None:
    on_device_of(8, monkeypatch, capability)
    lengths = [(300, 1), (90, 50), (550, 3)]
    batch, *caches = paged(lengths, 1, dim, 16, torch.float16)
    scales: list[Tensor] = []
    if kept is not None:
        caches = [torch.randint(-127, 128, cache.shape).to(kept) for cache in caches]
        scales = list(random(2, *caches[0].shape[:3]).abs() / 60)
    q = random(sum(new for _, new in lengths), group, dim, dtype=torch.float16)
    wide = caches if scales else [cache.double() for cache in caches]
    options = (batch, dim**-0.5, 0, *scales)
    expected = reference.paged_attention(q.double(), *wide, *options)
    close(attention.paged_attention(q, *caches, *options), expected, 1e-3)


@pytest.mark.parametrize(
    ("window", "block_size"),
    [
        (40, 4),
        *(
            pytest.param(window, block_size, marks=pytest.mark.slow)
            for window in (1, 40, 100)
            for block_size in (4, 16)
        ),
    ],
)
def test_blocks_that_no_new_token_sees_are_not_read(block_size: int, window: int) -> None:
    """They may have been given to another sequence, whose values need not even be numbers."""
    lengths, dim = [(700, 1), (300, 70), (150, 1), (261, 2), (1200, 20), (1300, 40)], 32
    batch, keys, values = paged(lengths, 1, dim, block_size, torch.float16)
    q = random(sum(new for _, new in lengths), 2, dim, dtype=torch.float16)
    whole = attention.paged_attention(q, keys, values, batch, dim**-0.5, window)
    for row, (context, new) in enumerate(lengths):
        unseen = max(0, context - new - window + 1) // block_size
        gone = batch.block_tables[row, :unseen].long()
        keys[gone], values[gone] = float("nan"), float("nan")
    found = attention.paged_attention(q, keys, values, batch, dim**-0.5, window)
    assert torch.equal(found, whole)


@pytest.mark.parametrize("kept", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("rotary_dim", "interleaved"),
    [*(pytest.param(dim, False, marks=pytest.mark.slow) for dim in (48, 32)), (20, True)],
)
def test_8_bit_caches_hold_each_head_to_its_precision(
    kept: torch.dtype, rotary_dim: int, interleaved: bool
) -> None:
    tokens, kv_heads, dim, block_size, blocks = 40, 2, 48, 16, 24
    slots = torch.randperm(blocks * block_size)[:tokens].to(DEVICE)
    fused = random(tokens, 4 + 2 * kv_heads, dim, dtype=torch.float16)
    fused[3, 4:] = 0  # a head of zeros has no scale
    angle = random(tokens, rotary_dim)
    results = []
    for function in (reference.rotary_store, rotary.rotary_store):
        q, k, v = fused.clone().split([4, kv_heads, kv_heads], dim=1)
        caches = torch.zeros(2, blocks, kv_heads, block_size, dim, dtype=kept, device=DEVICE)
        scales = torch.zeros(2, blocks, kv_heads, block_size, device=DEVICE)
        options = {"interleaved": interleaved}
        function(q, k, v, angle.cos(), angle.sin(), *caches, slots, *scales, **options)
        results.append((caches, scales))
    (caches, scales), (found, found_scales) = results
    torch.testing.assert_close(found_scales, scales)
    codes, found_codes = (c.view(torch.int8).int() for c in (caches, found))
    apart = (found_codes - codes).abs()
    if kept != torch.int8 and DEVICE == "cpu":
        # The interpreter drops the carry where a mantissa rounds up to a power of two.
        found = torch.where(apart == 8, caches.float(), found.float()).to(kept)
        apart[apart == 8] = 0
    assert apart.max() <= 1  # a half may round either way
    stored = found[1, slots // block_size, :, slots % block_size].float()
    stored *= found_scales[1, slots // block_size, :, slots % block_size][..., None]
    exact = fused[:, -kv_heads:].float()
    peak = exact.abs().amax(-1, keepdim=True)
    # Half a step: of integers, or of a 3-bit mantissa and, near 0, the smallest subnormal.
    bound = peak / 127 * 0.502 if kept == torch.int8 else exact.abs() / 15.9 + peak / 448 / 2**10
    assert ((stored - exact).abs() <= bound).all()


@pytest.mark.parametrize("kept", [torch.int8, torch.float8_e4m3fn])
def test_8_bit_caches_are_attended_as_they_stand(kept: torch.dtype) -> None:
    kv_heads, dim, block_size = 2, 48, 16
    batch, keys, _ = paged([(300, 1), (70, 40)], kv_heads, dim, block_size, torch.float16)
    caches = torch.randint(-127, 128, (2, *keys.shape)).to(DEVICE, kept)
    scales = random(2, *keys.shape[:3]).abs()
    q = random(41, 4, dim, dtype=torch.float16)
    expected = reference.paged_attention(q.double(), *caches, batch, 0.02, 0, *scales)
    close(attention.paged_attention(q, *caches, batch, 0.02, 0, *scales), expected, 1e-3)


def test_a_sequence_is_attended_alike_in_any_company() -> None:
    lengths = [(700, 1), (20, 9), (1100, 4), (33, 1), (1100, 70), (64, 64)]
    batch, keys, values = paged(lengths, 1, 32, 16, torch.float16)
    q = random(sum(new for _, new in lengths), 2, 32, dtype=torch.float16)
    together = attention.paged_attention(q, keys, values, batch, 0.2)
    starts = batch.query_start.tolist()
    for row, (_, new) in enumerate(lengths):
        rows = slice(starts[row], starts[row + 1])
        alone = AttentionBatch(
            query_start=torch.tensor([0, new], dtype=torch.int32, device=DEVICE),
            context_lens=batch.context_lens[row : row + 1],
            block_tables=batch.block_tables[row : row + 1],
            slot_mapping=batch.slot_mapping,
            max_query=new,
        )
        found = attention.paged_attention(q[rows].contiguous(), keys, values, alone, 0.2)
        assert torch.equal(found, together[rows])


def test_rows_that_pad_a_captured_batch_are_left_out() -> None:
    batch, keys, values = paged([(70, 1), (0, 1), (0, 1)], 1, 32, 16, torch.float16)
    q = random(3, 2, 32, dtype=torch.float16)
    found = attention.paged_attention(q, keys, values, batch, 0.2)
    alone, _, _ = paged([(70, 1)], 1, 32, 16, torch.float16)
    close(found[:1], reference.paged_attention(q[:1], keys, values, alone, 0.2))
