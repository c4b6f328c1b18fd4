"""Paged attention: decode against the copy bandwidth, prefill against the bf16 matrix rate."""

from __future__ import annotations

import sys
from functools import partial
from itertools import product
from typing import Any

from nybble.kernels.bench import gpu_section
from nybble.kernels.bench.gpu_section import Section, in_8_bits, kv_dtypes, paged

# isort: split
import torch
import triton
from torch import Tensor

from nybble.kernels.triton import attention, attention_decode, attention_splits, timing


def run(section: Section) -> None:
    section.attempt("decode attention", lambda: time_decode(section))
    section.attempt("prefill attention", lambda: time_prefill(section))
    section.attempt("other tiles", lambda: sweep_decode(section))


def time_decode(section: Section) -> None:
    """Decode attention of one layer: bytes of keys and values per second of its time."""
    device, dry, read = section.device, section.dry, section.read
    models: dict[str, tuple[int, int, int, torch.dtype | None]] = {
        "Llama-3-8B 32/8×128, bf16": (32, 8, 128, None),
        "Llama-2-13B 40/40×128, bf16": (40, 40, 128, None),
    }
    for kept in kv_dtypes(section):
        models[f"Llama-3-8B 32/8×128, {str(kept)[6:]}"] = (32, 8, 128, kept)
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    batches: tuple[int, ...] = (1, 8, 32, 64)
    most, cached = 9 << 30, 200 << 20
    if dry:
        models, contexts, batches = {"tiny 4/2×64": (4, 2, 64, None)}, (300,), (1, 3)
        most, cached = 6 << 20, 1
    results: list[dict[str, Any]] = []
    for label, (q_heads, kv_heads, dim, cached_as) in models.items():
        print(f"decode attention, {label}: µs (share of the copy bandwidth)")
        print(f"{'batch':>7}", *(f"{context:>14}" for context in contexts))
        for size in batches:
            cells = []
            for context in contexts:
                nbytes = 2 * size * context * kv_heads * (dim + 4 if cached_as else 2 * dim)
                if nbytes > most or section.out_of_time:
                    cells.append(f"{'–':>14}")
                    continue
                calls: list[timing.Call] = []
                for _ in range(min(24, max(1, -(-cached // nbytes)))):
                    dtype = section.dtype
                    batch, keys, values = paged([(context, 1)] * size, kv_heads, dim, dtype, device)
                    scales: list[Tensor] = []
                    if cached_as:
                        keys, values, *scales = in_8_bits(keys, cached_as)
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
            section.keep("decode", results)


def sweep_decode(section: Section) -> None:
    """Decode attention with other tiles, stages and programs: shares of the copy bandwidth."""
    device, dry, read = section.device, section.dry, section.read
    sizes = ((4, 2, 64, 1, 300),) if dry else ((32, 8, 128, 1, 16384), (32, 8, 128, 32, 4096))
    settings = (
        (attention_decode, "DECODE_TILE"),
        (attention_decode, "DECODE_STAGES"),
        (attention_decode, "PROGRAMS_PER_SM"),
        (attention_splits, "MIN_SPLIT"),
    )
    chosen = tuple(getattr(*setting) for setting in settings)
    options = [chosen, (32, 3, 2, 128)]
    if not dry:
        options = [*product((32, 64, 128), (3, 5), (2, 3, 4), chosen[3:])]
        options += [(*chosen[:3], least) for least in (128, 512)]

    def use(option: tuple[int, ...]) -> None:
        for setting, value in zip(settings, option, strict=True):
            setattr(*setting, value)

    dtype = section.dtype
    results: list[dict[str, Any]] = []
    for q_heads, kv_heads, dim, size, context in sizes:
        nbytes = 4 * size * context * kv_heads * dim
        calls: list[timing.Call] = []
        for _ in range(1 if dry else max(1, -(-(200 << 20) // nbytes))):
            batch, keys, values = paged([(context, 1)] * size, kv_heads, dim, dtype, device)
            q = torch.randn(size, q_heads, dim, dtype=dtype, device=device)
            calls.append(partial(attention.paged_attention, q, keys, values, batch, dim**-0.5))
        found = []
        for option in options:
            if section.out_of_time:
                break
            use(option)
            try:
                taken = timing.milliseconds(calls) / 1e3
            except triton.runtime.errors.OutOfResources:
                continue
            finally:
                use(chosen)
            found.append((nbytes / read / taken, option))
        best = ", ".join(f"{option} {share:.0%}" for share, option in sorted(found)[::-1][:4])
        used = next((share for share, option in found if option == chosen), float("nan"))
        print(
            f"decode attention, batch {size}, context {context}, "
            f"(tile, stages, programs per multiprocessor, least split): {best}; "
            f"in use {chosen} {used:.0%}",
            flush=True,
        )
        results += [{"batch": size, "context": context, "option": o, "share": s} for s, o in found]
        section.keep("tiles", results)


def time_prefill(section: Section) -> None:
    """Causal attention of one prompt: its operations per second as a share of the matrix rate."""
    device, dry, rate = section.device, section.dry, section.rate
    q_heads, kv_heads, dim = (4, 2, 64) if dry else (32, 8, 128)
    dtype = section.dtype
    print(f"prefill attention, {q_heads}/{kv_heads}×{dim}: µs (share of the bf16 matrix rate)")
    results: list[dict[str, Any]] = []
    for context, new in (
        ((40, 40),) if dry else ((2048, 2048), (8192, 8192), (8192, 512), (32768, 128))
    ):
        batch, keys, values = paged([(context, new)], kv_heads, dim, dtype, device)
        q = torch.randn(new, q_heads, dim, dtype=dtype, device=device)
        call = partial(attention.paged_attention, q, keys, values, batch, dim**-0.5)
        taken = timing.milliseconds([call]) / 1e3
        pairs = new * (context - new) + new * (new + 1) / 2
        share = 4 * q_heads * dim * pairs / rate / taken
        print(f"  context {context}, new {new}: {1e6 * taken:.1f} ({share:.0%})", flush=True)
        results.append({"context": context, "new": new, "s": taken, "share": share})
        section.keep("prefill", results)


if __name__ == "__main__":
    sys.exit(gpu_section.main("attention", run, minutes=5))
