"""Running out of memory while a model loads: what it needs, what is free, what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nybble.engine import EngineConfig
from nybble.engine.failure import is_out_of_memory
from nybble.engine.runner import free_kv_bytes, kv_bytes_per_block
from nybble.loaders import Checkpoint
from nybble.loaders.footprint import weight_bytes
from nybble.models import architecture_of
from nybble.server.cli.doctor import available_bytes
from nybble.server.cli.sizes import gib


@contextmanager
def memory_explained(checkpoint: Checkpoint, config: EngineConfig) -> Iterator[None]:
    """Raises ValueError for a KV cache that the host has no room for, and instead of an allocation
    that fails.

    The host's memory is looked at beforehand, because the kernel gives out more than there is and
    later ends the process. Weights are mapped there, and so may be larger than what is free.
    """
    device = torch.device(config.device)
    free = available_bytes(device)
    kv = _kv_bytes(checkpoint, config)
    if device.type == "cpu" and kv > free:
        raise ValueError(
            f"the KV cache of {gib(kv)} does not fit: {gib(free)} are free. "
            f"{_would_fit(free, checkpoint, config)}"
        )
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        weights = weight_bytes(checkpoint.folder, config.dtype)
        raise ValueError(
            f"the memory of {device} ran out while loading: the weights take {gib(weights)} and "
            f"the KV cache {gib(kv)}, and {gib(free)} were free. "
            f"{_would_fit(free - weights, checkpoint, config)}"
        ) from error


def _kv_bytes(checkpoint: Checkpoint, config: EngineConfig) -> int:
    """As the engine takes it: no more than every sequence at full length could fill."""
    architecture = architecture_of(checkpoint.config)
    length = min(
        config.max_model_len or architecture.default_max_model_len, architecture.max_model_len
    )
    most = config.max_num_seqs * -(-length // config.block_size)
    nbytes = config.kv_cache_bytes or free_kv_bytes(torch.device(config.device))
    return min(nbytes, most * kv_bytes_per_block(architecture, config))


def _would_fit(room: int, checkpoint: Checkpoint, config: EngineConfig) -> str:
    per_block = kv_bytes_per_block(architecture_of(checkpoint.config), config)
    # A tenth of it is left to activations and whoever else there is.
    blocks = int(0.9 * room) // per_block
    if blocks < 1:
        return (
            "A model that takes less memory would fit: a smaller one, one in 4 bits "
            "(--quantize nf4), or this one with fewer adapter slots (--max-loras)"
        )
    return (
        f"--kv-cache-memory {blocks * per_block >> 20}MiB would fit, which holds "
        f"{blocks * config.block_size:,} tokens"
    )
