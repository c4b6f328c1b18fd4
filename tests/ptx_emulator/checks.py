"""Every GPU kernel, as compiled, against its reference: ``checks.py [--capability 80 89 90 100]``.

One JSON object a line for each comparison. ``--quick`` takes one order of things for each family on
each GPU; both kinds of orders come in turns. ``--few`` makes the first comparisons of a family
alone, which run each of its kernels. ``--without bar.sync`` (or another instruction) leaves that
instruction out, to see that the emulator notices; what is wrong ends the family then.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice, pairwise
from multiprocessing import get_context

import torch
from launch import emulated, reachable
from machine import WARP, Timing
from tensor_cores import WARP_GROUP
from torch import Tensor

from nybble.kernels import DenseWeight, PackedWeight, reference
from nybble.kernels.activation import ACTIVATIONS
from nybble.kernels.bench.gpu_lora import adapters
from nybble.kernels.bench.gpu_section import BLOCK, error, in_8_bits, paged
from nybble.kernels.lora import LoRASlots
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import E2M1_LEVELS, INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles
from nybble.kernels.reference import TokenChoice
from nybble.kernels.triton import (
    activation,
    attention,
    attention_fixed,
    attention_latent,
    dequantize,
    fixed_order,
    latent,
    lora,
    matmul,
    norm,
    rotary,
    sampling,
)
from nybble.kernels.triton.configs import Config, default_config
from nybble.kernels.triton.grouped import StackedExperts, grouped_matmul

CPU = torch.device("cpu")
# Relative errors that rounding once to the dtype, and weights to it before, explain.
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}
LEVELS = torch.tensor([-1.0, 1.0, 0.3, -0.0, 7e-5, *torch.linspace(-0.9, 0.8, 11).tolist()])
Found = tuple[str, Tensor, Tensor]  # what was compared, the kernel's result, the reference's


def random_weight(kind: str, out: int, columns: int, group: int) -> PackedWeight:
    """With a bias; the columns in an order of their own where they are no multiple of 128."""
    zeros = kind == "zeros"
    levels = {"codebook": LEVELS, "e2m1": E2M1_LEVELS, "zeros": INTEGER_LEVELS}
    groups = -(-columns // group)
    return PackedWeight(
        qweight=pack_nibbles(torch.randint(0, 16, (out, columns)).to(torch.uint8)),
        scales=(torch.rand(out, groups) / 16 + 0.01).half(),
        zeros=(torch.rand(out, groups) * 24 - 4).half() if zeros else None,
        levels=levels.get(kind, SYMMETRIC_LEVELS),
        out_features=out,
        in_features=columns,
        group_size=group,
        perm=torch.randperm(columns).int() if columns % 128 else None,
        bias=torch.randn(out).half(),
    )


def shipped(capability: int) -> Iterator[tuple[int, Config]]:
    """Rows and configurations of the rule that compile to different code, splits included."""
    # Over 256 rows nothing new is compiled for Blackwell.
    for bucket in (2, 8, 16, 32, 64, 128, 256, *((1024,) if capability < 100 else ())):
        config = default_config(bucket, 22016, 4096, capability=capability)
        config = replace(config, splits=2, tail=min(config.tail, 1))
        # One block of rows and a bit of the next.
        yield min(bucket, config.block_m + 5), config
        if capability == 90 and bucket in (8, 16):
            yield bucket, replace(config, overlap=True)
    yield 133, default_config(256, 5120, 5120, capability=capability)  # two unequal parts


def check_matmul(capability: int, everything: bool) -> Iterator[Found]:
    """Kinds of weights take turns, or not; dtypes and odd sizes do in any case."""
    kinds = (("symmetric", 128), ("codebook", 64), ("e2m1", 32), ("zeros", 32), ("e2m1", 16))
    for number, (rows, config) in enumerate(shipped(capability)):
        for turn, (kind, group) in enumerate(kinds):
            if not everything and turn != number % len(kinds):
                continue
            dtype = torch.bfloat16 if (number + turn) % 3 else torch.float16
            columns, out = (424, 272) if (number + turn) % 2 else (512, 192)
            weight = random_weight(kind, out, columns, group)
            x = torch.randn(rows, columns).to(dtype)
            expected = x.double() @ weight.dequantize(torch.float64).T + weight.bias.double()
            name = f"{kind} g{group} {str(dtype)[6:]} {columns}→{out} m{rows} {config}"
            plain = weight.to_layout("gpu_tiles")
            yield name, matmul.packed_matmul(x, plain, config), expected
            if turn != number % len(kinds):
                continue
            gated = weight.to_layout("gpu_gated_tiles")
            kind = ACTIVATIONS[number % len(ACTIVATIONS)]
            after = activation.gated(matmul.packed_matmul(x, gated, config), kind)
            yield f"{name} gated by {kind}", after, reference.gated(expected, kind)
            within = matmul.packed_matmul(x, gated, config, kind)
            yield f"{name}: the same within the product", within.float(), after.double()


def check_parts(capability: int, everything: bool) -> Iterator[Found]:
    """Blocks that several programs share: which of them is the last differs from block to block."""
    uneven = default_config(256, 5120, 5120, capability=capability)
    thirds = default_config(16, 4096, 4096, capability=capability)
    configs = (uneven, replace(uneven, tail=3), replace(thirds, splits=3))
    for number, config in enumerate(configs):
        weight = random_weight(("zeros", "symmetric", "codebook")[number], 400, 384, 64)
        x = torch.randn(9, 384).half()
        expected = x.double() @ weight.dequantize(torch.float64).T + weight.bias.double()
        found = matmul.packed_matmul(x, weight.to_layout("gpu_tiles"), config)
        yield f"parts {config}", found, expected
        again = matmul.packed_matmul(x, weight.to_layout("gpu_tiles"), config)
        yield f"parts {config}: the same in another order", again.float(), found.double()
        counted = matmul.arrivals(CPU).count_nonzero().float()
        yield f"parts {config}: counters", 1 + counted, torch.ones((), dtype=torch.float64)


def check_grouped(capability: int, everything: bool) -> Iterator[Found]:
    """Few rows, and each block size; rows spread over the experts, or all at the last two."""
    kinds = (("symmetric", 128), ("codebook", 32), ("zeros", 32), ("e2m1", 64))
    for number, (rows, experts) in enumerate(((3, 5), (24, 2), (40, 2), (9, 5))):
        for turn, (kind, group) in enumerate(kinds):
            if not everything and turn != number:
                continue
            dtype = torch.bfloat16 if number % 2 else torch.float16
            columns, out = (200, 80) if turn == 1 else (256, 192)
            if number == 3:
                columns, out = 256, 80
            weights = [random_weight(kind, out, columns, group) for _ in range(experts)]
            dense = torch.stack([weight.dequantize(torch.float64) for weight in weights])
            biases = torch.stack([weight.bias.double() for weight in weights])
            ids = torch.stack([torch.randperm(experts)[:2] for _ in range(rows)])
            if number == 0:
                ids[:] = torch.tensor([experts - 2, experts - 1])
            top_k = torch.rand(rows, 2)
            name = f"experts {kind} g{group} {str(dtype)[6:]} {columns}→{out} m{rows}"
            for layout in ("gpu_tiles", "gpu_gated_tiles"):
                stacked = StackedExperts.of([weight.to_layout(layout) for weight in weights])
                x = torch.randn(rows, columns).to(dtype)
                expected = torch.einsum("rkoi,ri->rko", dense[ids], x.double()) + biases[ids]
                yield f"{name} {layout}", grouped_matmul(x, ids, experts=stacked), expected
            each = torch.randn(rows, 2, columns).to(dtype)
            expected = torch.einsum("rkoi,rki->rko", dense[ids], each.double()) + biases[ids]
            found = grouped_matmul(each, ids, top_k, experts=stacked)
            yield f"{name} weighted", found, (expected * top_k[..., None].double()).sum(1)
    yield from _check_grouped_in_other_forms()


def _check_grouped_in_other_forms() -> Iterator[Found]:
    """Experts in 16 bits, and in 4 with scales which are exponents."""
    x, ids = torch.randn(11, 256).bfloat16(), torch.arange(2).expand(11, -1)
    dense = [DenseWeight(torch.randn(80, 256).bfloat16(), torch.randn(80)) for _ in range(2)]
    weights: list[PackedWeight | DenseWeight] = list(dense)
    yield "experts 16 bits", *_grouped(x, ids, weights, [w.weight.double() for w in dense])
    packed = [random_weight("e2m1", 80, 256, 32) for _ in range(2)]
    packed = [
        replace(w, scales=torch.randint(118, 126, w.scales.shape).to(torch.uint8)) for w in packed
    ]
    weights = [weight.to_layout("gpu_tiles") for weight in packed]
    wide = [weight.dequantize(torch.float64) for weight in packed]
    yield "experts exponents", *_grouped(x, ids, weights, wide)
    yield "experts exponents m2", *_grouped(x[:2], ids[:2], weights, wide)


def _grouped(
    x: Tensor, ids: Tensor, weights: list[PackedWeight | DenseWeight], wide: list[Tensor]
) -> tuple[Tensor, Tensor]:
    expected = torch.einsum("rkoi,ri->rko", torch.stack(wide)[ids], x.double())
    expected += torch.stack([weight.bias.double() for weight in weights])[ids]
    return grouped_matmul(x, ids, experts=StackedExperts.of(weights)), expected


def check_dequantize(capability: int, everything: bool) -> Iterator[Found]:
    for kind, group in (("codebook", 64), ("e2m1", 32), ("zeros", 32), ("zeros", 16)):
        weight = random_weight(kind, 80, 200, group)
        for layout in ("gpu_tiles", "gpu_gated_tiles"):
            found = dequantize.dequantize(weight.to_layout(layout), torch.bfloat16)
            stored = replace(weight, perm=None).dequantize(torch.float64)
            yield f"dequantize {kind} {layout}", found, stored


def check_attention(capability: int, everything: bool) -> Iterator[Found]:
    # One of each kind in one split and in several: single tokens, prompts, and few tokens.
    lengths = [(1, 1), (300, 1), (530, 40), (33, 33), (600, 1), (65, 2), (520, 3), (540, 17)]
    # Ada differs from Ampere in 8-bit floats alone.
    kept: list[torch.dtype | None] = [None, torch.int8] if capability != 89 else []
    kept += [torch.float8_e4m3fn] if capability >= 89 else []
    for number, dtype in enumerate((torch.float16, torch.bfloat16)):
        for cache in kept:
            for shape, (heads, dim, window) in enumerate(((4, 64, 0), (7, 128, 100))):
                if not everything and shape != number:
                    continue
                batch, keys, values = paged(lengths, 2, dim, dtype, CPU)
                scales: list[Tensor] = []
                if cache is not None:
                    keys, values, *scales = in_8_bits(keys, cache)
                q = torch.randn(sum(n for _, n in lengths), 2 * heads, dim).to(dtype)
                inputs = (batch, dim**-0.5, window, *scales)
                wide = (keys, values) if scales else (keys.double(), values.double())
                expected = reference.paged_attention(q.double(), *wide, *inputs)
                name = f"attention {str(dtype)[6:]} {heads}×2×{dim} window {window} {cache}"
                yield name, attention.paged_attention(q, keys, values, *inputs), expected
                if dim != 64:
                    continue
                options = {"softcap": 2.0, "sinks": 2 * torch.randn(2 * heads)}
                expected = reference.paged_attention(q.double(), *wide, *inputs, **options)
                found = attention.paged_attention(q, keys, values, *inputs, **options)
                yield f"{name}, capped, with sinks", found, expected


def check_latent(capability: int, everything: bool) -> Iterator[Found]:
    """Rows stored, then attended to: decodes in one and in several splits, and prompts."""
    lengths, latents = [(1, 1), (270, 1), (520, 3), (33, 33)], 64
    tokens = sum(new for _, new in lengths)
    caches: list[tuple[torch.dtype, torch.dtype | None, int]] = [(torch.bfloat16, None, 20)]
    caches += [(torch.float16, torch.int8, 4)]
    caches += [(torch.bfloat16, torch.float8_e4m3fn, 40)] if capability >= 89 else []
    for number, (dtype, kept, heads) in enumerate(caches):
        if not everything and number != capability // 10 % len(caches):
            continue
        batch, cache, _ = paged(lengths, 1, 16 + latents, dtype, CPU)
        scales: list[Tensor] = []
        if kept is not None:
            cache, _, *both = in_8_bits(cache, kept)
            scales = both[:1]
        name = f"latent attention {str(dtype)[6:]} {heads} {kept}"
        angle, slots = torch.randn(tokens, 16), torch.randperm(cache.shape[0] * BLOCK)[:tokens]
        slots[3] = -1
        projected = torch.randn(tokens, heads * 24 + latents + 16).to(dtype)
        results = []
        for function in (latent.latent_store, reference.latent_store):
            queries, own, key = projected.clone().split([heads * 24, latents, 16], dim=1)
            filled, given = cache.clone(), [each.clone() for each in scales]
            q = queries.view(tokens, heads, 24)[..., 8:]
            angles = angle.cos(), angle.sin()
            function(q, key, own, *angles, filled, slots, *given, interleaved=heads == 20)
            stored = filled.double() * given[0][..., None] if given else filled.double()
            results.append(torch.cat((queries.flatten().double(), stored.flatten())).to(dtype))
        yield f"{name}: stored", results[0], results[1].double()
        q = torch.randn(tokens, heads, 16 + latents).to(dtype)
        wide = cache if scales else cache.double()
        options = (batch, 0.1, latents, *scales)
        found = attention_latent.latent_attention(q, cache, *options)
        yield name, found, reference.latent_attention(q.double(), wide, *options)


def check_rotary(capability: int, everything: bool) -> Iterator[Found]:
    slots = torch.tensor([5, -1, 40, 41, 0, 7, 8, 63, 20])
    kept = [torch.float16, torch.bfloat16, torch.int8]
    kept += [torch.float8_e4m3fn] if capability >= 89 else []
    for number, dtype in enumerate(kept):
        rotary_dim, interleaved = ((64, False), (48, False), (20, True))[number % 3]
        half = dtype if dtype in LIMIT else torch.bfloat16
        fused, angle = torch.randn(9, 14, 64).to(half), torch.randn(9, rotary_dim)
        results = []
        for function in (rotary.rotary_store, reference.rotary_store):
            q, k, v = torch.split(fused.clone(), [10, 2, 2], dim=1)
            caches = torch.zeros(2, 4, 2, BLOCK, 64).to(dtype)
            scales = () if dtype in LIMIT else torch.zeros(2, 4, 2, BLOCK)
            angles = angle.cos(), angle.sin()
            options = {"interleaved": interleaved}
            function(q, k, v, *angles, *caches, slots, *scales, **options)
            stored = (
                caches.double() * torch.stack(tuple(scales))[..., None] if len(scales) else caches
            )
            results.append(torch.cat((q.flatten().double(), stored.flatten().double())).to(half))
        yield f"rotary_store {str(dtype)[6:]} {rotary_dim} {interleaved}", results[0], results[1]


def lora_add(out: Tensor, x: Tensor, given: LoRASlots, batch: LoRABatch) -> None:
    """The kernels', which find the adapters by a table of addresses."""
    pairs = [pair for slot in given.matrices for pair in slot if pair is not None]
    with reachable(matrix for pair in pairs for matrix in pair[:2]):
        lora.lora_add(out, x, given, batch)


