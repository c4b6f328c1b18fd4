"""A mixture's MLP on the CPU beside a dense one that reads the same bytes, alternating in one run.

    python -m nybble.kernels.bench.cpu_mixture

One token, with the sizes of published models. The dense MLP is as wide as the experts of a token
together. Each call uses other experts, and other dense weights, so that neither finds its weights
in a cache. Columns are milliseconds of one layer (median) and their ratio.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from nybble.kernels.backend import Backend, backend_for
from nybble.kernels.bench.cpu_matmul import medians, packed

# hidden, an expert's intermediate, experts, experts of a token, group
MODELS = {
    "Qwen3-30B-A3B": (2048, 768, 128, 8, 128),
    "OLMoE-7B": (2048, 1024, 64, 8, 128),
    "gpt-oss-20B": (2880, 2880, 32, 4, 32),
    "Mixtral-8x7B": (4096, 14336, 8, 2, 128),
}
BF16 = torch.bfloat16
CALLS = 64


def calls(
    backend: Backend, hidden: int, width: int, experts: int, top_k: int, group: int
) -> dict[str, Callable[[], object]]:
    def up_and_down(inner: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (hidden, 2 * inner), (inner, hidden)

    up, down = (
        backend.grouped_linear([packed(*size, group, torch.float16) for _ in range(experts)], BF16)
        for size in up_and_down(width)
    )
    # Made before they are timed.
    made = [
        tuple(
            backend.linear(packed(*size, group, torch.float16), BF16)
            for size in up_and_down(top_k * width)
        )
        for _ in range(max(2, experts // top_k))
    ]
    dense = itertools.cycle(made)
    ids = itertools.cycle([torch.randperm(experts)[None, :top_k] for _ in range(CALLS)])
    x, weights = torch.randn(1, hidden).to(BF16), torch.full((1, top_k), 1 / top_k)

    def of_mixture() -> Tensor:
        chosen = next(ids)
        return down(backend.gated(up(x, chosen, None), "silu"), chosen, weights)

    def of_dense() -> Tensor:
        first, second = next(dense)
        return second(backend.gated(first(x), "silu"))

    return {"mixture": of_mixture, "dense": of_dense}


def main() -> None:
    backend = backend_for(torch.device("cpu"), BF16)
    print(f"{torch.get_num_threads()} threads")
    print(f"{'model':>14}{'mixture':>10}{'dense':>10}{'ratio':>8}")
    with torch.inference_mode():
        for name, sizes in MODELS.items():
            found = medians(calls(backend, *sizes), CALLS)
            ratio = found["mixture"] / found["dense"]
            print(f"{name:>14}{found['mixture']:>10.2f}{found['dense']:>10.2f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
