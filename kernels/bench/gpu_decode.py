"""Decode of a 4-bit model with the sizes of Llama-2-13B, through the engine's runner and sampler.

Measures eager steps and CUDA graphs, with 16-bit and 8-bit KV caches, and with kernels that
overlap. Reports tokens per second of wall time, and `floor`, the time needed to move the weights
and the KV cache at the copy bandwidth. Captured steps are checked against eager ones first.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from nybble.kernels.bench import gpu_section
from nybble.kernels.bench.gpu_section import BLOCK, LLAMA_2_13B, TINY, Section
from nybble.models import architecture_of

# isort: split
import torch
from torch import Tensor
from transformers import LlamaConfig

from nybble.engine.config import EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.graphs import cuda_capture
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.request import Request, SamplingParams
from nybble.engine.runner import ModelRunner
from nybble.engine.sampler import SequenceSampler, sample
from nybble.engine.scheduler import ScheduledSequence
from nybble.engine.sequence import BlockTable, Sequence
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.bench.gpu_matmul import random_packed
from nybble.kernels.triton import overlap
from nybble.kernels.triton.warmup import warmup


def random_weights(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, PackedWeight | DenseWeight | Tensor]]:
    """Random weights in 4 bits, made on the device as they are asked for."""
    hidden, inter = config.hidden_size, config.intermediate_size
    assert config.num_key_value_heads is not None
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    dense = partial(torch.randn, dtype=dtype, device=device)
    yield "model.embed_tokens.weight", dense(config.vocab_size, hidden)
    yield "model.norm.weight", torch.ones(hidden, dtype=dtype, device=device)
    yield "lm_head", DenseWeight(dense(config.vocab_size, hidden) * hidden**-0.5)
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
            yield prefix + name, random_packed(inputs, outputs, device)


def random_decoder(
    shape: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[Decoder, int]:
    """A 4-bit decoder of random weights on the device, and the bytes a step reads of it."""
    config = LlamaConfig(**shape)
    total = 0

    def weights() -> Iterator[tuple[str, PackedWeight | DenseWeight | Tensor]]:
        nonlocal total
        for name, weight in random_weights(config, dtype, device):
            if isinstance(weight, DenseWeight):
                total += weight.weight.nbytes
            elif isinstance(weight, PackedWeight):
                total += weight.nbytes
            yield name, weight

    length = int(config.max_position_embeddings)
    decoder = Decoder(
        architecture_of(config), weights(), device=device, dtype=dtype, max_model_len=length
    )
    return decoder, total


class Recomputed:
    """Takes the place of a CUDA graph in a dry run: a replay computes the function again."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function, self.out = function, function()

    def replay(self) -> None:
        self.out.copy_(self.function())


def dry_capture(function: Callable[[], Tensor]) -> tuple[Recomputed, Tensor]:
    captured = Recomputed(function)
    return captured, captured.out


