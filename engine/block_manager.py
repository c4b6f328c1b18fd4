"""Which sequence holds which KV block, and which blocks can be shared by prefix.

Layers are in groups with a block table each (:mod:`nybble.engine.kv_cache`); the groups take their
blocks from one pool.

Every full block has a key: its group, and the digest of its tokens chained to the digest of the
block before it. So equal keys mean equal tokens, and the same adapter, from the start of the
sequence. A block whose reference count falls to zero keeps its content and can be found again by
key until it is handed out for other tokens; the least recently freed goes first.

In a group whose layers have a sliding window, blocks that it no longer sees are taken back while
their sequence runs. A prefix is found if each group still has what the next token sees of it, and,
if layers keep states, if there is a snapshot of them at its end (:mod:`nybble.engine.state_cache`).
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Several
from hashlib import blake2b
from typing import NamedTuple

from nybble.engine.kv_cache import most_blocks
from nybble.engine.sequence import BlockTable, CachedPrefix, CachedTokens
from nybble.engine.state_cache import StateCache

# Stands in a block table for a block that is no longer seen. Nothing reads what it names.
_UNSEEN = 0


class _Prefix(NamedTuple):
    """What is cached of a sequence's beginning.

    tables: blocks of the longest prefix of which each group has all that the next token sees, and
        of which there is a snapshot if layers keep states. Empty if there is none.
    length: blocks of that prefix.
    branch: blocks of the longest prefix that would be found if it had a snapshot.
    """

    tables: tuple[BlockTable, ...] = ()
    length: int = 0
    branch: int = 0


class BlockManager:
    """Hands out ``num_blocks`` blocks of ``block_size`` tokens each.

    windows: for each group of layers, the tokens that one sees, itself included; 0 for all.
    states: of layers that keep no keys and values; None if there are none.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        windows: Several[int] = (0,),
        prefix_caching: bool = True,
        states: StateCache | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = tuple(windows)
        self.prefix_caching = prefix_caching
        self.states = states
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._key_of: dict[int, tuple[int, bytes]] = {}
        self._block_of: dict[tuple[int, bytes], int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def most_blocks(self, tokens: int, step_tokens: int) -> int:
        """Blocks that a sequence holds at once at most; see :func:`most_blocks`."""
        return most_blocks(tokens, self.block_size, self.windows, step_tokens)

    def share_prefix(self, sequence: CachedTokens) -> int:
        """Give a sequence without blocks the longest prefix of its tokens that is cached.

        At least one token is left to compute, because the next token is sampled from its logits.
        If layers keep states, it gets a slot for them too. Returns the number of tokens found.
        """
        assert not sequence.block_tables
        prefix = self._cached(sequence) if sequence.may_share_prefix else _Prefix()
        for block in _held(prefix.tables):
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        if prefix.tables:
            sequence.block_tables = prefix.tables
        if self.states is not None:
            key = self._hash(sequence, prefix.length - 1) if prefix.length else None
            sequence.state = self.states.begin(key, prefix.branch * self.block_size)
        return prefix.length * self.block_size

    def cached_prefix(self, sequence: CachedTokens) -> CachedPrefix:
        """What :meth:`share_prefix` would find now; takes time in proportion to the tokens."""
        tables, length, _ = self._cached(sequence)
        in_use = sum(self._references[block] > 0 for block in _held(tables))
        return CachedPrefix(length * self.block_size, in_use)

    def fits(self, sequence: CachedTokens, needed: int, leaving: Several[CachedTokens]) -> bool:
        """Whether a waiting sequence can hold ``needed`` blocks, those of its prefix shared.

        leaving: sequences whose blocks would be taken back before.
        """
        held = Counter(block for each in leaving for block in _held(each.block_tables))
        freed = {block for block, count in held.items() if count == self._references[block]}
        shared = 0
        if sequence.may_share_prefix:
            found = _held(self._cached(sequence).tables)
            shared = sum(self._references[block] > 0 and block not in freed for block in found)
        return needed - shared <= len(self._free) + len(freed)

    def _cached(self, sequence: CachedTokens) -> _Prefix:
        if not self.prefix_caching:
            return _Prefix()
        tables = tuple(BlockTable() for _ in self.windows)
        length = branch = 0
        lacking = [0] * len(tables)  # of each group: blocks up to the last one that is not cached
        for index in range((len(sequence.token_ids) - 1) // self.block_size):
            key = self._hash(sequence, index)
            for group, table in enumerate(tables):
                block = self._block_of.get((group, key))
                table.blocks.append(_UNSEEN if block is None else block)
                if block is None:
                    lacking[group] = index + 1
            if any(lacks and not w for lacks, w in zip(lacking, self.windows, strict=True)):
                break
            tokens = (index + 1) * self.block_size
            if all(
                lacks <= self._unseen_blocks(group, tokens) for group, lacks in enumerate(lacking)
            ):
                branch = index + 1
                if self.states is None or self.states.has(key):
                    length = branch
        for group, table in enumerate(tables):
            unseen = self._unseen_blocks(group, length * self.block_size)
            table.blocks = [_UNSEEN] * unseen + table.blocks[unseen:length]
            table.num_unseen = unseen
        return _Prefix(tables if length else (), length, branch)

    def _unseen_blocks(self, group: int, tokens: int) -> int:
        """Leading blocks that none of the tokens after the first ``tokens`` sees in a group."""
        window = self.windows[group]
        return max(0, tokens - window + 1) // self.block_size if window else 0

    def grow(self, sequence: CachedTokens, tokens: int) -> bool:
        """Give the sequence blocks for its first ``tokens`` tokens, or nothing and return False."""
        needed = -(-tokens // self.block_size) - sequence.num_table_blocks
        if needed <= 0:
            return True
        if needed * len(self.windows) > len(self._free):
            return False
        if not sequence.block_tables:
            sequence.block_tables = tuple(BlockTable() for _ in self.windows)
        for table in sequence.block_tables:
            table.blocks += [self._take() for _ in range(needed)]
        return True

    def _take(self) -> int:
        """The block that has been free the longest; what it held is forgotten."""
        block, _ = self._free.popitem(last=False)
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
            group, digest = key
            if self.states is not None and not self.windows[group]:
                self.states.forget(digest)
        self._references[block] = 1
        return block

    def publish(self, sequence: CachedTokens, computed_before: int, accepted: int = 0) -> None:
        """Make what was computed since ``computed_before`` tokens findable by its prefix.

        accepted: how many tokens of a draft that was verified.
        """
        if self.states is not None and (state := sequence.state) is not None:
            last = state.snapshot_tokens // self.block_size - 1
            border = self._hash(sequence, last) if state.snapshot >= 0 else None
            self.states.computed(state, border, accepted)
        if not self.prefix_caching:
            return
        first, last = (
            tokens // self.block_size for tokens in (computed_before, sequence.num_computed_tokens)
        )
        for index in range(first, last):
            for group, table in enumerate(sequence.block_tables):
                key, block = (group, self._hash(sequence, index)), table.blocks[index]
                # Two sequences may compute the same prefix at once; the first copy is shared.
                if key not in self._block_of and block not in self._key_of:
                    self._block_of[key] = block
                    self._key_of[block] = key

    def release_unseen(self, sequence: CachedTokens) -> None:
        """Take back the blocks that no token still to be computed sees."""
        for group, table in enumerate(sequence.block_tables):
            if not self.windows[group]:
                continue
            before = table.num_unseen
            unseen = self._unseen_blocks(group, sequence.num_computed_tokens)
            if unseen > before:
                self._take_back(reversed(table.blocks[before:unseen]))
                table.blocks[before:unseen] = [_UNSEEN] * (unseen - before)
                table.num_unseen = unseen

    def release(self, sequence: CachedTokens) -> None:
        """Take back all blocks of a sequence; the deepest are reused first."""
        tables = sequence.block_tables
        for index in reversed(range(sequence.num_table_blocks)):
            self._take_back(table.blocks[index] for table in tables if index >= table.num_unseen)
        # Another tuple: InputBuffers recognises rows by its identity.
        sequence.block_tables = ()
        if self.states is not None and sequence.state is not None:
            self.states.release(sequence.state)
            sequence.state = None

    def _take_back(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def _hash(self, sequence: CachedTokens, index: int) -> bytes:
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            tokens = array("q", sequence.token_ids[start : start + self.block_size])
            parent = hashes[-1] if hashes else sequence.prefix_root
            mark = sequence.prefix_mark(start, start + self.block_size)
            hashes.append(blake2b(parent + mark + tokens.tobytes(), digest_size=16).digest())
        return hashes[index]


def _held(tables: Iterable[BlockTable]) -> Iterator[int]:
    for table in tables:
        yield from table.held