def check_lora(capability: int, everything: bool) -> Iterator[Found]:
    for dtype, rank, rows in ((torch.float16, 20, 20), (torch.bfloat16, 64, 300)):
        # Rows of the second lie at multiples of 16 bytes, and are copied asynchronously.
        inputs, offsets = 1100 if rank == 20 else 1104, (0, 40, 64, 200)
        given = adapters(5, rank, inputs, offsets, dtype, CPU, [0, rank, rank, 7, rank])
        slots = [row % 6 - 1 for row in range(rows)]
        x, out = torch.randn(rows, inputs).to(dtype), torch.randn(rows, 200).to(dtype)
        expected = out.double()
        batch = LoRABatch.of(slots, CPU)
        assert batch is not None
        lora_add(out, x, given, batch)
        for row, slot in enumerate(slots):
            found = given.matrices[slot] if slot >= 0 else ()
            for pair, (start, end) in zip(found, pairwise(offsets), strict=False):
                if pair is not None:
                    a, b = pair.wide()
                    expected[row, start:end] += a.double() @ x[row].double() @ b.double()
        yield f"lora_add {str(dtype)[6:]} rank {rank} rows {rows}", out, expected
    yield from _check_lora_on_experts()


def _check_lora_on_experts() -> Iterator[Found]:
    """Two experts with two slots each; every third row has no adapter."""
    given = adapters(4, 20, 264, (0, 40, 80), torch.bfloat16, CPU, [20, 7, 0, 20])
    slots = torch.tensor([[-1, -1], [0, 2], [1, 3]]).repeat(9, 1)
    x, out = torch.randn(27, 264).bfloat16(), torch.randn(27, 2, 80).bfloat16()
    expected = out.double()
    pairs = [pair for slot in given.matrices for pair in slot if pair is not None]
    with reachable(matrix for pair in pairs for matrix in pair[:2]):
        add = lora.grouped_lora(slots, 4)
        assert add is not None
        add(out, x, given)
    for row, of_row in enumerate(slots.tolist()):
        for each, slot in enumerate(of_row):
            for part, pair in enumerate(given.matrices[slot] if slot >= 0 else ()):
                if pair is not None:
                    a, b = pair.wide()
                    product = a.double() @ x[row].double() @ b.double()
                    expected[row, each, 40 * part : 40 * (part + 1)] += product
    yield "lora on experts", out, expected


