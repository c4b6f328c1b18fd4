"""Which sequence holds which KV block, and which blocks can be shared by prefix.

Every full block has a key: the digest of its tokens chained to the digest of the block before it,
so equal keys mean equal tokens, and the same adapter, from the start of the sequence. A block whose
reference count falls to zero keeps its content and can be found again by key until it is handed out
for other tokens; the least recently freed goes first.

Where every layer has a sliding window, blocks that even the widest no longer sees are taken back
while their sequence runs, and a prefix is found by those it still sees. A single layer without a
window keeps them all: a block holds the keys and values of all layers.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence as Several
from hashlib import blake2b

from nybble.engine.sequence import CachedPrefix, Sequence

# Stands in a sequence's list for a block it no longer sees. Nothing reads what it names.
_UNSEEN = 0


def most_blocks(tokens: int, block_size: int, window: int, step_tokens: int) -> int:
    """Blocks that a sequence of ``tokens`` tokens holds at once at most.

    window: tokens that one sees, itself included; 0 for all before it. step_tokens: the most that
    one step computes, all of whose blocks and windows are held together.
    """
    most = -(-tokens // block_size)
    if not window:
        return most
    # However they lie, n tokens reach into ⌈(n − 1) / block_size⌉ + 1 blocks.
    return min(most, -(-(window + step_tokens - 2) // block_size) + 1)


class BlockManager:
    """Hands out ``num_blocks`` blocks of ``block_size`` tokens each.

    window: tokens that one sees in any layer, itself included; 0 where a layer sees all.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, window: int = 0, prefix_caching: bool = True
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.window = window
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
        """Give a sequence without blocks the longest prefix of its tokens that is cached.

        At least one token is left to compute, because the next token is sampled from its logits.
        Returns the number of tokens found.
        """
        assert not sequence.blocks
        found = self._cached_blocks(sequence)
        unseen = self._unseen_blocks(len(found) * self.block_size)
        for block in found[unseen:]:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        sequence.blocks += [_UNSEEN] * unseen + found[unseen:]
        sequence.num_unseen_blocks = unseen
        return len(found) * self.block_size

    def cached_prefix(self, sequence: Sequence) -> CachedPrefix:
        """What :meth:`share_prefix` would find now; takes time in proportion to the tokens."""
        found = self._cached_blocks(sequence)
        tokens = len(found) * self.block_size
        seen = found[self._unseen_blocks(tokens) :]
        return CachedPrefix(tokens, sum(self._references[block] > 0 for block in seen))

    def fits(self, sequence: Sequence, needed: int, leaving: Several[Sequence]) -> bool:
        """Whether a waiting sequence can hold ``needed`` blocks, those of its prefix shared.

        leaving: sequences whose blocks would be taken back before.
        """
        held = Counter(block for each in leaving for block in each.blocks[each.num_unseen_blocks :])
        freed = {block for block, count in held.items() if count == self._references[block]}
        shared = 0
        if sequence.may_share_prefix:
            found = self._cached_blocks(sequence)
            seen = found[self._unseen_blocks(len(found) * self.block_size) :]
            shared = sum(self._references[block] > 0 and block not in freed for block in seen)
        return needed - shared <= len(self._free) + len(freed)

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest prefix that lacks none of those its next token sees."""
        found: list[int] = []
        length = lacking = 0  # blocks of that prefix; blocks up to the last one that is not cached
        if self.prefix_caching:
            for index in range((len(sequence.token_ids) - 1) // self.block_size):
                block = self._block_of.get(self._hash(sequence, index))
                found.append(_UNSEEN if block is None else block)
                if block is None:
                    lacking = index + 1
                    if not self.window:
                        break
                elif lacking <= self._unseen_blocks((index + 1) * self.block_size):
                    length = index + 1
        return found[:length]

    def _unseen_blocks(self, tokens: int) -> int:
        """Leading blocks that none of the tokens after the first ``tokens`` sees."""
        return max(0, tokens - self.window + 1) // self.block_size if self.window else 0

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

    def release_unseen(self, sequence: Sequence) -> None:
        """Take back the blocks that no token still to be computed sees."""
        before = sequence.num_unseen_blocks
        unseen = self._unseen_blocks(sequence.num_computed_tokens)
        if unseen > before:
            self._take_back(sequence.blocks[before:unseen])
            sequence.blocks[before:unseen] = [_UNSEEN] * (unseen - before)
            sequence.num_unseen_blocks = unseen

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks of a sequence; the deepest are reused first."""
        self._take_back(sequence.blocks[sequence.num_unseen_blocks :])
        # A new list, not clear(): InputBuffers recognises rows by this list's identity.
        sequence.blocks = []
        sequence.num_unseen_blocks = 0

    def _take_back(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            tokens = array("q", sequence.token_ids[start : start + self.block_size])
            parent = hashes[-1] if hashes else sequence.prefix_root
            hashes.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return hashes[index]