def sequences(count: int, context: int, room: int, vocab: int) -> list[Sequence]:
    """Greedy sequences in the middle of decoding: the KV cache holds all but the last token."""
    found, params = [], SamplingParams(temperature=0, ignore_eos=True)
    for index in range(count):
        prompt = tuple(torch.randint(0, vocab, (context,)).tolist())
        sampler = SequenceSampler(params, prompt)
        made = Sequence(Request(str(index), prompt, params), room, None, sampler)  # type: ignore[arg-type]
        made.num_computed_tokens = context - 1
        per = -(-(context + room) // BLOCK)
        made.block_tables = (BlockTable(list(range(index * per, (index + 1) * per))),)
        found.append(made)
    return found


def step(runner: ModelRunner, running: list[Sequence]) -> list[int]:
    """One decode step as the engine does it, without answering clients."""
    batch = [ScheduledSequence.of(sequence, 1) for sequence in running]
    logits = runner.run(batch)
    tokens = [
        token
        for token, _ in sample(
            runner.decoder.backend, logits, [sequence.sampler for sequence in running]
        )
    ]
    for sequence, token in zip(running, tokens, strict=True):
        sequence.num_computed_tokens += 1
        sequence.token_ids.append(token)
    return tokens


def run(section: Section) -> None:
    dry, device = section.dry, section.device
    shape, sizes = (TINY, (1, 4)) if dry else (LLAMA_2_13B, (1, 8, 32, 64))
    context, steps = (40, 3) if dry else (512, 40)
    dtype = torch.float32 if dry else torch.bfloat16
    start = time.monotonic()
    decoder, weight_bytes = random_decoder(shape, dtype, device)
    largest, room = max(sizes), 4 * steps + 16
    config = EngineConfig(
        device=device.type, dtype=dtype, max_num_seqs=largest, max_batched_tokens=max(64, largest)
    )
    blocks = largest * -(-(context + room) // BLOCK)
    if not dry:
        warmup(decoder.packed_weights(), dtype, largest, "silu")
    print(f"model made in {time.monotonic() - start:.0f} s", flush=True)
    results: list[dict[str, Any]] = []
    kinds: tuple[Literal["auto", "int8", "fp8"], ...] = ("auto", "int8", "fp8")
    for kv_dtype in kinds:
        if kv_dtype == "fp8" and not dry and torch.cuda.get_device_capability() < (8, 9):
            continue
        one = replace(config, kv_dtype=kv_dtype)
        layout = KVCacheLayout.of(decoder.architecture, one, context + room)
        runner = ModelRunner(decoder, one, layout, blocks)
        for caches in runner.caches:
            for cache in caches:
                # Caches and scales must hold finite numbers, whatever their dtype.
                cache.copy_(torch.randn(cache.shape, device=device).abs().clamp(max=3))

        def measure(captured: bool, runner: ModelRunner = runner, one: EngineConfig = one) -> None:
            measure_steps(
                section, runner, one, captured, weight_bytes, sizes, context, steps, room, results
            )

        # Eager steps first, so that there are results if capturing fails.
        if kv_dtype == "auto":
            section.attempt("eager decode", partial(measure, False))
        section.attempt(
            f"capture, {kv_dtype}", partial(capture, section, runner, sizes, context, room)
        )
        section.attempt(f"captured decode, {kv_dtype}", partial(measure, True))
        if kv_dtype == "auto":
            section.attempt(
                "overlapping kernels",
                partial(measure_overlapping, section, runner, sizes, context, room, measure),
            )
        del runner, measure
        if not dry:
            torch.cuda.empty_cache()


def capture(
    section: Section, runner: ModelRunner, sizes: tuple[int, ...], context: int, room: int
) -> None:
    """Capture the decode step and check it against the eager one."""
    vocab = runner.decoder.architecture.vocab
    three = [ScheduledSequence.of(one, 1) for one in sequences(3, context, room, vocab)]
    expected = runner.run(three).clone()
    capture = dry_capture if section.dry else cuda_capture(section.device)
    runner.capture(capture, False, sorted({*sizes, 4}))
    found = runner.run(three).clone()
    # Four rows may be split in another way than three, which rounds differently; 40 layers
    # amplify the difference.
    section.close("captured decode step, padded to 4", found, expected, 0.05)
    section.holds("captured twice the same", torch.equal(found, runner.run(three)))
    # Another sequence through the same graphs, in blocks of its own, must leave nothing behind.
    (other,) = sequences(1, context // 3, room, vocab)
    other.block_tables = sequences(4, context, room, vocab)[3].block_tables
    again = runner.run([ScheduledSequence.of(other, 1)]).clone()
    section.holds("another sequence, other logits", not torch.equal(again, found[:1]))
    section.holds("and the first ones again", torch.equal(found, runner.run(three)))


def measure_overlapping(
    section: Section,
    runner: ModelRunner,
    sizes: tuple[int, ...],
    context: int,
    room: int,
    measure: Callable[[bool], None],
) -> None:
    """Captured steps whose kernels begin while the one before is finishing, off by default."""
    overlap.OVERLAP = True
    try:
        capture(section, runner, sizes, context, room)
        measure(True)
    finally:
        overlap.OVERLAP = False


def measure_steps(
    section: Section,
    runner: ModelRunner,
    config: EngineConfig,
    captured: bool,
    weight_bytes: int,
    sizes: tuple[int, ...],
    context: int,
    steps: int,
    room: int,
    results: list[dict[str, Any]],
) -> None:
    how = "CUDA graphs" if captured else "eager"
    how += ", overlapping kernels" * overlap.OVERLAP
    architecture = runner.decoder.architecture
    print(
        f"decode, {how}, {config.kv_dtype} KV, {len(architecture.layers)} layers, "
        f"context {context}:"
    )
    print(f"{'batch':>7}{'ms a step':>12}{'tokens/s':>12}{'floor ms':>12}{'share':>8}")
    per_token = runner.layout.block_bytes // config.block_size
    for size in sizes:
        if section.out_of_time:
            print("out of time")
            break
        running = sequences(size, context, room, architecture.vocab)
        taken = []
        for _ in range(steps):
            begin = time.perf_counter()
            step(runner, running)
            taken.append(time.perf_counter() - begin)
        median = statistics.median(taken[len(taken) // 4 :])
        floor = (weight_bytes + size * (context + steps / 2) * per_token) / section.read
        print(
            f"{size:>7}{1e3 * median:>12.3f}{size / median:>12.0f}{1e3 * floor:>12.3f}"
            f"{floor / median:>8.0%}",
            flush=True,
        )
        entry = {"batch": size, "s": median, "floor": floor, "tokens/s": size / median}
        kinds = {"graphs": captured, "overlap": overlap.OVERLAP, "kv": config.kv_dtype}
        results.append(kinds | entry)
        section.keep("decode", results)


if __name__ == "__main__":
    sys.exit(gpu_section.main("decode", run, minutes=4))