def check_norm(capability: int, everything: bool) -> Iterator[Found]:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for rows, width in ((7, 1000), (40, 64)):
            x, residual = torch.randn(2, rows, width).to(dtype)
            weight = torch.randn(width).to(dtype)
            found, total = norm.add_rms_norm(x, residual, weight, 1e-5)
            expected = reference.rms_norm((x + residual).double(), weight.double(), 1e-5)
            name = f"{str(dtype)[6:]} {rows}×{width}"
            yield f"add_rms_norm {name}", found, expected
            yield f"add_rms_norm {name}: the sum", total.float(), (x + residual).double()
            found = norm.rms_norm(x, weight, 1e-5, 1.0)
            expected = reference.rms_norm(x.double(), weight.double(), 1e-5, 1.0)
            yield f"rms_norm {name}, offset 1", found, expected
            heads = x[:, :48].view(rows, 3, 16)
            found, expected = (
                module.rms_norm(each, weight[:16].to(each.dtype), 1e-5)
                for module, each in ((norm, heads), (reference, heads.double()))
            )
            yield f"rms_norm {name}, heads of wider rows", found, expected
            if dtype != torch.float32:
                for kind in ACTIVATIONS:
                    found, expected = activation.gated(x, kind), reference.gated(x.double(), kind)
                    yield f"gated {kind} {name}", found, expected


