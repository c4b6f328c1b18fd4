"""The small kernels of a decode step: the time of each, and its share of the copy bandwidth."""

from __future__ import annotations

import sys
from functools import partial

from nybble.kernels.bench import gpu_section
from nybble.kernels.bench.gpu_section import BLOCK, LLAMA_2_13B, TINY, Section

# isort: split
import torch

from nybble.kernels.reference import TokenChoice
from nybble.kernels.triton import activation, norm, rotary, sampling, timing


def run(section: Section) -> None:
    shape = TINY if section.dry else LLAMA_2_13B
    for rows in (3,) if section.dry else (1, 32, 64):
        section.attempt(f"{rows} rows", partial(time_rows, section, shape, rows))


def time_rows(section: Section, shape: dict[str, int], rows: int) -> None:
    """Time each kernel on ``rows`` tokens."""
    device = section.device
    random = partial(torch.randn, dtype=section.dtype, device=device)
    hidden, inter, heads = (
        shape[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    dim, vocab = hidden // heads, shape["vocab_size"]
    x, residual, weight = random(rows, hidden), random(rows, hidden), random(hidden)
    gate_up = random(rows, 2 * inter)
    q, k, v = random(rows, 3 * heads, dim).chunk(3, dim=1)
    angle = torch.randn(rows, dim, device=device)
    caches = random(2, rows, heads, BLOCK, dim)
    slots = torch.arange(rows, device=device) * BLOCK
    logits = torch.randn(rows, vocab, device=device)
    choice = TokenChoice(0.8, 50, 0.95, 0.0, 0.5)
    calls: dict[str, tuple[timing.Call, int]] = {
        "add_rms_norm": (partial(norm.add_rms_norm, x, residual, weight, 1e-5), 8 * x.numel()),
        "gated": (partial(activation.gated, gate_up, "silu"), 3 * gate_up.numel()),
        "rotary_store": (
            partial(rotary.rotary_store, q, k, v, angle, angle, caches[0], caches[1], slots),
            12 * q.numel(),
        ),
    }
    taken = {name: timing.milliseconds([call] * 20) / 1e3 for name, (call, _) in calls.items()}
    # It copies its choices from the host, so it is timed by the clock and not in a graph.
    sample = partial(sampling.sample_tokens, logits, [choice] * rows)
    taken["sample_tokens"] = timing.by_clock(sample, 3 if section.dry else 30) / 1e3
    moved = {name: nbytes for name, (_, nbytes) in calls.items()}
    for name, seconds in taken.items():
        share = f" ({moved[name] / section.read / seconds:.0%})" if name in moved else ""
        print(f"  {rows:>4} rows {name:>14}: {1e6 * seconds:8.1f} µs{share}", flush=True)
    section.keep(f"{rows} rows", taken)


if __name__ == "__main__":
    sys.exit(gpu_section.main("step", run, minutes=2))
