"""LoRA of rank 16 on every projection of a Llama-2-13B layer, with another adapter in every row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from nybble.kernels.bench import gpu_section
from nybble.kernels.bench.gpu_section import LLAMA_2_13B, TINY, Section

# isort: split
import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.bench.gpu_matmul import random_packed
from nybble.kernels.lora import LoRASlots, Matrices
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.matmul import packed_matmul
from nybble.kernels.triton import lora, timing


def adapters(
    count: int,
    rank: int,
    inputs: int,
    offsets: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    ranks: Sequence[int] | None = None,
) -> LoRASlots:
    """Random adapters in ``count`` slots, of ``rank`` or of these ``ranks``."""

    def matrix(rank: int, width: int, size: float = 1) -> Tensor:
        return (torch.randn(rank, width, device=device) * size).to(dtype)

    found = [
        [
            Matrices(matrix(own, inputs, inputs**-0.5), matrix(own, end - start)) if own else None
            for start, end in pairwise(offsets)
        ]
        for own in ranks or [rank] * count
    ]
    if not any(ranks or [rank]):
        return LoRASlots.empty(count, inputs, offsets, rank, dtype, device)
    return replace(LoRASlots.of(found, inputs, offsets), max_rank=rank)


def run(section: Section) -> None:
    device, dry, read = section.device, section.dry, section.read
    shape = TINY if dry else LLAMA_2_13B
    hidden, inter = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    rows, rank = (4, 8) if dry else (32, 16)
    dtype = section.dtype
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
        slots = adapters(rows, rank, inputs, offsets, dtype, device)
        x = torch.randn(rows, inputs, dtype=dtype, device=device)
        weight_bytes += weight.nbytes
        adapter_bytes += rows * rank * (len(outputs) * inputs + offsets[-1]) * dtype.itemsize

        def without(x: Tensor = x, weight: PackedWeight = weight) -> Tensor:
            return packed_matmul(x, weight)

        def with_(
            x: Tensor = x,
            weight: PackedWeight = weight,
            rest: tuple[Any, ...] = (slots, batch),
        ) -> None:
            lora.lora_add(packed_matmul(x, weight), x, *rest)

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
    found = {"base": base, "adapted": full, "weights": weight_bytes, "adapters": adapter_bytes}
    section.keep("lora", found)


if __name__ == "__main__":
    sys.exit(gpu_section.main("lora", run, minutes=2))
