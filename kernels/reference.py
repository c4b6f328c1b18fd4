"""Plain PyTorch references: what every fast kernel must compute. Correct on any device, slow.

This module is a back end: see :class:`nybble.kernels.backend.Backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nybble.kernels.activation import Activation, check_activation
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.decoder_layer import DecoderLayer
from nybble.kernels.lora import GroupedLoRA, LoRASlots
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import (
    DenseWeight,
    GroupedKernel,
    LinearKernel,
    PackedWeight,
    Weight,
)
from nybble.kernels.recurrent import gated_delta_rule as gated_delta_rule
from nybble.kernels.recurrent import gated_rms_norm as gated_rms_norm
from nybble.kernels.recurrent import short_convolution as short_convolution
from nybble.kernels.recurrent import state_space_scan as state_space_scan
from nybble.kernels.routing import choose_experts as choose_experts

# Output rows dequantized at a time: 16 MiB of float32 at 4096 columns.
_ROWS_AT_A_TIME = 1024


def linear(weight: Weight, dtype: torch.dtype) -> LinearKernel:
    """The linear layer with this weight, for inputs of ``dtype``."""
    if isinstance(weight, PackedWeight):
        return partial(packed_matmul, weight=weight)
    return partial(dense_matmul, weight=weight)


def gated_linear(weight: Weight, activation: Activation, dtype: torch.dtype) -> None:
    """None: the product of a linear layer and :func:`gated` are computed one after the other."""


def decoder_layers(layers: Sequence[DecoderLayer], dtype: torch.dtype) -> None:
    """None: layers are computed by one operation after another."""


def grouped_linear(weights: Sequence[Weight], dtype: torch.dtype) -> GroupedKernel:
    """A linear layer of every expert, for inputs of ``dtype``."""
    return partial(grouped_matmul, experts=[linear(weight, dtype) for weight in weights])


def grouped_matmul(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor | None = None,
    *,
    experts: Sequence[LinearKernel],
) -> Tensor:
    """``y[r, k] = experts[expert_ids[r, k]](x[r])``, or their weighted sum over k.

    x: ``(rows, in)``, or ``(rows, top_k, in)`` with an input ``x[r, k]`` for each expert.
    expert_ids: int64 ``(rows, top_k)``.
    weights: float32 ``(rows, top_k)``.

    Returns ``y (rows, top_k, out)``, or ``Σ_k weights[r, k] · y[r, k]`` ``(rows, out)``, summed in
    float32 and rounded once, if weights are given. An expert without rows is not called.
    """
    inputs = x.flatten(0, 1) if x.ndim == 3 else x
    # Places in expert_ids, sorted by expert.
    chosen, places = expert_ids.flatten().sort(stable=True)
    rows = places if x.ndim == 3 else places // expert_ids.shape[1]
    counts = chosen.bincount(minlength=len(experts)).tolist()
    parts = [
        expert(inputs[part])
        for expert, part in zip(experts, torch.split(rows, counts), strict=True)
        if len(part)
    ]
    out = torch.cat(parts)[places.argsort()].view(*expert_ids.shape, -1)
    return out if weights is None else weighted_sum(out, weights)


def weighted_sum(out: Tensor, weights: Tensor) -> Tensor:
    """``Σ_k weights[r, k] · out[r, k]``, summed in float32 and rounded once.

    out: ``(rows, top_k, width)``; weights: float32 ``(rows, top_k)``.
    """
    return (out.float() * weights[..., None]).sum(1).to(out.dtype)


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in float32, of which a router chooses experts.

    x: ``(rows, hidden)``; weight, bias: float32 ``(experts, hidden)`` and ``(experts,)``.

    A product in float32 is summed in another order for another number of rows, and a token would be
    routed otherwise in company; in float64, rounded to float32, the order does not show.
    """
    added = None if bias is None else bias.double()
    return torch.nn.functional.linear(x.double(), weight.double(), added).float()


