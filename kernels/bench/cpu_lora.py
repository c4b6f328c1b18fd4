"""The cost of adapters in a decode step on the CPU: a batch with and without them, alternating.

    python kernels/bench/cpu_lora.py [--lora-dtype int8]

The model has the sizes of Qwen2.5-0.5B and random 4-bit weights (group 128). Every row of the batch
has an adapter of its own on all projections. `floor` is the time needed to read the bytes of the
adapters at the measured read bandwidth, as a share of the base model's time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Qwen2Config

from nybble.engine.adapter_slots import AdapterSlots, StepAdapters
from nybble.engine.decoder import Decoder
from nybble.kernels import PackedWeight
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import SYMMETRIC_LEVELS
from nybble.loaders import LoRAAdapter
from nybble.loaders.adapter import LoRAModule
from nybble.models import architecture_of

KV_HEADS, HEAD_DIM = 2, 64
CONFIG = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=KV_HEADS,
    tie_word_embeddings=True,
)
CONTEXT, BLOCK = 256, 16
BATCHES = (1, 4, 8)
RANKS = (8, 16, 64)  # of the adapters


def packed(out: int, columns: int) -> PackedWeight:
    return PackedWeight(
        qweight=torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8),
        scales=(torch.rand(out, columns // 128) * 0.01).half(),
        zeros=None,
        levels=SYMMETRIC_LEVELS,
        out_features=out,
        in_features=columns,
        group_size=128,
    )


def weights() -> Iterator[tuple[str, PackedWeight | Tensor]]:
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    kv = KV_HEADS * HEAD_DIM
    for layer in range(CONFIG.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        qkv = packed(hidden + 2 * kv, hidden)
        yield prefix + "self_attn.qkv_proj", replace(qkv, bias=torch.zeros(qkv.out_features))
        yield prefix + "self_attn.o_proj", packed(hidden, hidden)
        yield prefix + "mlp.gate_up_proj", packed(2 * inner, hidden)
        yield prefix + "mlp.down_proj", packed(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", torch.ones(hidden)
    yield "model.norm.weight", torch.ones(hidden)
    yield "model.embed_tokens.weight", torch.randn(CONFIG.vocab_size, hidden).bfloat16()


def adapter(rank: int) -> LoRAAdapter:
    modules = {
        name: LoRAModule(torch.randn(rank, each.inputs), torch.randn(each.out, rank) * 0.01, 1.0)
        for name, each in architecture_of(CONFIG).linears.items()
    }
    return LoRAAdapter(modules, bytes(16))


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, by name; the calls alternate."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times[2:]) for name, times in taken.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lora-dtype", choices=["auto", "int8"], default="auto")
    in_8_bits = parser.parse_args().lora_dtype == "int8"
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    data = torch.ones(1 << 26, dtype=torch.int64)
    bandwidth = data.nbytes / (medians({"sum": data.sum}, 5)["sum"] / 1e3)
    del data
    most = max(BATCHES)
    architecture = architecture_of(CONFIG)
    decoder = Decoder(architecture, weights(), device=cpu, dtype=torch.bfloat16, max_model_len=512)
    slots = AdapterSlots(
        architecture,
        count=most,
        max_rank=max(RANKS),
        device=cpu,
        dtype=torch.bfloat16,
        in_8_bits=in_8_bits,
    )
    blocks = CONTEXT // BLOCK
    shape = (most * blocks, KV_HEADS, BLOCK, HEAD_DIM)
    caches = [
        (torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16())
        for _ in range(CONFIG.num_hidden_layers)
    ]
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    print(f"{'rank':>5}{'batch':>6}{'base ms':>9}{'lora ms':>9}{'over base':>11}{'floor':>8}")
    for rank in RANKS:
        each = [slots.stage(adapter(rank)) for _ in range(most)]
        start = time.perf_counter()
        for slot, staged in enumerate(each):
            slots.fill(slot, staged)
        filled = (time.perf_counter() - start) / most * 1e3
        for rows in BATCHES:
            ids = torch.randint(0, 1000, (rows,))
            positions = torch.full((rows,), CONTEXT - 1)
            tables = torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks)
            batch = AttentionBatch(
                query_start=torch.arange(rows + 1, dtype=torch.int32),
                context_lens=torch.full((rows,), CONTEXT, dtype=torch.int32),
                block_tables=tables,
                slot_mapping=tables[:, -1].long() * BLOCK + BLOCK - 1,
                max_query=1,
            )
            lora = LoRABatch.of(list(range(rows)), cpu)
            assert lora is not None
            adapters = slots.for_step(lora, decoder.backend)

            def step(
                with_adapters: bool,
                arguments: tuple[Tensor, Tensor] = (ids, positions),
                batch: AttentionBatch = batch,
                adapters: StepAdapters = adapters,
            ) -> Tensor:
                active = adapters if with_adapters else None
                return decoder.logits(
                    decoder.forward(*arguments, caches, [batch] * len(caches), active)
                )

            times = medians({"base": lambda: step(False), "lora": lambda: step(True)}, 25)
            over = times["lora"] / times["base"] - 1
            floor = rows * staged.nbytes / bandwidth * 1e3 / times["base"]
            print(
                f"{rank:>5}{rows:>6}{times['base']:>9.1f}{times['lora']:>9.1f}"
                f"{over:>10.1%} {floor:>7.1%}"
            )
        print(f"      one adapter of {staged.nbytes / 1e6:.1f} MB into a slot: {filled:.1f} ms")


if __name__ == "__main__":
    main()
