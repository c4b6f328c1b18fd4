"""A decode step of a mixture of experts on the CPU beside a dense model that reads the same bytes.

    python engine/bench/mixture_step.py [--layers 4] [--rounds 40]

Both have random 4-bit weights and the sizes of Qwen3-30B-A3B's layers (2,048 wide; 128 experts of
768, 8 for a token); the dense model's MLP is as wide as the experts of a token together. A step of
one sequence with a context of 400 tokens, but for its sampling, in turns. Milliseconds, medians: of
the clock, and of the process's processor time in all its threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from nybble.engine import EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.request import Request, SamplingParams
from nybble.engine.runner import ModelRunner
from nybble.engine.scheduler import ScheduledSequence
from nybble.engine.sequence import BlockTable, Sequence
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.bench.cpu_matmul import packed
from nybble.models import Architecture, architecture_of

BF16, GROUP, BLOCK, CONTEXT = torch.bfloat16, 128, 16, 400
EXPERTS, TOP_K, WIDTH = 128, 8, 768
SIZES = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": CONTEXT + BLOCK,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": WIDTH,
        "norm_topk_prob": True,
    },
    "qwen3": {"intermediate_size": TOP_K * WIDTH},
}


def random_weights(
    about: Architecture,
) -> Iterator[tuple[str, PackedWeight | DenseWeight | Tensor]]:
    """A model's weights, by name."""
    yield about.embedding + ".weight", torch.randn(about.vocab, about.hidden, dtype=BF16)
    yield about.final_norm + ".weight", torch.ones(about.hidden, dtype=BF16)
    for index, layer in enumerate(about.layers):
        for name in (layer.pre_attention, layer.pre_mlp):
            yield about.module(index, f"{name}.weight"), torch.ones(about.hidden, dtype=BF16)
        for name in (name for mixer in layer.mixers for name in mixer.norms):
            yield about.module(index, name + ".weight"), torch.ones(SIZES["head_dim"], dtype=BF16)
        for name in layer.tensors:
            yield about.module(index, name), torch.randn(EXPERTS, about.hidden)
        for group in (*layer.groups, *layer.expert_groups):
            weight = packed(group.inputs, group.out, GROUP, torch.float16)
            # Of a product in which nothing overflows.
            weight.scales.mul_(0.1 * group.inputs**-0.5)
            yield about.module(index, group.name), weight


def runner_of(family: str, layers: int) -> tuple[ModelRunner, int]:
    """A model that can run, and how many blocks its KV cache has."""
    config = AutoConfig.for_model(family, num_hidden_layers=layers, **SIZES, **MODELS[family])
    about = architecture_of(config)
    length = CONTEXT + BLOCK
    decoder = Decoder(
        about, random_weights(about), device=torch.device("cpu"), dtype=BF16, max_model_len=length
    )
    settings = EngineConfig(max_num_seqs=1, max_batched_tokens=CONTEXT, block_size=BLOCK)
    layout = KVCacheLayout.of(decoder.architecture, settings, length)
    blocks = layout.table_blocks(length)
    return ModelRunner(decoder, settings, layout, blocks), blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    runners = {family: runner_of(family, options.layers) for family in MODELS}
    taken: dict[str, list[tuple[float, float]]] = {family: [] for family in MODELS}
    for number in range(options.rounds + 1):
        for family, (runner, blocks) in runners.items():
            prompt = tuple(torch.randint(0, SIZES["vocab_size"], (CONTEXT,)).tolist())
            one = Sequence(Request("r", prompt, SamplingParams()), 1, None, None)  # type: ignore[arg-type]
            one.block_tables = (BlockTable(list(range(blocks))),)
            if number:
                one.num_computed_tokens = CONTEXT - 1
            step = [ScheduledSequence.of(one, 1 if number else CONTEXT)]
            clock, processor = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                logits = runner.run(step)
            assert logits.isfinite().all()
            if number:
                taken[family].append((time.perf_counter() - clock, time.process_time() - processor))
    print(f"{torch.get_num_threads()} threads, {options.layers} layers")
    print(f"{'':12}{'ms':>8}{'CPU':>8}")
    medians = {}
    for family, times in taken.items():
        medians[family] = [1e3 * statistics.median(each) for each in zip(*times, strict=True)]
        print(f"{family:12}" + "".join(f"{each:>8.2f}" for each in medians[family]))
    mixture, dense = medians.values()
    print(f"{'ratio':12}" + "".join(f"{a / b:>8.2f}" for a, b in zip(mixture, dense, strict=True)))


if __name__ == "__main__":
    main()
