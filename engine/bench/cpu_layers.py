"""What it saves on the CPU to compute decoder layers in one call instead of part by part.

    python engine/bench/cpu_layers.py MODEL [--streams 1,8] [--context 400] [--rounds 20]

MODEL is a model's name as `serve` takes it. Both ways compute the same steps in turns: a decode
step of so many sequences, and a prompt of `--context` tokens. Times are medians in milliseconds: of
the clock, and of the process's processor time in all its threads. `functions` are calls of Python
functions in a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from nybble.engine import EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.parts import Block, FusedLayers
from nybble.engine.request import Request, SamplingParams
from nybble.engine.runner import ModelRunner
from nybble.engine.scheduler import ScheduledSequence
from nybble.engine.sequence import BlockTable, Sequence
from nybble.models import architecture_of
from nybble.quantizers.prepare import prepare_checkpoint

BLOCK = 16


def calls_of(function: Callable[[], object]) -> int:
    """How many Python functions one call of ``function`` calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    function()
    sys.setprofile(None)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--streams", default="1,8", help="of a step, separated by commas")
    parser.add_argument("--context", type=int, default=400, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    most = max(map(int, options.streams.split(",")))
    source = prepare_checkpoint(options.model, device=torch.device("cpu"))
    length = options.context + BLOCK
    decoder = Decoder(
        architecture_of(source.config),
        source.weights(),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        max_model_len=length,
    )
    config = EngineConfig(max_num_seqs=most, max_batched_tokens=options.context, block_size=BLOCK)
    layout = KVCacheLayout.of(decoder.architecture, config, length)
    blocks = layout.table_blocks(length)
    runner = ModelRunner(decoder, config, layout, blocks * most)
    (together,) = decoder._blocks
    parts: list[Block] = []
    for block in together:
        parts += block.blocks if isinstance(block, FusedLayers) else [block]
    each = blocks // len(layout.groups)

    def sequence(number: int, computed: int) -> Sequence:
        prompt = tuple(torch.randint(0, decoder.architecture.vocab, (options.context,)).tolist())
        one = Sequence(Request("r", prompt, SamplingParams()), 1, None, None)  # type: ignore[arg-type]
        first = number * blocks
        one.block_tables = tuple(
            BlockTable(list(range(first + group * each, first + (group + 1) * each)))
            for group in range(len(layout.groups))
        )
        one.num_computed_tokens = computed
        return one

    steps = {
        f"decode, {count} streams": [
            ScheduledSequence.of(sequence(row, options.context - 1), 1) for row in range(count)
        ]
        for count in map(int, options.streams.split(","))
    }
    steps["prompt"] = [ScheduledSequence.of(sequence(0, 0), options.context)]
    print(f"{torch.get_num_threads()} threads; {len(parts)} blocks, {len(together)} calls")
    print(f"{'':20}{'by part: ms':>12}{'CPU':>8}{'functions':>11}{'one call':>12}{'CPU':>8}")
    for name, batch in steps.items():
        taken: dict[str, list[tuple[float, float]]] = {"parts": [], "together": []}
        functions = {}
        for _ in range(1 + (options.rounds if name != "prompt" else options.rounds // 5)):
            for way, way_blocks in (("parts", parts), ("together", together)):
                decoder._blocks = [way_blocks]
                clock, processor = time.perf_counter(), time.process_time()
                with torch.inference_mode():
                    runner.run(batch)
                taken[way].append((time.perf_counter() - clock, time.process_time() - processor))
        for way, way_blocks in (("parts", parts), ("together", together)):
            decoder._blocks = [way_blocks]
            with torch.inference_mode():
                functions[way] = calls_of(partial(runner.run, batch))
        row = f"{name:20}"
        for way, times in taken.items():
            clocks, processors = zip(*times[1:], strict=True)
            clock, processor = statistics.median(clocks), statistics.median(processors)
            row += f"{clock * 1e3:>12.1f}{processor * 1e3:>8.1f}{functions[way]:>11}"
        print(row)


if __name__ == "__main__":
    main()
