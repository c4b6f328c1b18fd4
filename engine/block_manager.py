"""Which sequence holds which KV block, and which blocks can be shared by prefix.

Every full block has a key: the digest of its tokens chained to the digest of the block before it,
so equal keys mean equal tokens, and the same adapter, from the start of the sequence. A block whose
reference count falls to zero keeps its content and can be found again by key until it is handed out
for other tokens; the least recently freed goes first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b

from nybble.engine.sequence import Sequence


class BlockManager:
    """Hands out ``num_blocks`` blocks of ``block_size`` tokens each."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens occupy."""
        return -(-tokens // self.block_size)

    def share_prefix(self, sequence: Sequence) -> int:
        """Give a sequence without blocks every cached block its tokens begin with.

        At least one token is left to compute, because the next token is sampled from its logits.
        Returns the number of tokens found.
        """
        assert not sequence.blocks
        for block in self._cached_blocks(sequence):
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
            sequence.blocks.append(block)
        return len(sequence.blocks) * self.block_size

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """How many tokens :meth:`share_prefix` would find now."""
        return sum(self.block_size for _ in self._cached_blocks(sequence))

    def _cached_blocks(self, sequence: Sequence) -> Iterator[int]:
        if not self.prefix_caching:
            return
        for index in range((len(sequence.token_ids) - 1) // self.block_size):
            block = self._block_of.get(self._hash(sequence, index))
            if block is None:
                return
            yield block

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for its first ``tokens`` tokens, or nothing and return False."""
        needed = self.blocks_for(tokens) - len(sequence.blocks)
        if needed > len(self._free):
            return False
        for _ in range(needed):
            block, _none = self._free.popitem(last=False)
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
            self._references[block] = 1
            sequence.blocks.append(block)
        return True

    def publish(self, sequence: Sequence, computed_before: int) -> None:
        """Make the blocks filled since ``computed_before`` tokens findable by their prefix."""
        if not self.prefix_caching:
            return
        first, last = (
            tokens // self.block_size for tokens in (computed_before, sequence.num_computed_tokens)
        )
        for index in range(first, last):
            key, block = self._hash(sequence, index), sequence.blocks[index]
            # Two sequences may compute the same prefix at once; the first copy is the one shared.
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key] = block
                self._key_of[block] = key

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks of a sequence; the deepest are reused first."""
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
        sequence.blocks = []  # another list: who has written this one elsewhere is to see it gone

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            tokens = array("q", sequence.token_ids[start : start + self.block_size])
            parent = hashes[-1] if hashes else sequence.prefix_root
            hashes.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return hashes[index]
