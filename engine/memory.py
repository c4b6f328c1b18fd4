"""Memory while a model loads: what it needs, what is free, and what would fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nybble.engine import EngineConfig
from nybble.engine.draft_model import cached_architecture, draft_cache
from nybble.engine.failure import is_out_of_memory
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.parallel import TensorParallel
from nybble.engine.runner import free_kv_bytes
from nybble.engine.state_cache import cache_sizes, state_bytes
from nybble.loaders import Checkpoint
from nybble.loaders.footprint import RoundedParts, weight_bytes
from nybble.loaders.mtp import MtpCheckpoint, draft_bytes
from nybble.models import architecture_of


@contextmanager
def memory_explained(
    checkpoint: Checkpoint, config: EngineConfig, draft: Checkpoint | None = None
) -> Iterator[None]:
    """Raises ValueError, with what would fit, instead of running out of memory in this context.

    draft: of the draft model, if there is one.

    It begins with :func:`check_memory`.
    """
    check_memory(checkpoint, config, draft)
    device = torch.device(config.device)
    free, kv = _free(config), _kv_bytes(checkpoint, config, draft)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        weights = _weight_bytes(checkpoint, config, draft)
        raise ValueError(
            f"the memory of {device} ran out while loading: the weights take {gib(weights)} and "
            f"the KV cache {gib(kv)}, and {gib(free)} were free. "
            f"{_would_fit(free - weights, checkpoint, config, draft)}"
        ) from error


def check_memory(
    checkpoint: Checkpoint,
    config: EngineConfig,
    draft: Checkpoint | None = None,
    rounded: RoundedParts = (None, None),
    draft_rounded: RoundedParts = (None, None),
) -> None:
    """Raises ValueError, with what is missing, if a model cannot be loaded for want of memory.

    It reads config.json and the headers of files alone, also of models as they are stored, so that
    nothing is read or packed in vain.

    draft: of the draft model or the head, if there is one.
    rounded, draft_rounded: the layers and the head that are rounded on the way, of each.

    On a GPU weights are checked. On the CPU they are memory-mapped, so they may be larger than the
    free memory; the KV cache is checked there, because Linux overcommits memory and would later
    kill the process.
    """
    device = torch.device(config.device)
    if device.type == "cuda":
        weights = _weight_bytes(checkpoint, config, draft, rounded, draft_rounded)
        _check_weights(weights, device, config.tensor_parallel_size)
        return
    free, kv = _free(config), _kv_bytes(checkpoint, config, draft)
    if device.type == "cpu" and kv > free:
        asked = config.kv_cache_bytes
        capped = (
            f" (of the {gib(asked)} asked for, all that {config.max_num_seqs} sequences at full "
            "length can fill)"
            if asked is not None and asked > kv
            else ""
        )
        raise ValueError(
            f"the KV cache of {gib(kv)}{capped} does not fit: {gib(free)} are free. "
            f"{_would_fit(free, checkpoint, config, draft)}"
        )


def _free(config: EngineConfig) -> int:
    """Bytes that one rank may take."""
    device = torch.device(config.device)
    free = available_bytes(device)
    # Ranks on the CPU have the same memory.
    return free // config.tensor_parallel_size if device.type == "cpu" else free


def _weight_bytes(
    checkpoint: Checkpoint,
    config: EngineConfig,
    draft: Checkpoint | None,
    rounded: RoundedParts = (None, None),
    draft_rounded: RoundedParts = (None, None),
) -> int:
    """Of rank 0's weights, at least, and of its draft model's."""
    layers, head = rounded
    own = weight_bytes(checkpoint.folder, config.dtype, layers=layers, head=head)
    own //= config.tensor_parallel_size
    if draft is None:
        return own
    if config.tensor_parallel_size > 1 and isinstance(draft, MtpCheckpoint):
        own += draft.output_layer_bytes(config.dtype)  # beside its part of the model's
    layers, head = draft_rounded
    return own + draft_bytes(draft, config.dtype, layers=layers, head=head)


def _check_weights(weights: int, device: torch.device, ranks: int) -> None:
    """Raises ValueError if a rank's weights alone are larger than what is free on its GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    if weights > free:
        each = f" on each of {ranks} GPUs" if ranks > 1 else ""
        raise ValueError(
            f"the weights take {gib(weights)}{each}, {gib(weights - free)} more than the "
            f"{gib(free)} that are free on {device}. A smaller format (--quantize nf4, or a "
            "checkpoint in 4 bits), more GPUs (--tensor-parallel-size), or the CPU "
            "(--device cpu), which maps weights from the disk, may hold them"
        )


def _layout(
    checkpoint: Checkpoint, config: EngineConfig, draft: Checkpoint | None
) -> tuple[KVCacheLayout, int]:
    """The layout of a rank's KV cache, and the tokens of the longest sequence."""
    architecture = architecture_of(checkpoint.config)
    own = TensorParallel(0, config.tensor_parallel_size).part_of(architecture)
    length = min(
        config.max_model_len or architecture.default_max_model_len, architecture.max_model_len
    )
    return KVCacheLayout.of(cached_architecture(own, draft), config, length), length


def _kv_bytes(checkpoint: Checkpoint, config: EngineConfig, draft: Checkpoint | None) -> int:
    """Of the model and of its draft model."""
    layout, length = _layout(checkpoint, config, draft)
    nbytes = config.kv_cache_bytes or free_kv_bytes(torch.device(config.device))
    architecture = architecture_of(checkpoint.config)
    drafts = 0
    if (cache := draft_cache(draft, config, length)) is not None:
        part = cache.bytes_of(nbytes, layout.sequence_bytes(length))
        drafts, nbytes = cache.blocks_in(part) * cache.layout.block_bytes, nbytes - part
    blocks, states = cache_sizes(architecture, config, layout, length, nbytes)
    return blocks * layout.block_bytes + states * state_bytes(architecture, config.dtype) + drafts


def _would_fit(
    room: int, checkpoint: Checkpoint, config: EngineConfig, draft: Checkpoint | None
) -> str:
    layout, length = _layout(checkpoint, config, draft)
    # A tenth of it is left for activations and other processes.
    nbytes, architecture = max(0, int(0.9 * room)), architecture_of(checkpoint.config)
    own = nbytes
    if (cache := draft_cache(draft, config, length)) is not None:
        own -= cache.bytes_of(nbytes, layout.sequence_bytes(length))
    try:
        blocks, _ = cache_sizes(architecture, config, layout, length, own)
    except ValueError:
        return (
            "A model that takes less memory would fit: a smaller one, one in 4 bits "
            "(--quantize nf4), or this one with fewer adapter slots (--max-loras)"
        )
    tokens = layout.tokens_in(blocks, min(length, layout.longest_sequence(blocks, length)))
    return (
        f"A KV cache of {nbytes >> 20} MiB (--kv-cache-memory) would fit, "
        f"which holds {int(tokens):,} tokens"
    )


def available_bytes(device: torch.device) -> int:
    """Memory a server may take, of the GPU (less a part for activations) or of the host."""
    if device.type == "cuda":
        return free_kv_bytes(device)
    return min(_host_bytes(), container_bytes())


def _host_bytes() -> int:
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def container_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit (control groups, version 2) leaves; files' pages can be dropped."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62
    if limit == "max":
        return 1 << 62
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))


def gib(nbytes: int) -> str:
    """``7.40 GiB``, or ``12.3 MiB`` if it is less than one."""
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:,.2f} GiB"