def check_sampling(capability: int, everything: bool) -> Iterator[Found]:
    options = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 50, 0.9, 0.0), (1.2, 0, 0.95, 0.05)]
    # One program a row, which searches it all; and several, which gather from two tiles each.
    for rows, vocab in ((8, 700), (4, 33_000)):
        logits = 4 * torch.randn(rows, vocab).bfloat16().float()
        logits[rows // 2 :, : vocab // 2] = -torch.inf
        choices = [TokenChoice(*options[row % 4], (row + 0.5) / rows) for row in range(rows)]
        found = sampling.sample_tokens(logits, choices)
        expected = reference.sample_tokens(logits, choices)
        yield f"sampling of {vocab}", found.float() + 1, expected.double() + 1


def check_fixed_order(capability: int, everything: bool) -> Iterator[Found]:
    """Rows of a batch against the reference; and alone, where not one bit may differ."""
    rows, columns = 193, 1024  # parts in turn; alone they are side by side
    x = torch.randn(rows, columns)
    kinds = (("symmetric", 128), ("codebook", 64), ("zeros", 32), ("16 bits", 0))
    for number, (kind, group) in enumerate(kinds):
        if not everything and number % 2 == (capability == 90):
            continue
        dtype = torch.float16 if number % 2 else torch.bfloat16
        own = x.to(dtype)
        weight: PackedWeight | DenseWeight = DenseWeight(torch.randn(40, columns).to(dtype))
        dense = weight.weight.double() if isinstance(weight, DenseWeight) else None
        if group:
            packed = random_weight(kind, 40, columns, group)
            weight, dense = packed.to_layout("gpu_tiles"), packed.dequantize(torch.float64)
        expected = own.double() @ dense.T + (0 if weight.bias is None else weight.bias.double())
        whole = fixed_order.fixed_order_matmul(own, weight)
        name = f"one order: {kind} g{group} {str(dtype)[6:]}"
        yield name, whole, expected
        for alone in (slice(0, 1), slice(rows - 2, rows)):
            found = fixed_order.fixed_order_matmul(own[alone], weight)
            yield f"{name} alone", found.float(), whole[alone].double()


def check_fixed_attention(capability: int, everything: bool) -> Iterator[Found]:
    """Spans of keys in turn against the reference, and tokens alone, whose spans are apart."""
    lengths = [(530, 1), (520, 20)]
    for number, (heads, dim, cache) in enumerate(((4, 64, None), (2, 128, torch.int8))):
        if not everything and number != (capability == 80):
            continue
        dtype = torch.bfloat16 if number else torch.float16
        batch, keys, values = paged(lengths, 1, dim, dtype, CPU)
        scales: list[Tensor] = []
        if cache is not None:
            keys, values, *scales = in_8_bits(keys, cache)
        q = torch.randn(21, heads, dim).to(dtype)
        inputs = (dim**-0.5, 0, *scales)
        wide = (keys, values) if scales else (keys.double(), values.double())
        expected = reference.paged_attention(q.double(), *wide, batch, *inputs)
        workspace, attention_fixed.WORKSPACE = attention_fixed.WORKSPACE, 0
        whole = attention_fixed.paged_attention(q, keys, values, batch, *inputs)
        attention_fixed.WORKSPACE = workspace
        name = f"attention in one order: {heads}×{dim} {cache}"
        yield name, whole, expected
        for seq, row in ((0, 0), (1, 1), (1, 20)):
            context = 530 if seq == 0 else 500 + row
            own = replace(
                batch,
                query_start=torch.tensor([0, 1], dtype=torch.int32),
                context_lens=torch.tensor([context], dtype=torch.int32),
                block_tables=batch.block_tables[seq : seq + 1],
                slot_mapping=batch.slot_mapping[:1],
                max_query=1,
                rows=(1,),
            )
            found = attention_fixed.paged_attention(q[row : row + 1], keys, values, own, *inputs)
            yield f"{name} alone", found.float(), whole[row : row + 1].double()


def check_lora_alone(capability: int, everything: bool) -> Iterator[Found]:
    """A row among so many that tiles are taller, and alone: not one bit may differ."""
    rows, rank, inputs, offsets = 260, 16, 264, (0, 40)
    slots_of = adapters(3, rank, inputs, offsets, torch.bfloat16, CPU)
    x, whole = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, 40).bfloat16()
    alone = whole[258:259].clone()
    for out, given, slots in (
        (whole, x, [row % 3 for row in range(rows)]),
        (alone, x[258:259], [0]),
    ):
        batch = LoRABatch.of(slots, CPU)
        assert batch is not None
        lora_add(out, given, slots_of, batch)
    yield "lora_add alone", alone.float(), whole[258:259].double()


