"""Random problems for the emulated kernels: what a seed draws, and its reference's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import torch
from checks import BLOCK, CPU, Found, lora_add
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nybble.kernels import PackedWeight, reference
from nybble.kernels.activation import ACTIVATIONS
from nybble.kernels.bench.gpu_lora import adapters
from nybble.kernels.bench.gpu_section import in_8_bits, paged
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles
from nybble.kernels.reference import TokenChoice
from nybble.kernels.triton import attention, dequantize, matmul, rotary, sampling, tune
from nybble.kernels.triton.configs import Config, default_config
from nybble.loaders.formats.codebook import LEVELS

HALVES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 48, 64, 64, 80, 80, 96, 96, 112, 128, 128, 256, 256, 256)


def draw_weight(pick: Random, out: int, columns: int) -> tuple[str, PackedWeight]:
    """A weight of any kind the loaders make, and its description."""
    kind = pick.choice(("symmetric", "zeros", "nf4", "fp4", "levels"))
    group = pick.choice((16, 32, 64, 128, columns))
    groups = -(-columns // group)
    levels = {
        "symmetric": SYMMETRIC_LEVELS,
        "zeros": INTEGER_LEVELS,
        "levels": torch.rand(16) - 0.5,
    }
    dtype = pick.choice((torch.float16, torch.bfloat16, torch.float32))
    permuted, biased = pick.random() < 0.3, pick.random() < 0.5
    weight = PackedWeight(
        qweight=pack_nibbles(torch.randint(0, 16, (out, columns)).to(torch.uint8)),
        scales=(torch.rand(out, groups) / 16 + 0.01).to(dtype),
        zeros=(torch.rand(out, groups) * 24 - 4).to(dtype) if kind == "zeros" else None,
        levels={**LEVELS, **levels}[kind],
        out_features=out,
        in_features=columns,
        group_size=group,
        perm=torch.randperm(columns).int() if permuted else None,
        bias=torch.randn(out).to(pick.choice(HALVES)) if biased else None,
    )
    name = f"{kind} g{group} scales {str(dtype)[6:]} perm {permuted} bias {biased} {columns}→{out}"
    return name, weight


def draw_config(pick: Random, rows: int, capability: int) -> tuple[Config, Config]:
    """The rule's for some size of weight, and one up to three of the tuner's changes away."""
    size = (pick.choice((1024, 4096, 22016)), pick.choice((1024, 4001, 11008)))
    ruled = default_config(rows, *size, processors=132, capability=capability)
    changed = ruled
    for _ in range(pick.choice((0, 0, 1, 2, 3))):
        changed = pick.choice(list(tune.neighbours(changed)))
    return ruled, changed


def draw_matmul(pick: Random, capability: int) -> Iterator[Found]:
    rows = pick.choice((pick.randint(1, 8), pick.randint(9, 64), pick.randint(65, 300)))
    columns = pick.choice((128 * pick.randint(1, 6), pick.randint(33, 700)))
    out = pick.choice((16 * pick.randint(2, 20), pick.randint(17, 300)))
    kind, weight = draw_weight(pick, out, columns)
    gated = out % 16 == 0 and pick.random() < 0.5
    laid_out = weight.to_layout("gpu_gated_tiles" if gated else "gpu_tiles")
    ruled, config = draw_config(pick, rows, capability)
    dtype = pick.choice(HALVES)
    x = torch.randn(rows, columns).to(dtype)
    expected = x.double() @ weight.dequantize(torch.float64).T
    if weight.bias is not None:
        expected += weight.bias.double()
    name = f"{kind} {str(dtype)[6:]} m{rows} {laid_out.layout} {config}"
    try:
        found = matmul.packed_matmul(x, laid_out, config)
    except OutOfResources:
        if config == ruled:
            raise
        return  # the tuner passes over it
    yield name, found, expected
    if gated:
        kind = pick.choice(ACTIVATIONS)
        halves = matmul.packed_matmul(x, laid_out, config, kind)
        yield f"{name} {kind}", halves, reference.gated(found.double(), kind)


def draw_dequantize(pick: Random, capability: int) -> Iterator[Found]:
    kind, weight = draw_weight(pick, 16 * pick.randint(1, 20), pick.randint(33, 700))
    layout = pick.choice(("gpu_tiles", "gpu_gated_tiles"))
    dtype = pick.choice(HALVES)
    found = dequantize.dequantize(weight.to_layout(layout), dtype)
    stored = replace(weight, perm=None).dequantize(torch.float64)
    yield f"dequantize {kind} {layout} {str(dtype)[6:]}", found, stored


def draw_lengths(pick: Random) -> list[tuple[int, int]]:
    """A batch of (context, new tokens): one token after a context, a prompt, a piece of one."""
    if pick.random() < 0.1:  # more sequences than the kernels' smallest table holds
        return [(pick.randint(2, 40), pick.choice((1, 1, 2))) for _ in range(pick.randint(17, 24))]
    lengths = []
    for _ in range(pick.randint(1, 4)):
        context = pick.choice((pick.randint(1, 40), pick.randint(40, 300), pick.randint(300, 700)))
        lengths.append((context, pick.choice((1, 1, min(context, pick.randint(2, 70))))))
    return lengths


def draw_attention(pick: Random, capability: int) -> Iterator[Found]:
    dim, group = pick.choice(HEAD_DIMS), pick.choice((1, 1, 2, 4, 5, 7, 8, 12))
    kv_heads, lengths = pick.choice((1, 2)), draw_lengths(pick)
    window = pick.choice((0, 0, pick.randint(1, 250)))
    dtype = pick.choice(HALVES)
    caches = [None, torch.int8] + ([torch.float8_e4m3fn] if capability >= 89 else [])
    cache = pick.choice(caches)
    batch, keys, values = paged(lengths, kv_heads, dim, dtype, CPU)
    scales: list[Tensor] = []
    if cache is not None:
        keys, values, *scales = in_8_bits(keys, cache)
    fused = torch.randn(sum(n for _, n in lengths), (group + 2) * kv_heads, dim).to(dtype)
    q = fused[:, : group * kv_heads]
    inputs = (batch, dim**-0.5, window, *scales)
    wide = (keys, values) if scales else (keys.double(), values.double())
    softcap = pick.choice((0.0, 0.0, 0.5 + pick.random()))
    sinks = torch.randn(group * kv_heads) if pick.random() < 0.3 else None
    options = {"softcap": softcap, "sinks": sinks}
    expected = reference.paged_attention(q.double(), *wide, *inputs, **options)
    name = f"attention {group}×{kv_heads}×{dim} {str(dtype)[6:]} {cache} window {window} {lengths}"
    name += f" cap {softcap:.1f}" * (softcap > 0) + " sinks" * (sinks is not None)
    yield name, attention.paged_attention(q, keys, values, *inputs, **options), expected


def draw_rotary(pick: Random, capability: int) -> Iterator[Found]:
    dim, heads, kv_heads = pick.choice(HEAD_DIMS), pick.randint(1, 9), pick.randint(1, 4)
    tokens, dtype = pick.randint(1, 20), pick.choice(HALVES)
    slots = torch.randperm(4 * BLOCK)[:tokens]
    slots[torch.rand(tokens) < 0.2] = -1
    fused, angle = (
        torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype),
        torch.randn(tokens, pick.choice((dim, dim, 2 * pick.randint(1, dim // 2)))),
    )
    interleaved = pick.random() < 0.3
    results = []
    for function in (rotary.rotary_store, reference.rotary_store):
        q, k, v = torch.split(fused.clone(), [heads, kv_heads, kv_heads], dim=1)
        caches = torch.zeros(2, 4, kv_heads, BLOCK, dim).to(dtype)
        options = {"interleaved": interleaved}
        function(q, k, v, angle.cos(), angle.sin(), *caches, slots, **options)
        results.append(torch.cat((q.flatten(), caches.flatten())))
    turned = f"{angle.shape[1]}{' interleaved' if interleaved else ''}"
    name = f"rotary_store {heads}+2·{kv_heads}×{dim} {turned} {str(dtype)[6:]} {tokens} tokens"
    yield name, results[0], results[1].double()


def draw_lora(pick: Random, capability: int) -> Iterator[Found]:
    dtype, rank, count = pick.choice(HALVES), pick.randint(1, 64), pick.randint(1, 8)
    inputs, rows = pick.randint(16, 1500), pick.randint(1, 100)
    offsets = [0]
    for _ in range(pick.randint(1, 3)):
        offsets.append(offsets[-1] + pick.randint(1, 150))
    ranks = [pick.randint(0, rank) for _ in range(count)]
    given = adapters(count, rank, inputs, tuple(offsets), dtype, CPU, ranks)
    slots = [pick.randint(-1, count - 1) for _ in range(rows - 1)] + [pick.randrange(count)]
    batch = LoRABatch.of(slots, CPU)
    assert batch is not None
    x, out = torch.randn(rows, inputs).to(dtype), torch.randn(rows, offsets[-1]).to(dtype)
    expected = out.double()
    reference.lora_add(expected, x.double(), given, batch)
    lora_add(out, x, given, batch)
    name = f"lora_add {str(dtype)[6:]} {inputs}→{offsets} ranks {ranks} slots {slots}"
    yield name, out, expected


def draw_sampling(pick: Random, capability: int) -> Iterator[Found]:
    rows, vocab = pick.randint(1, 8), pick.choice((pick.randint(2, 300), pick.randint(300, 15000)))
    logits = pick.uniform(0.5, 6) * torch.randn(rows, vocab)
    if pick.random() < 0.5:
        logits = logits.bfloat16().float()  # many alike
    if pick.random() < 0.3:
        logits[:, : vocab // 2] = -torch.inf
    choices = [
        TokenChoice(
            temperature=pick.choice((0.0, pick.uniform(0.1, 2), pick.uniform(0.1, 2))),
            top_k=pick.choice((0, pick.randint(1, 200), pick.randint(1, 4000))),
            top_p=pick.choice((1.0, pick.uniform(0.05, 0.99))),
            min_p=pick.choice((0.0, pick.uniform(0.0, 0.3))),
            uniform=pick.random(),
        )
        for _ in range(rows)
    ]
    found = sampling.sample_tokens(logits, choices)
    expected = reference.sample_tokens(logits, choices)
    yield f"sampling of {vocab} {choices}", found.float() + 1, expected.double() + 1


# Those with more to vary come up more often.
DRAWS: dict[str, Callable[[Random, int], Iterator[Found]]] = {
    "matmul": draw_matmul,
    "dequantize": draw_dequantize,
    "attention": draw_attention,
    "rotary": draw_rotary,
    "lora": draw_lora,
    "sampling": draw_sampling,
}
WEIGHTS = {"matmul": 4, "attention": 4, "lora": 2}
