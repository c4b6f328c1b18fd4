"""The Triton kernels of latent attention compute what their references do.

On a machine without a GPU they run through Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.attention_batch import AttentionBatch

pytest.importorskip("triton")
from nybble.kernels.triton import attention_latent, attention_splits, latent

from .test_triton_step import DEVICE, close, paged, random


def in_8_bits(cache: Tensor, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cache in 8 bits, and the scale of each row."""
    codes, scales = reference.scaled_to_8_bits(cache, kept)
    return codes.to(kept), scales.float()


def compared(
    lengths: list[tuple[int, int]],
    heads: int,
    rotated: int,
    latents: int,
    *,
    dtype: torch.dtype = torch.float16,
    block_size: int = 16,
    kept: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What the kernels attend to, and what the reference does."""
    batch, cache, _ = paged(lengths, 1, rotated + latents, block_size, dtype)
    scales: list[Tensor] = []
    if kept is not None:
        cache, found = in_8_bits(cache, kept)
        scales = [found]
    q = random(sum(new for _, new in lengths), heads, rotated + latents, dtype=dtype)
    wide = cache if scales else cache.double()
    options = (batch, (rotated + latents) ** -0.5, latents, *scales)
    expected = reference.latent_attention(q.double(), wide, *options)
    return attention_latent.latent_attention(q, cache, *options), expected


DECODES = [(1, 1), (700, 1), (300, 1)]  # one key, three splits, two splits
PREFILLS = [(5, 5), (130, 2)]  # a whole prompt, the end of a longer one
BOTH = [(90, 1), (150, 40), (257, 1)]


@pytest.mark.parametrize(
    ("lengths", "heads", "rotated", "latents", "dtype", "block_size"),
    [
        ([(1, 1), (300, 1), (70, 40), (520, 3)], 5, 16, 48, torch.float16, 16),
        *(
            pytest.param(lengths, *sizes, marks=pytest.mark.slow)
            for lengths in (DECODES, PREFILLS, BOTH)
            for sizes in (
                (4, 16, 32, torch.float16, 16),
                (20, 32, 64, torch.bfloat16, 8),
                (40, 16, 16, torch.float16, 4),
                (1, 24, 40, torch.bfloat16, 32),
            )
        ),
        pytest.param(BOTH, 16, 64, 512, torch.bfloat16, 16, marks=pytest.mark.slow),
    ],
)
def test_what_is_attended_to_equals_the_reference(
    lengths: list[tuple[int, int]],
    heads: int,
    rotated: int,
    latents: int,
    dtype: torch.dtype,
    block_size: int,
) -> None:
    """Heads that one program takes, or several; entries of which the kernel's tiles have more."""
    close(*compared(lengths, heads, rotated, latents, dtype=dtype, block_size=block_size))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [torch.int8, torch.float8_e4m3fn])
def test_8_bit_rows_are_attended_to_as_they_stand(kept: torch.dtype) -> None:
    close(*compared([(300, 1), (70, 3)], 4, 16, 32, kept=kept), 1e-3)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has only its own settings")
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_it_equals_the_reference_with_every_devices_settings(
    monkeypatch: pytest.MonkeyPatch, capability: int
) -> None:
    traits = ("any", 8, capability)
    monkeypatch.setattr(attention_latent, "device_traits", lambda device: traits)
    close(*compared([(300, 1), (90, 50)], 20, 16, 32))


@pytest.mark.slow
def test_a_sequence_is_attended_alike_in_any_company() -> None:
    lengths, heads = [(300, 1), (540, 9), (33, 1)], 4
    batch, cache, _ = paged(lengths, 1, 48, 16, torch.float16)
    q = random(sum(new for _, new in lengths), heads, 48, dtype=torch.float16)
    together = attention_latent.latent_attention(q, cache, batch, 0.2, 32)
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
        found = attention_latent.latent_attention(q[rows].contiguous(), cache, alone, 0.2, 32)
        assert torch.equal(found, together[rows])


def test_sequences_decoded_a_few_at_a_time_are_decoded_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, cache, _ = paged(
        [(300, 1), (5, 1), (600, 2), (40, 1), (290, 1)], 1, 48, 16, torch.float16
    )
    q = random(6, 4, 48, dtype=torch.float16)
    at_once = attention_latent.latent_attention(q, cache, batch, 0.2, 32)
    monkeypatch.setattr(attention_splits, "PARTS", 0)
    assert torch.equal(attention_latent.latent_attention(q, cache, batch, 0.2, 32), at_once)


def test_rows_that_pad_a_captured_batch_are_left_out() -> None:
    batch, cache, _ = paged([(70, 1), (0, 1), (0, 1)], 1, 48, 16, torch.float16)
    q = random(3, 2, 48, dtype=torch.float16)
    found = attention_latent.latent_attention(q, cache, batch, 0.2, 32)
    alone, _, _ = paged([(70, 1)], 1, 48, 16, torch.float16)
    close(found[:1], reference.latent_attention(q[:1], cache, alone, 0.2, 32))


@pytest.mark.parametrize(
    ("heads", "rotated", "latents", "interleaved", "kept"),
    [
        (20, 64, 512, True, torch.float16),
        (4, 16, 48, False, torch.bfloat16),
        (9, 24, 32, True, torch.int8),
        (9, 16, 40, False, torch.float8_e4m3fn),
    ],
)
def test_rows_are_stored_as_the_reference_stores_them_and_nothing_else_is_touched(
    heads: int, rotated: int, latents: int, interleaved: bool, kept: torch.dtype
) -> None:
    tokens, block_size = 5, 4
    dtype = kept if kept.itemsize == 2 else torch.float16
    slots = torch.tensor([9, -1, 0, 15, 2], device=DEVICE)
    projected = random(tokens, heads * (8 + rotated) + latents + rotated, dtype=dtype)
    projected[2, -latents - rotated :] = 0  # a row of zeros has no scale
    angle = random(tokens, rotated)
    results = []
    for function in (reference.latent_store, latent.latent_store):
        # As the decoder has them: queries' rotated parts lie behind others, and so does the key.
        sizes = [heads * (8 + rotated), latents, rotated]
        queries, own, key = projected.clone().split(sizes, dim=1)
        q = queries.view(tokens, heads, -1)[..., 8:]
        cache = torch.full((4, 1, block_size, rotated + latents), 7.0, device=DEVICE).to(kept)
        scales = [] if kept.itemsize == 2 else [torch.full((4, 1, block_size), 7.0, device=DEVICE)]
        options = {"interleaved": interleaved}
        function(q, key, own, angle.cos(), angle.sin(), cache, slots, *scales, **options)
        results.append((queries, cache, *scales))
    (queries, cache, *scales), (found, found_cache, *found_scales) = results
    close(found, queries)
    if not scales:
        close(found_cache, cache)
        assert torch.equal(found_cache == 7, cache == 7)
        return
    torch.testing.assert_close(found_scales[0], scales[0])
    codes, found_codes = (each.view(torch.int8).int() for each in (cache, found_cache))
    apart = (found_codes - codes).abs()
    if kept != torch.int8 and DEVICE == "cpu":
        # The interpreter drops the carry where a mantissa rounds up to a power of two.
        apart[apart == 8] = 0
    assert apart.max() <= 1  # a half may round either way
