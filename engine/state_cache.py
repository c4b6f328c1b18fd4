"""The states of layers that keep no keys and values: who holds which, and which can be shared.

Such a layer (:data:`nybble.models.Recurrent`) keeps of each sequence tensors of one size, however
long it is. They lie in slots: a slot has the states of all these layers after a number of tokens.
Every running sequence holds one. The others hold snapshots, so that the prefix cache serves these
layers too: the states after a prefix cannot be computed from keys and values, so a cached prefix is
usable only up to a border of a block at which a snapshot was taken.

A snapshot costs as much as a running sequence, which may be as much as the keys and values of
thousands of tokens, so not every border has one. The last border in each chunk of a prompt that is
computed gets one, if it is before the prompt's last token: that of a whole prompt serves the same
prompt again, and the next turn of a conversation. If more blocks of a prompt are cached than any
snapshot reaches, the chunk ends there and gets a snapshot at its end: so a beginning that prompts
have in common is found from the third of them on. A snapshot is known by the key of the block it
follows, is forgotten with it, and the least recently used goes first if a slot is wanted.

A step that verifies drafts keeps the states after each of its tokens, in slots that it takes for
the time of the step. Which of them the sequence goes on with is known once it is known which tokens
were right.

The scheme is that of SGLang's and vLLM's caches of Mamba states.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import torch

from nybble.engine.config import EngineConfig
from nybble.engine.kv_cache import KVCacheLayout
from nybble.models import Architecture

# States may take this part of the cache's memory, and more only if running sequences need it.
_SHARE, _LARGEST_SHARE = 1 / 8, 1 / 2


@dataclass
class SequenceState:
    """What a running sequence holds, and what its next step does with it.

    slot: of its own states. read: where they are before the next step, −1 for nowhere as no token
        has been computed.
    branch: tokens after which the next snapshot is wanted; 0 for no place in particular.
    snapshot: the slot that the next step writes a snapshot to, −1 for none. snapshot_tokens: after
        how many tokens of the sequence.
    between: slots for the states after each token of the next step but the last, if it verifies a
        draft; empty if it verifies none.
    """

    slot: int
    read: int = -1
    branch: int = 0
    snapshot: int = -1
    snapshot_tokens: int = 0
    between: list[int] = field(default_factory=list)


def state_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Of one slot: the states of all layers of one sequence. 0 if all layers have attention."""
    return sum(
        math.prod(state.shape) * (torch.float32 if state.wide else dtype).itemsize
        for mixer in architecture.recurrents
        for state in mixer.states
    )


