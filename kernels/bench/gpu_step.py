"""Everything of a decode step but the matmul, and the whole step, on a GPU in one run.

    python kernels/bench/gpu_step.py [--minutes 6] [--out DIR] [--dry-run]

Checks come first and a failed one ends the run with exit code 1: norms, rotary, attention, LoRA
and sampling against float64, and a captured decode step against an uncaptured one. Then

* decode attention over contexts and batches: KV bytes a second against the copy bandwidth;
* LoRA of rank 16 on every projection of a Llama-2-13B layer, 32 adapters in a batch of 32, against
  the same 4-bit matmuls without;
* decode of a Llama-2-13B-shaped 4-bit model made on the device, through the engine's runner and
  sampler as when serving: tokens a second and the share of (weight + KV bytes) / bandwidth.

Times are medians of CUDA graph replays, the last table's of whole steps by the clock.
`--dry-run` takes tiny sizes through Triton's interpreter on the CPU: every line of this file but no
meaningful time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import torch
import triton
from nybble.engine.config import EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.graphs import cuda_capture
from nybble.engine.request import Request, SamplingParams
from nybble.engine.runner import ModelRunner, kv_bytes_per_block
from nybble.engine.sampler import SequenceSampler, sample
from nybble.engine.scheduler import ScheduledSequence
from nybble.engine.sequence import Sequence
from nybble.kernels import DenseWeight, PackedWeight, reference
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.lora import slot_buffers
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.matmul import linear
from nybble.kernels.packed import SYMMETRIC_LEVELS
from nybble.kernels.reference import TokenChoice
from nybble.kernels.triton import attention, lora, norm, rotary, sampling, timing
from nybble.kernels.triton.warmup import warmup
from torch import Tensor
from transformers import LlamaConfig

BLOCK = 16
# Largest relative error against float64 that rounding explains; the interpreter truncates.
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LLAMA_2_13B: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Checks:
    """Collects what failed, printing each result."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def close(self, name: str, found: Tensor, expected: Tensor) -> None:
        measured = error(found, expected)
        self.holds(f"{name}: error {measured:.1e}", measured <= LIMIT[found.dtype])

    def holds(self, name: str, condition: bool) -> None:
        print(f"  {name} {'ok' if condition else 'WRONG'}", flush=True)
        if not condition:
            self.failed.append(name)