def packed_matmul(
    x: Tensor,
    weight: PackedWeight,
    dequantize: Callable[[PackedWeight, torch.dtype], Tensor] = PackedWeight.dequantize,
) -> Tensor:
    """``x @ weight.dequantize().T + bias`` in float32, rounded once to the dtype of ``x``.

    x: ``(..., in_features)``. Returns ``(..., out_features)``.

    A few output rows are dequantized at a time, so that no full-precision copy of the weight ever
    exists.
    """
    wide = x.float()
    parts = [
        wide @ dequantize(weight.rows(start, start + _ROWS_AT_A_TIME), torch.float32).T
        for start in range(0, weight.out_features, _ROWS_AT_A_TIME)
    ]
    out = torch.cat(parts, dim=-1)
    if weight.bias is not None:
        out += weight.bias.float()
    return out.to(x.dtype)


def packed_matmul_int16(x: Tensor, weight: PackedWeight) -> Tensor:
    """What the integer kernels of CPUs without BF16 compute, not rounded: float64.

    Each group of columns is cut into spans of 128 (64 if the levels are no consecutive integers).
    In a span x is rounded to a multiple of a power of two, so that 15 bits (14) and a sign hold it:
    to within 2⁻¹⁵ (2⁻¹⁴) of the span's largest, and bfloat16 numbers of at least 2⁻⁷ (2⁻⁶) of it
    exactly. Levels that are no consecutive integers are rounded to multiples of a 2047th of the
    largest. All else is exact.
    """
    levels = weight.levels
    first = float(levels[0])
    integers = first == round(first) and abs(first) <= 15 and bool((levels.diff() == 1).all())
    span, bits = (128, 15) if integers else (64, 14)
    rounded = (x if weight.perm is None else x[..., weight.perm]).double()
    for group in range(0, weight.columns, weight.group_size):
        end = min(group + weight.group_size, weight.columns)
        for start in range(group, end, span):
            part = rounded[..., start : min(start + span, end)]
            largest = part.abs().amax(-1, keepdim=True)
            exponent = (torch.frexp(largest).exponent - bits).clamp(min=-126)
            step = torch.ldexp(torch.ones_like(largest), exponent)
            part.copy_((part / step).round() * step)
    if not integers:
        step = levels.abs().max() / 2047
        levels = (levels / step).round() * step
    stored = replace(weight, levels=levels, perm=None, in_features=weight.columns)
    out = rounded @ stored.dequantize().double().T
    return out if weight.bias is None else out + weight.bias.double()


def packed_matmul_int8(x: Tensor, weight: PackedWeight) -> Tensor:
    """What the kernels compute with activations in 8 bits, not rounded: float64.

    Each group of columns is cut into spans of 128. In a span x is rounded to a multiple of a 127th
    of the span's largest. Levels that are no consecutive integers are rounded to 255ths of their
    range. All else is exact.
    """
    levels = weight.levels
    rounded = (x if weight.perm is None else x[..., weight.perm]).float()
    for group in range(0, weight.columns, weight.group_size):
        end = min(group + weight.group_size, weight.columns)
        for start in range(group, end, 128):
            part = rounded[..., start : min(start + 128, end)]
            step = (part.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-126)
            part.copy_((part * (1 / step)).round() * step)
    if not bool((levels.diff() == 1).all()):
        step = (levels.max() - levels.min()) / 255
        levels = ((levels - levels.min()) / step).round() * step + levels.min()
    stored = replace(weight, levels=levels, perm=None, in_features=weight.columns)
    out = rounded.double() @ stored.dequantize().double().T
    return out if weight.bias is None else out + weight.bias.double()


def dense_matmul(x: Tensor, weight: DenseWeight) -> Tensor:
    """``x @ W.T + bias`` of a weight in 16 or 32 bits.

    On the CPU the rows of bfloat16 are padded by zeros to :func:`rows_computed`: for every new
    number of rows and weight shape oneDNN compiles a kernel, which takes milliseconds and more than
    half a MiB that it keeps. Padding lets only a few numbers of rows occur.
    """
    if not x.is_cpu or x.dtype != torch.bfloat16:
        return torch.nn.functional.linear(x, weight.weight, weight.bias)
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if (added := rows_computed(count) - count) > 0:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, added))
    out = torch.nn.functional.linear(rows, weight.weight, weight.bias)[:count]
    return out.reshape(*x.shape[:-1], weight.weight.shape[0])


