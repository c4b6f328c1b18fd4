"""Every kernel against a float64 reference, odd sizes and ends of ranges included."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

from nybble.kernels.bench import gpu_section
from nybble.kernels.bench.gpu_section import BLOCK, Section, in_8_bits, kv_dtypes, paged

# isort: split
import torch

from nybble.kernels import DenseWeight, reference
from nybble.kernels.activation import ACTIVATIONS
from nybble.kernels.bench.gpu_lora import adapters
from nybble.kernels.bench.gpu_matmul import check_matmul, random_packed
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.reference import TokenChoice
from nybble.kernels.triton import (
    activation,
    attention,
    attention_fixed,
    lora,
    norm,
    rotary,
    sampling,
)
from nybble.kernels.triton.fixed_order import fixed_order_matmul


def run(section: Section) -> None:
    section.attempt("matmul", lambda: check_matmul(section))
    for dtype in (torch.float16,) if section.dry else (torch.float16, torch.bfloat16):
        section.attempt(f"{dtype} kernels", partial(check_kernels, section, dtype))
        for kept in kv_dtypes(section):
            section.attempt(f"{dtype} {kept} caches", partial(check_8_bits, section, dtype, kept))
        section.attempt(f"{dtype} LoRA", partial(check_lora, section, dtype))
        section.attempt(f"{dtype} in one order", partial(check_one_order, section, dtype))
    section.attempt("sampling", lambda: check_sampling(section))


def check_kernels(section: Section, dtype: torch.dtype) -> None:
    device, dry = section.device, section.dry
    random = partial(torch.randn, dtype=dtype, device=device)
    name = str(dtype)[6:]
    x, residual, weight = random(7, 1000), random(7, 1000), random(1000)
    wide = reference.rms_norm((x + residual).double(), weight.double(), 1e-5)
    section.close(f"{name} add_rms_norm", norm.add_rms_norm(x, residual, weight, 1e-5)[0], wide)
    for kind in ACTIVATIONS:
        found, expected = activation.gated(x, kind), reference.gated(x.double(), kind)
        section.close(f"{name} gated {kind}", found, expected)
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
        section.close(f"{name} rotary_store {q_heads}/{kv_heads}×{dim}", results[1], results[0])
        lengths = [(1, 1), (300, 1), (270, 40), (33, 33)]
        if not dry:
            lengths += [(5000, 1), (4097, 1), (2500, 700), (9, 2), (3000, 7)]
        batch, keys, values = paged(lengths, kv_heads, dim, dtype, device)
        q = random(sum(n for _, n in lengths), q_heads, dim)
        for window in (0, 100):
            expected = reference.paged_attention(
                q.double(), keys.double(), values.double(), batch, dim**-0.5, window
            )
            # The allocator gives this freed block to the next tensor of the same size, the output:
            # an element which the kernel does not write stays NaN.
            poison = torch.full((len(q), q_heads * dim), float("nan"), dtype=dtype, device=device)
            del poison
            found = attention.paged_attention(q, keys, values, batch, dim**-0.5, window)
            label = f"{name} attention {q_heads}/{kv_heads}×{dim} window {window}"
            section.close(label, found, expected)
            again = attention.paged_attention(q, keys, values, batch, dim**-0.5, window)
            section.holds(f"{label}: twice the same", torch.equal(found, again))


def check_8_bits(section: Section, dtype: torch.dtype, kept: torch.dtype) -> None:
    device, name = section.device, f"{str(dtype)[6:]} {str(kept)[6:]}"
    # In the interpreter a mantissa that rounds up does not carry into the exponent.
    limit = 1.0 if section.dry and kept != torch.int8 else None
    lengths = [(300, 1), (70, 40), (1, 1)]
    batch, shaped, _ = paged(lengths, 2, 64, dtype, device)
    keys, values, *scales = in_8_bits(shaped, kept)
    q = torch.randn(42, 8, 64, dtype=dtype, device=device)
    found = attention.paged_attention(q, keys, values, batch, 0.1, 0, *scales)
    expected = reference.paged_attention(q.double(), keys, values, batch, 0.1, 0, *scales)
    section.close(f"{name} caches: attention", found, expected)
    fused = torch.randn(9, 8 + 4, 64, dtype=dtype, device=device)
    angle = torch.randn(9, 64, device=device)
    slots = torch.randperm(40)[:9].to(device)
    stored = []
    for function in (reference.rotary_store, rotary.rotary_store):
        q, k, v = torch.split(fused.clone(), [8, 2, 2], dim=1)
        caches = torch.zeros(2, 4, 2, BLOCK, 64, dtype=kept, device=device)
        scale = torch.zeros(2, 4, 2, BLOCK, device=device)
        function(q, k, v, angle.cos(), angle.sin(), caches[0], caches[1], slots, scale[0], scale[1])
        stored.append((caches.float() * scale[..., None]).bfloat16())
    section.close(f"{name} caches: rotary_store", stored[1], stored[0], limit)


def check_lora(section: Section, dtype: torch.dtype) -> None:
    device, dry = section.device, section.dry
    inputs, outputs = (70, (40, 24, 24)) if dry else (5120, (5120, 1024, 1024))
    offsets = (0, outputs[0], sum(outputs[:2]), sum(outputs))
    given = adapters(5, 20, inputs, offsets, dtype, device, [0, 20, 20, 7, 20])
    slots = [row % 6 - 1 for row in range(20 if dry else 70)]
    batch = LoRABatch.of(slots, device)
    assert batch is not None
    x = torch.randn(len(slots), inputs, dtype=dtype, device=device)
    out = torch.randn(len(slots), offsets[-1], dtype=dtype, device=device)
    found, expected = out.clone(), out.double()
    lora.lora_add(found, x, given, batch)
    for row, slot in enumerate(slots):
        for pair, (start, end) in zip(
            given.matrices[slot] if slot >= 0 else (), pairwise(offsets), strict=False
        ):
            if pair is not None:
                a, b = pair.wide()
                expected[row, start:end] += a.double() @ x[row].double() @ b.double()
    section.close(f"{str(dtype)[6:]} lora_add", found, expected)
    together = found[2:3].clone()
    alone, one = out[2:3].clone(), LoRABatch.of([slots[2]], device)
    assert one is not None
    lora.lora_add(alone, x[2:3], given, one)
    section.holds("lora_add: a row alone as in its batch", torch.equal(alone, together))


def check_one_order(section: Section, dtype: torch.dtype) -> None:
    """The kernels of ``--deterministic``: near the reference, and a row alone as in its batch."""
    device, dry, name = section.device, section.dry, str(dtype)[6:]
    rows, columns, outputs = (70, 1024, 96) if dry else (700, 5120, 5120)
    x = torch.randn(rows, columns, dtype=dtype, device=device)
    dense = DenseWeight(torch.randn(outputs, columns, dtype=dtype, device=device))
    packed = random_packed(columns, outputs, device)
    tiled, wide = packed.to_layout("gpu_tiles"), packed.dequantize(torch.float64)
    for kind, weight, exact in (("16-bit", dense, dense.weight.double()), ("4-bit", tiled, wide)):
        whole = fixed_order_matmul(x, weight)
        section.close(f"{name} {kind} product in one order", whole, x.double() @ exact.T)
        same = all(
            torch.equal(fixed_order_matmul(x[part], weight), whole[part])
            for part in (slice(0, 1), slice(rows - 1, rows), slice(3, 60))
        )
        section.holds(f"{name} {kind} product: rows alone as in their batch", same)
    lengths = [(540, 1), (530, 40)] if dry else [(5000, 1), (4097, 700), (9, 2)]
    batch, keys, values = paged(lengths, 2, 64, dtype, device)
    q = torch.randn(sum(new for _, new in lengths), 8, 64, dtype=dtype, device=device)
    whole = attention_fixed.paged_attention(q, keys, values, batch, 0.1)
    expected = reference.paged_attention(q.double(), keys.double(), values.double(), batch, 0.1)
    section.close(f"{name} attention in one order", whole, expected)
    context, new = lengths[1]
    alone = replace(
        batch,
        query_start=torch.tensor([0, 1], dtype=torch.int32, device=device),
        context_lens=torch.tensor([context - new + 6], dtype=torch.int32, device=device),
        block_tables=batch.block_tables[1:2],
        slot_mapping=batch.slot_mapping[:1],
        max_query=1,
        rows=(1,),
    )
    row = slice(1 + 5, 1 + 6)
    found = attention_fixed.paged_attention(q[row], keys, values, alone, 0.1)
    section.holds(
        f"{name} attention: a token alone as in its prompt", torch.equal(found, whole[row])
    )


def check_sampling(section: Section) -> None:
    device, dry = section.device, section.dry
    rows, vocab = (6, 700) if dry else (256, 151936)
    logits = 4 * torch.randn(rows, vocab, device=device).bfloat16().float()
    options = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 50, 0.9, 0.0), (1.2, 0, 0.95, 0.05)]
    choices = [TokenChoice(*options[row % 4], (row + 0.5) / rows) for row in range(rows)]
    found = sampling.sample_tokens(logits, choices).cpu()
    expected = reference.sample_tokens(logits.cpu(), choices)
    # If the random number lies on the border of two tokens, rounding may choose either.
    share = float((found != expected).float().mean())
    section.holds(f"sampling: {share:.1%} of tokens differ from the reference", share <= 0.02)
    again = sampling.sample_tokens(logits[5:6], choices[5:6]).cpu()
    section.holds("sampling: a row alone as in its batch", torch.equal(again, found[5:6]))


if __name__ == "__main__":
    sys.exit(gpu_section.main("checks", run, minutes=4))