def paged(
    lengths: list[tuple[int, int]],
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[AttentionBatch, Tensor, Tensor]:
    """A batch of (context, new tokens) over scattered blocks of random keys and values."""
    counts = [-(-context // BLOCK) for context, _ in lengths]
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    for row, blocks in enumerate(torch.split(torch.randperm(sum(counts)), counts)):
        tables[row, : len(blocks)] = blocks
    new = [count for _, count in lengths]
    batch = AttentionBatch(
        query_start=torch.tensor([0, *new]).cumsum(0).int().to(device),
        context_lens=torch.tensor([c for c, _ in lengths], dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slot_mapping=torch.full((sum(new),), -1, device=device),
        max_query=max(new),
    )
    shape = (sum(counts), kv_heads, BLOCK, dim)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    return batch, keys, values


def check_kernels(checks: Checks, device: torch.device, dry: bool) -> None:
    for dtype in (torch.float16,) if dry else (torch.float16, torch.bfloat16):
        random = partial(torch.randn, dtype=dtype, device=device)
        name = str(dtype)[6:]
        x, residual, weight = random(7, 1000), random(7, 1000), random(1000)
        wide = reference.rms_norm((x + residual).double(), weight.double(), 1e-5)
        checks.close(f"{name} add_rms_norm", norm.add_rms_norm(x, residual, weight, 1e-5)[0], wide)
        checks.close(f"{name} silu_mul", norm.silu_mul(x), reference.silu_mul(x.double()))
        for q_heads, kv_heads, dim in ((4, 2, 64),) if dry else ((40, 40, 128), (14, 2, 64)):
            fused = random(9, q_heads + 2 * kv_heads, dim)
            angle = torch.randn(9, dim, device=device)
            slots = torch.tensor([5, -1, 40, 41, 0, 7, 8, 63, 20], device=device)
            results = []
            for function in (reference.rotary_store, rotary.rotary_store):
                q, k, v = torch.split(fused.clone(), [q_heads, kv_heads, kv_heads], dim=1)
                caches = torch.zeros(2, 4, kv_heads, BLOCK, dim, dtype=dtype, device=device)
                function(q, k, v, angle.cos(), angle.sin(), caches[0], caches[1], slots)
                results.append(torch.cat((q.flatten(), caches.flatten())))
            checks.close(f"{name} rotary_store {q_heads}/{kv_heads}×{dim}", results[1], results[0])
            lengths = [(1, 1), (300, 1), (270, 40), (33, 33)]
            if not dry:
                lengths += [(5000, 1), (4097, 1), (2500, 700), (9, 2)]
            batch, keys, values = paged(lengths, kv_heads, dim, dtype, device)
            q = random(sum(n for _, n in lengths), q_heads, dim)
            for window in (0, 100):
                expected = reference.paged_attention(
                    q.double(), keys.double(), values.double(), batch, dim**-0.5, window
                )
                # The allocator hands the same block to the next tensor of this size.
                poison = torch.full(
                    (len(q), q_heads * dim), float("nan"), dtype=dtype, device=device
                )
                del poison
                found = attention.paged_attention(q, keys, values, batch, dim**-0.5, window)
                label = f"{name} attention {q_heads}/{kv_heads}×{dim} window {window}"
                checks.close(label, found, expected)
                again = attention.paged_attention(q, keys, values, batch, dim**-0.5, window)
                checks.holds(f"{label}: twice the same", torch.equal(found, again))
        check_int8(checks, dtype, device)
        check_lora(checks, dtype, device, dry)
    check_sampling(checks, device, dry)


def int8_caches(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random integers and scales in place of 16-bit caches of this shape."""
    made = [
        torch.randint(-127, 128, keys.shape, dtype=torch.int8, device=keys.device) for _ in range(2)
    ]
    scales = [torch.rand(keys.shape[:3], device=keys.device) / 60 for _ in range(2)]
    return made[0], made[1], scales[0], scales[1]


def check_int8(checks: Checks, dtype: torch.dtype, device: torch.device) -> None:
    lengths = [(300, 1), (70, 40), (1, 1)]
    batch, shaped, _ = paged(lengths, 2, 64, dtype, device)
    keys, values, *scales = int8_caches(shaped)
    q = torch.randn(42, 8, 64, dtype=dtype, device=device)
    found = attention.paged_attention(q, keys, values, batch, 0.1, 0, *scales)
    expected = reference.paged_attention(q.double(), keys, values, batch, 0.1, 0, *scales)
    checks.close(f"{str(dtype)[6:]} attention over int8 caches", found, expected)
    fused = torch.randn(9, 8 + 4, 64, dtype=dtype, device=device)
    angle = torch.randn(9, 64, device=device)
    slots = torch.randperm(40)[:9].to(device)
    stored = []
    for function in (reference.rotary_store, rotary.rotary_store):
        q, k, v = torch.split(fused.clone(), [8, 2, 2], dim=1)
        caches = torch.zeros(2, 4, 2, BLOCK, 64, dtype=torch.int8, device=device)
        scale = torch.zeros(2, 4, 2, BLOCK, device=device)
        function(q, k, v, angle.cos(), angle.sin(), caches[0], caches[1], slots, scale[0], scale[1])
        stored.append((caches.float() * scale[..., None]).bfloat16())
    checks.close(f"{str(dtype)[6:]} rotary_store to int8", stored[1], stored[0])


def check_lora(checks: Checks, dtype: torch.dtype, device: torch.device, dry: bool) -> None:
    inputs, outputs = (70, (40, 24, 24)) if dry else (5120, (5120, 1024, 1024))
    offsets = (0, outputs[0], sum(outputs[:2]), sum(outputs))
    a, b, ranks = adapters(5, 20, inputs, offsets, dtype, device)
    ranks[0], ranks[3] = 0, 7
    slots = [row % 6 - 1 for row in range(20 if dry else 70)]
    batch = LoRABatch.of(slots, device)
    assert batch is not None
    x = torch.randn(len(slots), inputs, dtype=dtype, device=device)
    out = torch.randn(len(slots), offsets[-1], dtype=dtype, device=device)
    found, expected = out.clone(), out.double()
    lora.lora_add(found, x, a, b, ranks, offsets, batch)
    for row, slot in enumerate(slots):
        rank = int(ranks[slot]) if slot >= 0 else 0
        for part, (start, end) in enumerate(pairwise(offsets)):
            h = a[slot, part * 20 : part * 20 + rank].double() @ x[row].double()
            expected[row, start:end] += b[slot, start:end, :rank].double() @ h
    checks.close(f"{str(dtype)[6:]} lora_add", found, expected)
    together = found[2:3].clone()
    alone, one = out[2:3].clone(), LoRABatch.of([slots[2]], device)
    assert one is not None
    lora.lora_add(alone, x[2:3], a, b, ranks, offsets, one)
    checks.holds("lora_add: a row alone as in its batch", torch.equal(alone, together))


def check_sampling(checks: Checks, device: torch.device, dry: bool) -> None:
    rows, vocab = (6, 700) if dry else (256, 151936)
    logits = 4 * torch.randn(rows, vocab, device=device).bfloat16().float()
    options = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 50, 0.9, 0.0), (1.2, 0, 0.95, 0.05)]
    choices = [TokenChoice(*options[row % 4], (row + 0.5) / rows) for row in range(rows)]
    found = sampling.sample_tokens(logits, choices).cpu()
    expected = reference.sample_tokens(logits.cpu(), choices)
    # A number at the border of two tokens may fall either way by rounding.
    share = float((found != expected).float().mean())
    checks.holds(f"sampling: {share:.1%} of tokens differ from the reference", share <= 0.02)
    again = sampling.sample_tokens(logits[5:6], choices[5:6]).cpu()
    checks.holds("sampling: a row alone as in its batch", torch.equal(again, found[5:6]))


def adapters(
    count: int,
    rank: int,
    inputs: int,
    offsets: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    a, b = slot_buffers(count, rank, inputs, offsets, dtype, device)
    a.copy_(torch.randn(a.shape, device=device) * inputs**-0.5)
    b.copy_(torch.randn(b.shape, device=device))
    return a, b, torch.full((count,), rank, dtype=torch.int32, device=device)


def time_attention(
    device: torch.device, read: float, deadline: float, dry: bool
) -> list[dict[str, Any]]:
    """Decode attention: bytes of keys and values over the time of one layer."""
    models = {
        "Llama-3-8B 32/8×128, bf16": (32, 8, 128, False),
        "Llama-2-13B 40/40×128, bf16": (40, 40, 128, False),
        "Llama-3-8B 32/8×128, int8": (32, 8, 128, True),
    }
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    batches: tuple[int, ...] = (1, 8, 32, 64)
    most, cached = 9 << 30, 200 << 20
    if dry:
        models, contexts, batches = {"tiny 4/2×64": (4, 2, 64, False)}, (300,), (1, 3)
        most, cached = 6 << 20, 1
    results = []
    for label, (q_heads, kv_heads, dim, quantized) in models.items():
        print(f"decode attention, {label}: µs (share of the copy bandwidth)")
        print(f"{'batch':>7}", *(f"{context:>14}" for context in contexts))
        for size in batches:
            cells = []
            for context in contexts:
                nbytes = 2 * size * context * kv_heads * (dim + 4 if quantized else 2 * dim)
                if nbytes > most or time.monotonic() > deadline:
                    cells.append(f"{'–':>14}")
                    continue
                calls: list[timing.Call] = []
                for _ in range(min(24, max(1, -(-cached // nbytes)))):
                    dtype = torch.float16 if dry else torch.bfloat16
                    batch, keys, values = paged([(context, 1)] * size, kv_heads, dim, dtype, device)
                    scales: list[Tensor] = []
                    if quantized:
                        keys, values, *scales = int8_caches(keys)
                    q = torch.randn(size, q_heads, dim, dtype=dtype, device=device)
                    arguments = (q, keys, values, batch, dim**-0.5, 0, *scales)
                    calls.append(partial(attention.paged_attention, *arguments))
                taken = timing.milliseconds(calls) / 1e3
                share = nbytes / read / taken
                cells.append(f"{1e6 * taken:>8.1f} ({share:>3.0%})")
                results.append(
                    {"model": label, "batch": size, "context": context, "s": taken, "share": share}
                )
                del calls
            print(f"{size:>7}", *cells, flush=True)
    return results


def sweep_decode(device: torch.device, read: float, dry: bool) -> list[dict[str, Any]]:
    """Other tiles, stages and programs for decode attention: the share of the copy bandwidth."""
    sizes = ((4, 2, 64, 1, 300),) if dry else ((32, 8, 128, 1, 16384), (32, 8, 128, 32, 4096))
    chosen = (attention.DECODE_TILE, attention.DECODE_STAGES, attention.PROGRAMS_PER_SM)
    options = [chosen, (32, 3, 2)] if dry else list(product((32, 64, 128), (3, 5), (2, 3, 4)))
    dtype = torch.float16 if dry else torch.bfloat16
    results = []
    for q_heads, kv_heads, dim, size, context in sizes:
        nbytes = 4 * size * context * kv_heads * dim
        calls: list[timing.Call] = []
        for _ in range(1 if dry else max(1, -(-(200 << 20) // nbytes))):
            batch, keys, values = paged([(context, 1)] * size, kv_heads, dim, dtype, device)
            q = torch.randn(size, q_heads, dim, dtype=dtype, device=device)
            calls.append(partial(attention.paged_attention, q, keys, values, batch, dim**-0.5))
        found = []
        for option in options:
            attention.DECODE_TILE, attention.DECODE_STAGES, attention.PROGRAMS_PER_SM = option
            try:
                taken = timing.milliseconds(calls) / 1e3
            except triton.runtime.errors.OutOfResources:
                continue
            found.append((nbytes / read / taken, option))
        attention.DECODE_TILE, attention.DECODE_STAGES, attention.PROGRAMS_PER_SM = chosen
        best = ", ".join(f"{option} {share:.0%}" for share, option in sorted(found)[::-1][:4])
        used = next((share for share, option in found if option == chosen), float("nan"))
        print(
            f"decode attention, batch {size}, context {context}, "
            f"(tile, stages, programs per multiprocessor): {best}; in use {chosen} {used:.0%}",
            flush=True,
        )
        results += [{"batch": size, "context": context, "option": o, "share": s} for s, o in found]
    return results


def time_prefill(device: torch.device, rate: float, dry: bool) -> list[dict[str, Any]]:
    """Causal attention of one prompt: operations a second over the matrix rate."""
    q_heads, kv_heads, dim = (4, 2, 64) if dry else (32, 8, 128)
    dtype = torch.float16 if dry else torch.bfloat16
    print(f"prefill attention, {q_heads}/{kv_heads}×{dim}: µs (share of the bf16 matrix rate)")
    results = []
    for context, new in ((40, 40),) if dry else ((2048, 2048), (8192, 8192), (8192, 512)):
        batch, keys, values = paged([(context, new)], kv_heads, dim, dtype, device)
        q = torch.randn(new, q_heads, dim, dtype=dtype, device=device)
        call = partial(attention.paged_attention, q, keys, values, batch, dim**-0.5)
        taken = timing.milliseconds([call]) / 1e3
        pairs = new * (context - new) + new * (new + 1) / 2
        share = 4 * q_heads * dim * pairs / rate / taken
        print(f"  context {context}, new {new}: {1e6 * taken:.1f} ({share:.0%})", flush=True)
        results.append({"context": context, "new": new, "s": taken, "share": share})
    return results


def random_packed(inputs: int, outputs: int, device: torch.device) -> PackedWeight:
    """Random symmetric 4-bit codes in groups of 128, with the variance of a trained layer."""
    groups = -(-inputs // 128)
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = torch.rand(outputs, groups, device=device) * 0.1 + 0.17
    return PackedWeight(
        qweight=codes,
        scales=(scales * inputs**-0.5).half(),
        zeros=None,
        levels=SYMMETRIC_LEVELS.to(device),
        out_features=outputs,
        in_features=inputs,
        group_size=128,
    )


def time_lora(device: torch.device, read: float, dry: bool) -> dict[str, float]:
    """One layer's projections for a batch, with and without a different adapter in every row."""
    shape = TINY if dry else LLAMA_2_13B
    hidden, inter = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    rows, rank = (4, 8) if dry else (32, 16)
    dtype = torch.float16 if dry else torch.bfloat16
    batch = LoRABatch.of(list(range(rows)), device)
    assert batch is not None
    plain: list[Callable[[], object]] = []
    adapted: list[Callable[[], object]] = []
    weight_bytes = adapter_bytes = 0
    parts = {
        "qkv": (hidden, (hidden, kv, kv)),
        "o": (hidden, (hidden,)),
        "gate_up": (hidden, (inter, inter)),
        "down": (inter, (hidden,)),
    }
    layout = "rows" if dry else "gpu_tiles"
    for inputs, outputs in parts.values():
        offsets = tuple(sum(outputs[:part]) for part in range(len(outputs) + 1))
        weight = random_packed(inputs, offsets[-1], device).to_layout(layout)  # type: ignore[arg-type]
        a, b, ranks = adapters(rows, rank, inputs, offsets, dtype, device)
        x = torch.randn(rows, inputs, dtype=dtype, device=device)
        weight_bytes += weight.nbytes
        adapter_bytes += a.nbytes + b.nbytes

        def without(x: Tensor = x, weight: PackedWeight = weight) -> Tensor:
            return linear(x, weight)

        def with_(
            x: Tensor = x,
            weight: PackedWeight = weight,
            rest: tuple[Any, ...] = (a, b, ranks, offsets, batch),
        ) -> None:
            lora.lora_add(linear(x, weight), x, *rest)

        plain.append(without)
        adapted.append(with_)
    base = timing.milliseconds(plain) * len(plain) / 1e3
    full = timing.milliseconds(adapted) * len(adapted) / 1e3
    print(
        f"LoRA rank {rank}, {rows} adapters in a batch of {rows}, one layer's projections: "
        f"{1e6 * base:.1f} µs without, {1e6 * full:.1f} with (+{full / base - 1:.0%}); "
        f"the adapters' bytes alone are +{adapter_bytes / weight_bytes:.0%} of the weights' and "
        f"take {1e6 * adapter_bytes / read:.1f} µs at the copy bandwidth",
        flush=True,
    )
    return {"base": base, "adapted": full, "weights": weight_bytes, "adapters": adapter_bytes}


def random_decoder(
    shape: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[Decoder, int]:
    """A 4-bit decoder of random weights, made where it stays; and the bytes a step reads of it."""
    config = LlamaConfig(**shape)
    hidden, inter = config.hidden_size, config.intermediate_size
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    dense = partial(torch.randn, dtype=dtype, device=device)
    total = 0

    def weights() -> Iterator[tuple[str, PackedWeight | DenseWeight | Tensor]]:
        nonlocal total
        yield "model.embed_tokens.weight", dense(config.vocab_size, hidden)
        yield "model.norm.weight", torch.ones(hidden, dtype=dtype, device=device)
        head = DenseWeight(dense(config.vocab_size, hidden) * hidden**-0.5)
        total += head.weight.nbytes
        yield "lm_head", head
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            ones = torch.ones(hidden, dtype=dtype, device=device)
            yield prefix + "input_layernorm.weight", ones
            yield prefix + "post_attention_layernorm.weight", ones.clone()
            for name, inputs, outputs in (
                ("self_attn.qkv_proj", hidden, hidden + 2 * kv),
                ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_up_proj", hidden, 2 * inter),
                ("mlp.down_proj", inter, hidden),
            ):
                packed = random_packed(inputs, outputs, device)
                total += packed.nbytes
                yield prefix + name, packed

    length = int(config.max_position_embeddings)
    decoder = Decoder(config, weights(), device=device, dtype=dtype, max_model_len=length)
    return decoder, total


class Recomputed:
    """Stands in for a CUDA graph in the dry run."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function, self.out = function, function()

    def replay(self) -> None:
        self.out.copy_(self.function())


def dry_capture(function: Callable[[], Tensor]) -> tuple[Recomputed, Tensor]:
    captured = Recomputed(function)
    return captured, captured.out


def sequences(count: int, context: int, room: int, vocab: int) -> list[Sequence]:
    """Greedy sequences in mid-decode: the cache holds all but the last token."""
    found, params = [], SamplingParams(temperature=0, ignore_eos=True)
    for index in range(count):
        prompt = tuple(torch.randint(0, vocab, (context,)).tolist())
        sampler = SequenceSampler(params, prompt)
        made = Sequence(Request(str(index), prompt, params), room, None, sampler)  # type: ignore[arg-type]
        made.num_computed_tokens = context - 1
        per = -(-(context + room) // BLOCK)
        made.blocks = list(range(index * per, (index + 1) * per))
        found.append(made)
    return found


def step(runner: ModelRunner, running: list[Sequence]) -> list[int]:
    """One decode step as the engine does it, without its streams."""
    batch = [ScheduledSequence(sequence, 1) for sequence in running]
    logits = runner.run(batch)
    tokens = [token for token, _ in sample(logits, [sequence.sampler for sequence in running])]
    for sequence, token in zip(running, tokens, strict=True):
        sequence.num_computed_tokens += 1
        sequence.token_ids.append(token)
    return tokens


@torch.inference_mode()
def time_decode(
    checks: Checks, device: torch.device, read: float, deadline: float, dry: bool
) -> list[dict[str, Any]]:
    shape, sizes, context, steps = (
        (TINY, (1, 4), 40, 3) if dry else (LLAMA_2_13B, (1, 8, 32, 64), 512, 40)
    )
    dtype = torch.float32 if dry else torch.bfloat16
    start = time.monotonic()
    decoder, weight_bytes = random_decoder(shape, dtype, device)
    largest = max(sizes)
    config = EngineConfig(
        device=device.type, dtype=dtype, max_num_seqs=largest, max_batched_tokens=max(64, largest)
    )
    room = 2 * steps + 16
    blocks = largest * -(-(context + room) // BLOCK)
    runner = ModelRunner(decoder, config, blocks)
    for keys, values in runner.caches:
        keys.normal_()
        values.normal_()
    if not dry:
        warmup(decoder.packed_weights(), dtype, largest)
    eager = sequences(3, context, room, shape["vocab_size"])
    expected = [step(runner, eager) for _ in range(3)]
    capture = dry_capture if dry else cuda_capture(device)
    runner.capture(capture, progress=False, sizes=sorted({*sizes, 4}))
    captured = sequences(3, context, room, shape["vocab_size"])
    for ours, theirs in zip(captured, eager, strict=True):
        ours.token_ids[:] = theirs.token_ids[:context]
    found = [step(runner, captured) for _ in range(3)]
    # Padding may pick another matmul, so tokens can differ where two are nearly as likely.
    same = sum(
        a == b for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True)
    )
    checks.holds(f"captured decode step: {same} of 9 tokens as without capture", same >= 8)
    print(f"model made and captured in {time.monotonic() - start:.0f} s", flush=True)
    print(f"decode, {'tiny' if dry else 'Llama-2-13B, 4 bits, group 128'}, context {context}:")
    print(f"{'batch':>7}{'ms a step':>12}{'tokens/s':>12}{'floor ms':>12}{'share':>8}")
    per_token = kv_bytes_per_block(decoder.shape, config) // config.block_size
    results = []
    for size in sizes:
        if time.monotonic() > deadline:
            print("out of time")
            break
        running = sequences(size, context, room, shape["vocab_size"])
        taken = []
        for _ in range(steps):
            begin = time.perf_counter()
            step(runner, running)
            taken.append(time.perf_counter() - begin)
        median = statistics.median(taken[len(taken) // 4 :])
        floor = (weight_bytes + size * (context + steps / 2) * per_token) / read
        print(
            f"{size:>7}{1e3 * median:>12.3f}{size / median:>12.0f}{1e3 * floor:>12.3f}"
            f"{floor / median:>8.0%}",
            flush=True,
        )
        results.append({"batch": size, "s": median, "floor": floor, "tokens/s": size / median})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="stop starting rows after this")
    parser.add_argument("--out", type=Path, help="folder for results as JSON")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes, interpreted, on the CPU"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        print("no GPU: this measures one (try --dry-run)", file=sys.stderr)
        return 2
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    name = "dry run" if dry else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    torch.manual_seed(time.time_ns())
    checks = Checks()
    print("checks:", flush=True)
    check_kernels(checks, device, dry)
    read = timing.bandwidth(device, 1 if dry else 2048)
    rate = timing.matrix_rate(device, 256 if dry else 8192)
    print(
        f"checks took {time.monotonic() - start:.0f} s; copy {read / 1e12:.2f} TB/s, "
        f"bf16 {rate / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    deadline = start + 60 * arguments.minutes
    results: dict[str, Any] = {"device": name, "copy": read, "bf16": rate}
    # The whole step first: it is what the rest explains.
    results["decode"] = time_decode(checks, device, read, deadline, dry)
    if not dry:
        torch.cuda.empty_cache()
    results["lora"] = time_lora(device, read, dry)
    results["prefill"] = time_prefill(device, rate, dry)
    results["sweep"] = sweep_decode(device, read, dry)
    results["attention"] = time_attention(device, read, deadline, dry)
    results["failed"] = checks.failed
    for failure in checks.failed:
        print(f"FAILED {failure}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu_step.json").write_text(json.dumps(results, indent=1))
    print(f"took {time.monotonic() - start:.0f} s")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