def rows_computed(rows: int) -> int:
    """The next power of two or three quarters of one, two at least; multiples of 64 above 128.

    PyTorch multiplies a single row in another way, which sums in another order: a row alone would
    differ in its last bits from the same row in a batch.
    """
    if rows == 1:
        return 2
    if rows > 128:
        return -(-rows // 64) * 64
    power = 1 << max(0, rows - 1).bit_length()
    return 3 * power // 4 if rows <= 3 * power // 4 else power


def lora_add(out: Tensor, x: Tensor, slots: LoRASlots, batch: LoRABatch) -> None:
    """Add every row's adapter to ``out (tokens, offsets[-1])`` in place.

    See :mod:`nybble.kernels.lora` for the formula.

    x: ``(tokens, in_features)``; x and out are contiguous.
    """
    starts = batch.segment_starts.tolist()
    for index, slot in enumerate(batch.segment_slots.tolist()):
        rows = batch.order[starts[index] : starts[index + 1]].long()
        if not len(rows):
            continue
        wide = x[rows].float()
        for pair, (start, end) in zip(slots.matrices[slot], pairwise(slots.offsets), strict=True):
            if pair is not None:
                a, b = pair.wide()
                h = (wide @ a.T).to(x.dtype).float()
                total = out[rows, start:end].float() + h @ b
                out[rows, start:end] = total.to(out.dtype)


def grouped_lora(
    slots: Tensor,
    count: int,
    add: Callable[[Tensor, Tensor, LoRASlots, LoRABatch], None] = lora_add,
) -> GroupedLoRA | None:
    """Adapters on outputs of experts: the ``k``-th of row ``r`` uses slot ``slots[r, k]``.

    slots: int64 ``(rows, top_k)`` below ``count``, −1 for no adapter. An expert's adapters have
        slots of their own.
    add: what computes :func:`lora_add`.

    Returns a function of ``out (rows, top_k, offsets[-1])``, which it adds to in place, of
    ``x (rows, in)`` or ``(rows, top_k, in)``, and of the :class:`LoRASlots`. It serves all
    projections of the layer. None if no row has an adapter.
    """
    batch = LoRABatch.of(slots.flatten().tolist(), slots.device)
    if batch is None:
        return None

    def add_to_each(out: Tensor, x: Tensor, of: LoRASlots) -> None:
        each = x.unsqueeze(1).expand(*out.shape[:2], -1) if x.ndim == 2 else x
        # One row for several experts is a view that repeats it, which no kernel reads.
        flat = each.reshape(-1, x.shape[-1]).contiguous()
        add(out.view(-1, out.shape[-1]), flat, of, batch)

    return add_to_each


def stretch_add(out: Tensor, rows: Tensor, gains: Tensor, shifts: Tensor) -> None:
    """``out[rows] += gains · out[rows] + shifts``, in place, computed in float32.

    out: ``(tokens, width)``; rows: int64; gains, shifts: float32 ``(width,)``. This is what an
    adapter with DoRA or biases does to a projection's output before its low-rank part is added.
    """
    before = out[rows].float()
    out[rows] = (before + (gains * before + shifts)).to(out.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float | None = None) -> Tensor:
    """Root-mean-square norm of the last dimension (Zhang and Sennrich 2019).

    Computed in float32 and rounded to the dtype of ``x`` before the multiplication by ``weight``,
    as in the Llama family. With an ``offset``, the multiplication is by ``offset + weight`` in
    float32 and the result is rounded once, as in Gemma (offset 1) and OLMo 2 (offset 0).
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset is not None:
        return (normed * (offset + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float | None = None
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of the last dimension (Ba et al. 2016), computed in float32 and rounded once.

    weight and bias: ``(width,)``; a weight may also be ``(heads, width)``, without a bias, for x
    ``(..., heads, width)``, as in Cohere's norms of queries and keys. For Nemotron's layernorm1p,
    whose stored weight is centred on zero, pass the stored weight plus 1.
    """
    if bias is None:  # as Cohere's own, of which torch's differs in float32's last bit
        centred = x.float() - x.float().mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        return (weight.float() * (centred * inverse)).to(x.dtype)
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss's gate of ``gate_up (..., 2 · inter)``, gate first, rounded once.

    ``g · sigmoid(alpha · g) · (u + 1)`` with g = min(gate, limit) and u between ±limit.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(gate_up.dtype)


def xielu(x: Tensor, alpha_p: float, alpha_n: float, beta: float, eps: float) -> Tensor:
    """Apertus's activation (Huang and Schlag 2024), in float32 at least and rounded once.

    ``alpha_p · x² + beta · x`` if x is positive, else
    ``alpha_n · (exp(min(x, eps)) − 1 − x) + beta · x``.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    below = alpha_n * (torch.expm1(wide.clamp(max=eps)) - wide)
    return (torch.where(wide > 0, alpha_p * wide.square(), below) + beta * wide).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``(layer_norm(x + residual), x + residual)``."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def activate(x: Tensor, activation: Activation) -> Tensor:
    """``activation(x)``, computed in float32 at least and rounded once to the dtype of ``x``.

    Raises ValueError for an activation that does not exist.
    """
    check_activation(activation)
    if activation == "silu":
        return torch.nn.functional.silu(x)
    if activation == "relu2":
        return torch.nn.functional.relu(x).square()
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x, approximate=approximate)


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) · up`` for ``gate_up (..., 2 · inter)``, gate first.

    The activation is rounded to the dtype of ``gate_up`` before the product.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, activation) * up


def rotary_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> None:
    """Rotate ``q`` in place; write rotated ``k`` and ``v`` into the caches (Su et al. 2021).

    q ``(tokens, q_heads, head_dim)``, k and v ``(tokens, kv_heads, head_dim)``; cos and sin
    float32 ``(tokens, rotary_dim)``; caches ``(blocks, kv_heads, block_size, head_dim)``;
    slot_mapping int64 ``(tokens,)``: block · block_size + offset, or −1 to write nothing.

    The first rotary_dim elements of a head are rotated, the others are left as they are. Pair i is
    elements i and i + rotary_dim / 2; or 2i and 2i + 1, if ``interleaved``. Either way entries i
    and i + rotary_dim / 2 of cos and sin are those of its two elements.

    Caches of int8 or float8_e4m3fn come with k_scales and v_scales, float32 ``(blocks, kv_heads,
    block_size)``: each head of each token is scaled so that its largest magnitude becomes the
    dtype's, 127 or 448.
    """
    check_rotary_dim(cos.shape[-1], q.shape[-1])
    block_size = k_cache.shape[2]
    kept = slot_mapping >= 0
    blocks, offsets = slot_mapping[kept] // block_size, slot_mapping[kept] % block_size
    stored = (
        (rotate(k, cos, sin, interleaved)[kept], k_cache, k_scales),
        (v[kept], v_cache, v_scales),
    )
    for values, cache, scales in stored:
        if scales is not None:
            values, scales[blocks, :, offsets] = scaled_to_8_bits(values, cache.dtype)
        cache[blocks, :, offsets] = values.to(cache.dtype)
    q.copy_(rotate(q, cos, sin, interleaved))


def scaled_to_8_bits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values of ``dtype`` and their scale, one for each row of the last dimension."""
    most = 127 if dtype == torch.int8 else 448
    peak = x.float().abs().amax(-1)
    wide = x.float() * torch.where(peak > 0, most / peak, 0.0)[..., None]
    return torch.floor(wide + 0.5) if dtype == torch.int8 else wide, peak / most


def check_rotary_dim(rotary_dim: int, head_dim: int) -> None:
    """Raises ValueError if ``rotary_dim`` is not possible for heads of ``head_dim``."""
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"cos and sin have {rotary_dim} entries for a token: expected an even number, "
            f"at most the head_dim of {head_dim}"
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``x (tokens, heads, head_dim)`` rotated by its positions, as :func:`rotary_store` does it."""
    rotary_dim = cos.shape[-1]
    wide = x[..., :rotary_dim].float()
    low, high = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    (cos_low, cos_high), (sin_low, sin_high) = (t[:, None].chunk(2, dim=-1) for t in (cos, sin))
    turned = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    rotated = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((rotated.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of every sequence's new tokens over its cached keys and values.

    q ``(tokens, q_heads, head_dim)``; caches and scales as in :func:`rotary_store`. Query head h
    reads KV head h // (q_heads / kv_heads). window: each token sees itself and the ``window − 1``
    tokens before it (0: all of them). softcap: a logit becomes ``softcap · tanh(logit / softcap)``
    (Gemma 2; 0: no softcap). sinks ``(q_heads,)``: an extra logit for each query head, which adds
    only to the denominator of the softmax (gpt-oss).

    Returns ``(tokens, q_heads · head_dim)``; a sequence without context only pads the batch,
    and its rows are undefined.
    """
    if sinks is not None:
        check_sinks(sinks, q.shape[1])
    out = torch.empty_like(q)
    starts, block_size = batch.query_start.tolist(), k_cache.shape[2]
    for index, context in enumerate(batch.context_lens.tolist()):
        if context == 0:
            continue
        queries = q[starts[index] : starts[index + 1]]
        blocks = -(-context // block_size)
        # Blocks before the first new token's window are not read.
        unseen = max(0, context - len(queries) - window + 1) // block_size if window else 0
        table = batch.block_tables[index, unseen:blocks].long()
        positions = torch.arange(unseen * block_size, context, device=q.device)

        def gather(
            cache: Tensor,
            scales: Tensor | None,
            table: Tensor = table,
            count: int = len(positions),
        ) -> Tensor:
            wide = cache[table].float()
            if scales is not None:
                wide *= scales[table][..., None]
            return wide.transpose(1, 2).flatten(0, 1)[:count]  # (count, heads, d)

        keys, values = gather(k_cache, k_scales), gather(v_cache, v_scales)
        repeats = q.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries.float(), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        own = positions[-len(queries) :, None]
        visible = positions <= own
        if window:
            visible &= positions > own - window
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.to(scores)[:, None, None].expand(-1, len(queries), 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(-1)[..., : len(positions)]
        out[starts[index] : starts[index + 1]] = torch.einsum("hqk,khd->qhd", weights, values)
    return out.flatten(1)


def latent_store(
    q: Tensor,
    key: Tensor,
    latents: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    scales: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> None:
    """Rotate ``q`` in place; write each rotated ``key`` and its latent as one row of the cache.

    q ``(tokens, heads, rotary_dim)``, key ``(tokens, rotary_dim)``, latents ``(tokens,
    latent_dim)``; cache ``(blocks, 1, block_size, rotary_dim + latent_dim)``. All else is as in
    :func:`rotary_store`. An 8-bit cache has one scale for a row: float32 ``(blocks, 1,
    block_size)``.
    """
    check_rotary_dim(cos.shape[-1], q.shape[-1])
    kept = slot_mapping >= 0
    turned = rotate(key[:, None], cos, sin, interleaved)[:, 0]
    slots, rows = slot_mapping[kept], torch.cat((turned, latents), dim=-1)[kept]
    if scales is not None:
        rows, found = scaled_to_8_bits(rows, cache.dtype)
        scales.view(-1)[slots] = found
    cache.view(-1, cache.shape[-1])[slots] = rows.to(cache.dtype)
    q.copy_(rotate(q, cos, sin, interleaved))


def latent_attention(
    q: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    latent_dim: int,
    scales: Tensor | None = None,
) -> Tensor:
    """What each head attends to, in latents: :func:`paged_attention` without expanded values.

    q ``(tokens, heads, rotary_dim + latent_dim)``; cache and scales as in :func:`latent_store`. All
    heads read the same rows: whole ones as keys, and their latents as values.

    Returns ``(tokens, heads, latent_dim)``.
    """
    out = paged_attention(q, cache, cache, batch, scale, 0, scales, scales)
    return out.view(q.shape)[..., -latent_dim:]


def check_sinks(sinks: Tensor, q_heads: int) -> None:
    """Raises ValueError if ``sinks`` are not contiguous floats, one for each query head."""
    if sinks.shape != (q_heads,) or not sinks.is_contiguous() or not sinks.is_floating_point():
        raise ValueError(
            f"sinks are {sinks.dtype} {tuple(sinks.shape)} with strides {sinks.stride()}, "
            f"expected contiguous numbers ({q_heads},)"
        )


class TokenChoice(NamedTuple):
    """How a row's token is chosen: see :func:`sample_tokens`.

    uniform: a number in [0, 1), which the token is drawn with.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


def sample_tokens(logits: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
    """A token for every row of ``logits`` (float32 ``(rows, vocab)``): int64 ``(rows,)``.

    Temperature 0 takes the largest logit. Otherwise the candidates are filtered by top_k (0: off),
    then top_p, then min_p (relative to the likeliest token). Entries equal to the last one kept are
    kept too. The token is drawn by inverting the cumulative distribution, in vocabulary order, at
    ``uniform``. For a row whose largest logit is not finite, the token is arbitrary.
    """
    tokens = [_sample(row, choice) for row, choice in zip(logits, choices, strict=True)]
    return torch.stack(tokens)


# Nucleus sampling looks at this many candidates first, then at eight times as many, and so on.
_NUCLEUS_CANDIDATES = 1024


def _sample(logits: Tensor, choice: TokenChoice) -> Tensor:
    if choice.temperature == 0 or not logits.amax().isfinite():
        return logits.argmax()
    probs = torch.softmax(logits / choice.temperature, dim=-1)
    ids: Tensor | None = None
    if 0 < choice.top_k < len(probs):
        top = probs.topk(choice.top_k + 1)
        ids = _at_least(probs, top.values[-2], top.values, top.indices)
        probs = probs[ids]
    if choice.top_p < 1:
        kept = _nucleus(probs, choice.top_p)
        probs, ids = probs[kept], kept if ids is None else ids[kept]
    if choice.min_p > 0:
        kept = (probs >= choice.min_p * probs.max()).nonzero()[:, 0]
        probs, ids = probs[kept], kept if ids is None else ids[kept]
    # float64, because a float32 sum over a large vocabulary misplaces its tail.
    cumulative = probs.double().cumsum(0)
    # `right` finds the first entry above the target, so that no token of probability 0 is chosen.
    target = choice.uniform * cumulative[-1:]
    index = torch.searchsorted(cumulative, target, right=True)[0]
    if index == len(probs):  # the product rounded up to the total
        index = probs.nonzero()[-1, 0]
    return index if ids is None else ids[index]


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Ids of the fewest likeliest entries whose sum reaches ``top_p`` of the total, in order."""
    needed = top_p * probs.sum()
    count = min(_NUCLEUS_CANDIDATES, len(probs))
    while True:
        values, ids = probs.topk(count)
        cumulative = values.cumsum(0)
        if count == len(probs) or cumulative[-1] >= needed:
            # An entry is kept if the entries before it do not reach top_p yet.
            kept = int((cumulative - values < needed).sum())
            return _at_least(probs, values[max(kept, 1) - 1], values, ids)
        count = min(8 * count, len(probs))


def _at_least(probs: Tensor, least: Tensor, top: Tensor, top_ids: Tensor) -> Tensor:
    """Ids with ``probs >= least``, in order; ``top``: the largest of ``probs``, sorted."""
    if len(top) == len(probs) or top[-1] < least:  # all of them are among the largest
        return top_ids[top >= least].sort().values
    return (probs >= least).nonzero()[:, 0]
