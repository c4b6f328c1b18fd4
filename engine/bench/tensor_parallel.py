"""What several ranks cost and gain: gathers and bytes a step, their time, and tokens a second.

    python engine/bench/tensor_parallel.py MODEL [--ranks 2] [--streams 1 8] [--rounds 3]

One rank and several take turns within each round, so that whatever else the machine does meets
both. On a CPU give each rank a core of its own: with OMP_NUM_THREADS=1 one rank has one core too.
The outputs are compared: they must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace

from torch import Tensor

from nybble import LLM, SamplingParams
from nybble.engine.parallel import TensorParallel

PROMPT = tuple(range(5, 37))


@dataclass
class Counted:
    """Gathers of rank 0, which are every rank's."""

    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def reset(self) -> None:
        self.calls, self.nbytes, self.seconds = 0, 0, 0.0


def count_gathers() -> Counted:
    """Have gathers counted from now on. nbytes: what a rank receives of the others."""
    counted, gather = Counted(), TensorParallel.gather

    def timed(group: TensorParallel, own: Tensor) -> Tensor:
        begin = time.perf_counter()
        whole = gather(group, own)
        counted.seconds += time.perf_counter() - begin
        counted.calls += 1
        counted.nbytes += own.numel() * own.itemsize * (group.size - 1)
        return whole

    TensorParallel.gather = timed  # type: ignore[method-assign, assignment]
    return counted


def generate(llm: LLM, streams: int, tokens: int) -> tuple[list[tuple[int, ...]], float]:
    """What the streams say, and the seconds that it took."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    prompts = [(*PROMPT, stream) for stream in range(streams)]
    begin = time.perf_counter()
    found = [completion.token_ids for completion in llm.generate(prompts, params)]
    return found, time.perf_counter() - begin


def measure(model: str, ranks: int, streams: list[int], rounds: int, tokens: int) -> None:
    taken: dict[tuple[int, int], list[float]] = {}
    said: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    gathers: dict[int, tuple[Counted, int]] = {}
    counted = count_gathers()
    for _ in range(rounds):
        for size in (1, ranks):
            with LLM(model, tensor_parallel_size=size, progress=False) as llm:
                generate(llm, 1, 4)
                for count in streams:
                    counted.reset()
                    before = llm._engine.stats().steps
                    said[size, count], seconds = generate(llm, count, tokens)
                    steps = llm._engine.stats().steps - before
                    taken.setdefault((size, count), []).append(seconds)
                    if size > 1:
                        gathers[count] = replace(counted), steps
    print(f"{'streams':>8}{'ranks':>7}{'tokens/s':>10}{'in gathers':>12}")
    for (size, count), times in sorted(taken.items(), key=lambda item: (item[0][1], item[0][0])):
        rate = count * tokens / statistics.median(times)
        share = f"{gathers[count][0].seconds / times[-1]:.0%}" if size > 1 else ""
        print(f"{count:>8}{size:>7}{rate:>10.1f}{share:>12}")
    for count, (seen, steps) in gathers.items():
        if not seen.calls:
            print("gathers: within CUDA graphs, where they cannot be counted")
            continue
        each = 1e6 * seen.seconds / seen.calls
        print(
            f"{count} streams: in {steps} steps {seen.calls / steps:.0f} gathers each, of "
            f"{each:.0f} µs, in which a rank received {seen.nbytes / steps / 1024:.1f} KiB a step"
        )
    for count in streams:
        same = said[1, count] == said[ranks, count]
        print(f"{count} streams: outputs {'are the same' if same else 'DIFFER'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    options = parser.parse_args()
    measure(options.model, options.ranks, options.streams, options.rounds, options.tokens)


if __name__ == "__main__":  # the other ranks import this file
    main()
