"""How the KV cache is cut into blocks: groups of layers that share block tables.

A sequence keeps the keys and values of all its tokens in layers that see everything, and in layers
with a sliding window only those that its next tokens still see. So layers are put into groups of
one window each, every group has a block table of its own, and a block holds ``block_size`` tokens
of the layers of one group. All groups have the same number of layers, because then all blocks take
the same bytes and any free block serves any group: no part of the memory is set aside for a kind of
layer. A kind with more layers has several groups. A group that is not full wastes the rest of its
blocks.

Layers of different head shapes cannot share blocks: they are one group, which frees blocks only if
all of them have windows. Layers without attention are in no group: what they keep does not grow
(:mod:`nybble.engine.state_cache`).

The scheme is that of vLLM's hybrid KV cache manager.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from nybble.engine.config import EngineConfig
from nybble.models import AnyAttention, Architecture

# Each group costs the host a row of a block table for each sequence and new block.
_MOST_GROUPS = 16
# Fewer groups are preferred if the longest sequence then takes at most so much more memory.
_TOLERANCE = 1.05


def most_blocks(tokens: int, block_size: int, windows: Sequence[int], step_tokens: int) -> int:
    """Blocks that a sequence of ``tokens`` tokens holds at once at most, in all groups.

    windows: for each group, the tokens that one sees, itself included; 0 for all before it.
    step_tokens: the most that one step computes, all of whose blocks and windows are held together.
    """
    all_of_them = -(-tokens // block_size)
    # However they lie, n tokens reach into ⌈(n − 1) / block_size⌉ + 1 blocks.
    return sum(
        min(all_of_them, -(-(window + step_tokens - 2) // block_size) + 1)
        if window
        else all_of_them
        for window in windows
    )


@dataclass(frozen=True)
class KVCacheGroup:
    """Layers that share block tables.

    window: tokens that one sees in these layers, itself included; 0 for all before it. If the
        layers differ, the widest.
    layers: their indexes among the layers with attention.
    """

    window: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class KVCacheLayout:
    """The groups of a model's layers, and what a block of them takes.

    layers: those with attention.
    block_size: tokens in a block.
    block_bytes: of keys, values and their scales for the tokens of a block, in one group.
    step_tokens: the most tokens that a step computes.
    """

    groups: tuple[KVCacheGroup, ...]
    layers: tuple[AnyAttention, ...]
    block_size: int
    block_bytes: int
    step_tokens: int

    @staticmethod
    def of(architecture: Architecture, config: EngineConfig, max_model_len: int) -> KVCacheLayout:
        """The layout for sequences of up to ``max_model_len`` tokens.

        Of the possible groupings the one with the fewest groups among those in which the longest
        sequence takes hardly more than the least memory.
        """
        layers = architecture.attentions
        # A window that no sequence outgrows is none.
        windows = [each.window if each.window < max_model_len else 0 for each in layers]

        def layout(*groups: KVCacheGroup) -> KVCacheLayout:
            size = max(len(group.layers) for group in groups)
            # With several groups all layers have the same shape; one group has all the layers.
            entries = sum(_token_bytes(each, config) for each in layers[:size])
            step = config.max_batched_tokens
            size = config.block_size
            return KVCacheLayout(groups, tuple(layers), size, size * entries, step)

        widest = max(windows) if all(windows) else 0
        choices = [layout(KVCacheGroup(widest, tuple(range(len(layers)))))]
        # Groups use the same memory for layers of different groups.
        if len({(each.kv_heads, each.head_dim) for each in layers}) == 1:
            choices += [layout(*_grouped(windows, size)) for size in range(1, len(layers))]
        choices = [each for each in choices if len(each.groups) <= _MOST_GROUPS]
        least = min(each.sequence_bytes(max_model_len) for each in choices)
        return min(
            (c for c in choices if c.sequence_bytes(max_model_len) <= least * _TOLERANCE),
            key=lambda c: (len(c.groups), c.sequence_bytes(max_model_len)),
        )

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """The window of each group."""
        return tuple(group.window for group in self.groups)

    @cached_property
    def group_of_layer(self) -> tuple[int, ...]:
        """For each layer with attention, the index of its group."""
        found = {layer: index for index, group in enumerate(self.groups) for layer in group.layers}
        return tuple(found[layer] for layer in range(len(found)))

    @cached_property
    def place_in_block(self) -> tuple[int, ...]:
        """For each layer with attention, its place among the layers of its group."""
        found = {layer: place for group in self.groups for place, layer in enumerate(group.layers)}
        return tuple(found[layer] for layer in range(len(found)))

    def table_blocks(self, tokens: int) -> int:
        """Blocks of ``tokens`` tokens in all groups, also of those that are no longer seen."""
        return len(self.groups) * -(-tokens // self.block_size)

    def sequence_blocks(self, tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` tokens holds at once at most."""
        return most_blocks(tokens, self.block_size, self.windows, self.step_tokens)

    def sequence_bytes(self, tokens: int) -> int:
        """Bytes that a sequence of ``tokens`` tokens holds at once at most."""
        return self.sequence_blocks(tokens) * self.block_bytes

    def tokens_in(self, num_blocks: int, mean: float) -> float:
        """Tokens of sequences of ``mean`` tokens that can be in ``num_blocks`` at once.

        More than the blocks' own size if long sequences keep only a part of their tokens.
        """
        mean = max(mean, 1.0)
        return num_blocks * mean / self.sequence_blocks(math.ceil(mean))

    def blocks_in(self, nbytes: int) -> int:
        """Blocks that ``nbytes`` hold. Raises ValueError if that is less than one token needs."""
        least = len(self.groups) * self.block_bytes
        if nbytes < least:
            raise ValueError(
                f"the KV cache of {nbytes} bytes holds no block of {self.block_size} tokens, which "
                f"takes {least} bytes"
            )
        return nbytes // self.block_bytes

    def blocks_for(self, nbytes: int, max_num_seqs: int, max_model_len: int) -> int:
        """Blocks of a KV cache that may take ``nbytes``.

        More than every sequence at full length could fill would only waste memory. Raises
        ValueError like :meth:`blocks_in`.
        """
        return min(self.blocks_in(nbytes), max_num_seqs * self.table_blocks(max_model_len))

    def longest_sequence(self, num_blocks: int, max_model_len: int) -> int:
        """Tokens of the longest sequence that ``num_blocks`` hold, up to ``max_model_len``."""
        if self.sequence_blocks(max_model_len) <= num_blocks:
            return max_model_len
        fits, too_long = 0, -(-max_model_len // self.block_size)  # in blocks' lengths
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.sequence_blocks(middle * self.block_size) <= num_blocks:
                fits = middle
            else:
                too_long = middle
        return fits * self.block_size


def _token_bytes(attention: AnyAttention, config: EngineConfig) -> int:
    """Of what is cached of one token in one layer; 8-bit tensors have a float32 scale a head."""
    heads = attention.cache_tensors * attention.kv_heads
    if config.kv_dtype != "auto":
        return heads * (attention.head_dim + 4)
    return heads * attention.head_dim * config.dtype.itemsize


def _grouped(windows: Sequence[int], size: int) -> Iterator[KVCacheGroup]:
    """Groups of up to ``size`` layers of the same window each."""
    for window in dict.fromkeys(windows):
        layers = tuple(index for index, each in enumerate(windows) if each == window)
        for first in range(0, len(layers), size):
            yield KVCacheGroup(window, layers[first : first + size])