def state_slots(
    architecture: Architecture, config: EngineConfig, max_model_len: int, nbytes: int
) -> int:
    """How many slots a cache of ``nbytes`` has; 0 if the model needs none.

    As many as all sequences at full length hold and leave behind, and their drafts, if they take no
    more than an eighth of the memory; one for each running sequence, if they take no more than
    half; as many as half of it holds, if that is fewer: then fewer sequences run at once.

    Raises ValueError if not one fits.
    """
    each = state_bytes(architecture, config.dtype)
    if not each:
        return 0
    wanted = config.max_num_seqs
    if config.prefix_caching:
        wanted *= 2 + -(-max_model_len // config.max_batched_tokens)
    if config.speculate != "off":
        wanted += config.max_num_seqs * config.max_draft_tokens
    room = max(nbytes * _SHARE, min(config.max_num_seqs * each, nbytes * _LARGEST_SHARE))
    count = min(wanted, int(room // each))
    if not count:
        raise ValueError(
            f"the KV cache of {nbytes} bytes is too small for the states of one sequence, which "
            f"take {each} bytes; at least {2 * each} are needed"
        )
    return count


def cache_sizes(
    architecture: Architecture,
    config: EngineConfig,
    layout: KVCacheLayout,
    max_model_len: int,
    nbytes: int,
) -> tuple[int, int]:
    """Blocks, and slots for states, of a cache of ``nbytes``. Raises ValueError if too few."""
    slots = state_slots(architecture, config, max_model_len, nbytes)
    left = nbytes - slots * state_bytes(architecture, config.dtype)
    return layout.blocks_for(left, config.max_num_seqs, max_model_len), slots


class StateCache:
    """Hands out ``num_slots`` slots to sequences, and keeps snapshots in the others.

    There are at least as many slots as sequences that run at once. Snapshots that a step reads
    keep theirs until it is computed, so a sequence may have to wait a step: :meth:`has_room`.
    """

    def __init__(
        self, num_slots: int, max_num_seqs: int, block_size: int, *, snapshots: bool = True
    ) -> None:
        assert num_slots >= max_num_seqs
        self.num_slots = num_slots
        self._block_size = block_size
        self._snapshots = snapshots
        self._free = list(range(num_slots))
        self._holders = 0
        # By the key of the block they follow, the least recently used first.
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()
        # Snapshots that a scheduled step reads, and how many sequences read each.
        self._readers: Counter[int] = Counter()

    @property
    def num_held(self) -> int:
        """Slots of running sequences."""
        return self._holders

    def has_room(self) -> bool:
        """Whether a sequence can begin now."""
        return len(self._free) + len(self._slot_of) > len(self._readers)

    @property
    def num_snapshots(self) -> int:
        return len(self._slot_of)

    def has(self, key: bytes) -> bool:
        """Whether there is a snapshot after the block with this key."""
        return key in self._slot_of

    def begin(self, key: bytes | None, branch: int = 0) -> SequenceState:
        """The state of a sequence that begins to run.

        key: of the last block of its cached prefix, of which there is a snapshot; None if it has
            no such prefix.
        """
        self._holders += 1
        if key is None:
            return SequenceState(self._take(), branch=branch)
        snapshot = self._slot_of[key]
        self._slot_of.move_to_end(key)
        # A snapshot that is being read is no longer there for other sequences to take.
        self._readers[snapshot] += 1
        slot = self._find()
        if slot is not None:
            return SequenceState(slot, read=snapshot, branch=branch)
        # There is no other slot, so this one goes on in the snapshot's own.
        assert self._readers[snapshot] == 1, "a sequence began for which there was no slot"
        del self._readers[snapshot], self._slot_of[key]
        return SequenceState(snapshot, read=snapshot, branch=branch)

    def limit(self, state: SequenceState, start: int, count: int) -> int:
        """How many of the next ``count`` tokens a step may compute that begins at ``start``."""
        return min(count, state.branch - start) if state.branch > start else count

    def plan(self, state: SequenceState, start: int, stop: int, known: int) -> None:
        """Settle whether a step over tokens ``start`` to ``stop`` of a sequence takes a snapshot.

        known: its tokens so far. The last of them is always computed, so that nobody looks for the
        states after it; so a step that decodes takes no snapshot.
        """
        self._give_up_snapshot(state)
        border = min(stop, known - 1) // self._block_size * self._block_size
        if not self._snapshots or border <= start:
            return
        slot = self._find()
        if slot is not None:
            state.snapshot, state.snapshot_tokens = slot, border

    def verify(self, state: SequenceState, count: int) -> int:
        """Take slots for a draft of ``count`` tokens; returns how many of them can be verified.

        Like blocks of cached prefixes, snapshots that nobody reads make room.
        """
        while len(state.between) < count and (slot := self._find()) is not None:
            state.between.append(slot)
        return len(state.between)

    def computed(self, state: SequenceState, key: bytes | None, accepted: int = 0) -> None:
        """A step has computed the states.

        key: of the block that the step's snapshot follows; None if it took none.
        accepted: how many tokens of its draft.
        """
        self._stop_reading(state)
        if state.between:
            slots = [*state.between, state.slot]
            state.slot = slots.pop(accepted)
            self._free += slots
            state.between = []
        state.read = state.slot
        if key is not None and state.snapshot >= 0:
            if key in self._slot_of:
                self._slot_of.move_to_end(key)
                self._free.append(state.snapshot)
            else:
                self._slot_of[key] = state.snapshot
            state.snapshot = -1

    def release(self, state: SequenceState) -> None:
        """Take back what a sequence holds."""
        self._holders -= 1
        self._stop_reading(state)
        self._give_up_snapshot(state)
        self._free += [state.slot, *state.between]
        state.between = []

    def forget(self, key: bytes) -> None:
        """The block that a snapshot follows is no longer cached."""
        slot = self._slot_of.get(key)
        if slot is not None and slot not in self._readers:
            del self._slot_of[key]
            self._free.append(slot)

    def _stop_reading(self, state: SequenceState) -> None:
        if state.read not in (-1, state.slot):
            self._readers[state.read] -= 1
            self._readers += Counter()  # drops those nobody reads

    def _give_up_snapshot(self, state: SequenceState) -> None:
        if state.snapshot >= 0:
            self._free.append(state.snapshot)
            state.snapshot = -1

    def _take(self) -> int:
        slot = self._find()
        assert slot is not None, "more sequences run than there are slots"
        return slot

    def _find(self) -> int | None:
        """A free slot, or that of the least recently used snapshot that nobody reads."""
        if self._free:
            return self._free.pop()
        for key, slot in self._slot_of.items():
            if slot not in self._readers:
                del self._slot_of[key]
                return slot
        return None