FAMILIES: dict[str, Callable[[int, bool], Iterator[Found]]] = {
    "matmul": check_matmul,
    "dequantize": check_dequantize,
    "attention": check_attention,
    "latent": check_latent,
    "rotary": check_rotary,
    "lora": check_lora,
    "norm": check_norm,
    "sampling": check_sampling,
    "grouped": check_grouped,
    "fixed order": check_fixed_order,
    "fixed attention": check_fixed_attention,
    "lora alone": check_lora_alone,
    "parts": check_parts,
}

# Comparisons of a family, the first ones, that run each of its kernels.
FEW = {"dequantize": 1, "latent": 2, "rotary": 3, "lora": 1, "norm": 9, "sampling": 1, "grouped": 4}


def timings(capability: int, family: str) -> list[Timing]:
    """Orders to try: all in step; and warps one by one, the last first, copies at once.

    On Blackwell the first warp asks for products, which read what others wrote. A barrier that is
    missing before is seen where it comes first and they are made at once; one that is missing
    behind them, where it comes last and they are late.

    A block is counted by its first warp. What others have not stored by then is missed if it comes
    first.
    """
    if family == "parts":
        group = WARP_GROUP if capability >= 90 else WARP
        return [Timing(group, apart=capability >= 100, late=False, seed=seed) for seed in (1, 2)]
    if capability >= 100:
        late = Timing(apart=True, backwards=True)
        early = Timing(WARP_GROUP, apart=True, late=False, seed=1)
        on_tensor_memory = ("matmul", "attention", "grouped", "fixed order", "fixed attention")
        return [late, early] if family in on_tensor_memory else [late]
    unit = WARP_GROUP if capability == 90 else WARP
    return [Timing(), Timing(unit, backwards=True, late=False, seed=1)]


