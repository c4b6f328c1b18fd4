"""Two ranks compute a model together (`--tensor-parallel-size 2`), and what one rank computes.

With two GPUs each rank has its own: NCCL, with steps eager and captured. With one GPU both are on
it and exchange through the host, eager only: that checks the kernels on halves of weights, not
NCCL.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from nybble.engine.parallel import ALONE, TensorParallel
from nybble.engine.ranks import Ranks
from nybble.engine.runner import ModelRunner
from nybble.engine.scheduler import ScheduledSequence
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.bench.gpu_decode import random_weights, sequences
from nybble.loaders import Checkpoint

_CONTEXT, _ROOM = 40, 8


@dataclass
class RandomCheckpoint:
    """Random weights that are the same at every rank."""

    shape: dict[str, Any]
    dtype: torch.dtype
    device: str
    format: str = "packed"
    folder: Path = Path("random weights")

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(**self.shape)

    def weights(self) -> Iterator[tuple[str, PackedWeight | DenseWeight | Tensor]]:
        torch.manual_seed(0)
        device = torch.device(self.device)
        yield from random_weights(self.config, self.dtype, device)


def run(section: Section) -> None:
    gpus = 0 if section.dry else torch.cuda.device_count()
    devices = [
        torch.device("cuda", min(rank, gpus - 1)) if gpus else section.device for rank in (0, 1)
    ]
    shape = dict(TINY) if section.dry else LLAMA_2_13B | {"num_hidden_layers": 2}
    checkpoint: Checkpoint = RandomCheckpoint(shape, torch.bfloat16, section.device.type)
    config = EngineConfig(device=section.device.type, max_num_seqs=4, max_batched_tokens=64)
    expected = steps(decoder_of(checkpoint, ALONE, section), config)
    ranks = Ranks(devices)
    try:
        vocab = shape["vocab_size"]
        two = replace(config, tensor_parallel_size=2, tune=False)
        ranks.tell("load", checkpoint, two, _CONTEXT + _ROOM, vocab)
        decoder = decoder_of(checkpoint, ranks.group, section)
        ranks.answers()
        found = steps(decoder, two, ranks)
        for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            section.close(f"two ranks, step {index}", mine, theirs, 0.05)
            print(f"    bit for bit: {torch.equal(mine, theirs)}")
        if gpus > 1:
            for mine, theirs in zip(
                steps(decoder, two, ranks, captured=True), expected, strict=True
            ):
                section.close("two ranks, captured", mine, theirs, 0.05)
    finally:
        ranks.close()


def decoder_of(checkpoint: Checkpoint, group: TensorParallel, section: Section) -> Decoder:
    return Decoder(
        architecture_of(checkpoint.config),
        checkpoint.weights(),
        device=section.device,
        dtype=torch.bfloat16,
        max_model_len=_CONTEXT + _ROOM,
        group=group,
    )


def steps(
    decoder: Decoder, config: EngineConfig, ranks: Ranks | None = None, captured: bool = False
) -> list[Tensor]:
    """Logits of a prefill of three sequences, and of the decode step after it."""
    layout = KVCacheLayout.of(decoder.architecture, config, _CONTEXT + _ROOM)
    blocks = 4 * -(-(_CONTEXT + _ROOM) // BLOCK)
    if ranks is None:
        runner = ModelRunner(decoder, config, layout, blocks)
    else:
        ranks.tell("begin", layout, blocks)
        runner = ranks.new_runner(decoder, config, layout, blocks)
        ranks.answers()
    if captured:
        assert ranks is not None
        ranks.tell("capture", (4,))
        runner.capture(cuda_capture(runner.device), False, (4,))
    torch.manual_seed(1)
    running = sequences(3, _CONTEXT, _ROOM, decoder.architecture.vocab)
    found = []
    for start, length in ((0, 20), (20, 20), (_CONTEXT - 1, 1)):
        for each in running:
            each.num_computed_tokens = start
        batch = [ScheduledSequence.of(each, length) for each in running]
        found.append(runner.run(batch).clone())
    return found[1:]


if __name__ == "__main__":
    sys.exit(gpu_section.main("ranks", run, minutes=1))
