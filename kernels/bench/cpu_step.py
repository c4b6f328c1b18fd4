"""Where the time of a decode step goes on the CPU, and how much of it is reading from memory.

    python kernels/bench/cpu_step.py [--rows 1,8] [--context 512]

The model has the sizes of Qwen2.5-0.5B with random 4-bit weights (group 128), without the head.
Each layer has weights and keys of its own, so that they come from memory as in a model. `floor` is
the time to read a part's bytes at the measured read bandwidth, as a share of the part's time.
NYBBLE_CPU_TARGET chooses the kernels. Times are the least of several repetitions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nybble.engine.request import SamplingParams
from nybble.engine.sampler import SequenceSampler, sample
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.backend import backend_for
from nybble.kernels.bench.cpu_matmul import packed
from nybble.kernels.matmul import packed_matmul

LAYERS, VOCAB, GROUP, BLOCK = 24, 151936, 128, 16
HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64
SHAPES = {  # (in, out)
    "qkv": (896, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
    "o": (896, 896),
    "gate_up": (896, 9728),
    "down": (4864, 896),
}
BACKEND = backend_for(torch.device("cpu"), torch.bfloat16)
# As Qwen2.5's generation_config has it.
SAMPLING = SamplingParams(
    temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1, max_tokens=1 << 30
)


def least(call: Callable[[], object], repeats: int = 12) -> float:
    """Seconds of the fastest of ``repeats`` calls.

    With one thread it is the thread's own time, without that of others on the same core.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def matmul_part(columns: int, out: int, rows: int) -> tuple[Callable[[], object], int]:
    """The layers' products of one projection, and the bytes of their weights."""
    weights = [packed(columns, out, GROUP, torch.float16) for _ in range(LAYERS)]
    x = torch.randn(rows, columns).bfloat16()
    return lambda: [packed_matmul(x, weight) for weight in weights], sum(
        weight.nbytes for weight in weights
    )


def attention_part(context: int, rows: int) -> tuple[Callable[[], object], int]:
    """The layers' attention of ``rows`` sequences, and the bytes of their keys and values."""
    blocks = -(-context // BLOCK)
    shape = (2, rows * blocks, KV_HEADS, BLOCK, HEAD_DIM)
    caches = [torch.randn(shape).bfloat16() for _ in range(LAYERS)]
    batch = AttentionBatch(
        query_start=torch.arange(rows + 1, dtype=torch.int32),
        context_lens=torch.full((rows,), context, dtype=torch.int32),
        block_tables=torch.arange(rows * blocks, dtype=torch.int32).view(rows, -1),
        slot_mapping=torch.zeros(rows, dtype=torch.int64),
        max_query=1,
    )
    q = torch.randn(rows, HEADS, HEAD_DIM).bfloat16()

    def call() -> list[Tensor]:
        return [BACKEND.paged_attention(q, k, v, batch, HEAD_DIM**-0.5) for k, v in caches]

    return call, sum(cache.nbytes for cache in caches)


def sampling_part(context: int, rows: int) -> tuple[Callable[[], object], int]:
    """Penalties and sampling, and the bytes of the logits."""
    prompts = torch.randint(0, VOCAB, (rows, context)).tolist()
    samplers = [SequenceSampler(SAMPLING, tuple(prompt)) for prompt in prompts]
    logits = 3 * torch.randn(rows, VOCAB)
    return lambda: sample(BACKEND, logits, samplers), logits.nbytes


def bandwidth() -> float:
    """The read bandwidth in bytes per second: a sum over 512 MiB."""
    data = torch.ones(1 << 26, dtype=torch.int64)
    return data.nbytes / least(data.sum, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,8", help="rows of a step, separated by commas")
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence")
    options = parser.parse_args()
    read = bandwidth()
    print(f"read bandwidth {read / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    for rows in map(int, options.rows.split(",")):
        parts = {name: matmul_part(*shape, rows) for name, shape in SHAPES.items()}
        parts["attention"] = attention_part(options.context, rows)
        parts["sampling"] = sampling_part(options.context, rows)
        times = {name: least(call) for name, (call, _) in parts.items()}
        print(f"\n{rows} rows{'ms':>12}{'share':>8}{'MB':>8}{'GB/s':>8}{'floor':>8}")
        for name, (_, size) in parts.items():
            took = times[name]
            print(
                f"{name:>10}{took * 1e3:>8.2f}{took / sum(times.values()):>8.0%}"
                f"{size / 1e6:>8.1f}{size / took / 1e9:>8.1f}{size / took / read:>8.0%}"
            )
        print(f"{'all':>10}{sum(times.values()) * 1e3:>8.2f}")


if __name__ == "__main__":
    main()