def quick_timings(capability: int, family: str) -> list[Timing]:
    """One of the orders: neighbours among the families, and among the GPUs, have different ones."""
    both = timings(capability, family)
    turn = list(FAMILIES).index(family) + capability // 10
    return [both[turn % len(both)]]


def outcomes(
    family: str, capability: int, timing: Timing, everything: bool, without: str, few: bool
) -> list[str]:
    """A family's comparisons in one order of things, as JSON."""
    warnings.simplefilter("ignore")  # of bfloat16 gradients and the like: nothing of ours
    torch.manual_seed(7)
    found = []
    with emulated(capability, timing, without) as launched, torch.inference_mode():
        compared = FAMILIES[family](capability, everything)
        for name, result, expected in islice(compared, FEW.get(family) if few else None):
            outcome = {
                "capability": capability,
                "name": name,
                "error": error(result, expected),
                "limit": LIMIT[result.dtype],
                "kernels": sorted(set(launched)),
            }
            found.append(json.dumps(outcome))
            if without and not outcome["error"] <= outcome["limit"]:
                break
    return found


def outcomes_on(
    capability: int,
    families: list[str],
    orders: Callable[[int, str], list[Timing]],
    everything: bool,
    without: str,
    few: bool,
) -> list[str]:
    """All families' on one GPU."""
    own = [
        each for each in families if capability != 89 or each in ("attention", "latent", "rotary")
    ]
    return [
        outcome
        for family in own
        for timing in orders(capability, family)
        for outcome in outcomes(family, capability, timing, everything, without, few)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, nargs="*", default=(80, 89, 90, 100))
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--all", action="store_true", help="every kind of weight in every shape")
    parser.add_argument("--quick", action="store_true", help="one order of things, not two")
    parser.add_argument("--few", action="store_true", help="each kernel, not each of its problems")
    parser.add_argument("--without", default="", help="leave this instruction out")
    arguments = parser.parse_args()
    orders = quick_timings if arguments.quick else timings
    options = (arguments.families, orders, arguments.all, arguments.without, arguments.few)
    # A process compiles for one GPU.
    if len(arguments.capability) == 1:
        print(*outcomes_on(*arguments.capability, *options), sep="\n")
        return
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in [pool.submit(outcomes_on, each, *options) for each in arguments.capability]:
            print(*future.result(), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
