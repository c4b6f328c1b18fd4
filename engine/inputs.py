"""A step's inputs: built on the host with numpy, sent to the device in one copy.

The work of a step is proportional to its new tokens and new blocks. Block tables stay where they
are between steps, on the host and on the device: while the same sequences follow each other in the
batch, only blocks that a sequence has gained are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.engine.prompt_reader import PromptReader
from nybble.engine.sequence import BlockTable, CachedTokens
from nybble.engine.transfer import send
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.state_batch import StateBatch

_ALIGNMENT = 16  # of each array, which kernels are compiled for
_STATES = ("read", "write", "snapshot", "snapshot_rows")  # of StateBatch


class StepItem(Protocol):
    """What is computed of one sequence; see :class:`nybble.engine.scheduler.ScheduledSequence`."""

    @property
    def sequence(self) -> CachedTokens: ...

    @property
    def start(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def num_logits(self) -> int: ...

    @property
    def decodes(self) -> bool:
        """Whether it is one token, after which the next is sampled, and nothing else."""
        ...

    @property
    def verifies(self) -> bool:
        """Whether it is the last token known and a draft behind it."""
        ...

    @property
    def prompt_reader(self) -> PromptReader | None: ...


@dataclass(frozen=True)
class StepInputs:
    """What the decoder computes in one step, on its device.

    token_ids, positions: int64 ``(tokens,)``.
    attention: for each layer that has it; layers of one group share it.
    last_rows: int64 ``(sampling,)``, the rows whose logits are wanted.
    lora: the adapters of the rows, None if no row has one.
    states: of the layers without attention, None if there are none.
    """

    token_ids: Tensor
    positions: Tensor
    attention: Several[AttentionBatch]
    last_rows: Tensor
    lora: LoRABatch | None
    states: StateBatch | None = None


@dataclass(frozen=True)
class StepMessage:
    """A step as rank 0 tells it to the other ranks: what it has written, not what it means.

    size: what :meth:`InputBuffers._tensors_of_size` takes.
    data: the bytes of all inputs but the block tables.
    blocks_at, blocks: the entries of the block tables that have changed, and what they are now.
    padded_to: sequences that the batch is padded to, whose graph is run; 0 if it is not. width: the
        rows of each of them. rows: those of all, if each has as many as it computes; otherwise 0.
    reads: the first row and the number of rows of which prompt readers want all logits.
    """

    size: tuple[int, int, int, int, tuple[int, int, int] | None, tuple[int, ...] | None]
    data: bytes
    blocks_at: list[int]
    blocks: list[int]
    padded_to: int
    width: int
    rows: int
    reads: list[tuple[int, int]]


@lru_cache(maxsize=512)
def _layout(
    tokens: int, seqs: int, groups: int, states: bool
) -> tuple[dict[str, tuple[int, int, Any]], int]:
    """Where each array lies, as (offset, length, dtype), and the bytes of all. Fixed for a size, so
    that a captured graph finds its inputs where they were."""
    sizes = {
        "token_ids": (tokens, np.int64),
        "positions": (tokens, np.int64),
        "slot_mapping": (groups * tokens, np.int64),
        "last_rows": (tokens, np.int64),
        "query_start": (seqs + 1, np.int32),
        "context_lens": (seqs, np.int32),
        "lora_slots": (tokens, np.int32),
        "lora_order": (tokens, np.int32),
        "lora_starts": (seqs + 1, np.int32),
        "lora_segments": (seqs, np.int32),
    }
    if states:
        sizes |= dict.fromkeys(_STATES, (seqs, np.int32))
    places, offset = {}, 0
    for name, (length, dtype) in sizes.items():
        places[name] = (offset, length, dtype)
        offset += -(-length * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
    return places, offset


class InputBuffers:
    """The memory that inputs are built in. Inputs are valid until the next are built.

    group_of_layer: the index of the group of each layer with attention, which has block tables of
        its own.
    states: whether there are layers that keep states.
    tell: called with every step of a batch, for the other ranks; None if there are none.
    """

    def __init__(
        self,
        *,
        max_seqs: int,
        max_tokens: int,
        max_blocks: int,
        block_size: int,
        group_of_layer: Several[int],
        device: torch.device,
        states: bool = False,
    ) -> None:
        self.tell: Callable[[StepMessage], None] | None = None
        on_gpu = device.type == "cuda"
        self.block_size = block_size
        self.max_blocks = max_blocks
        self._group_of_layer = group_of_layer
        groups = self._groups = max(group_of_layer) + 1
        self._states = states
        _, size = _layout(max(max_tokens, max_seqs), max_seqs, groups, states)
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
        self._bytes: NDArray[np.uint8] = self._host.numpy()
        self._device = self._host if not on_gpu else torch.zeros_like(self._host, device=device)
        # When the last copy has left the host's memory, which may be long after it was asked for.
        self._sent = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        tables = torch.zeros(groups, max_seqs, max_blocks, dtype=torch.int32)
        self._tables: NDArray[np.int32] = tables.numpy()
        self._device_tables = tables if not on_gpu else tables.to(device)
        # Steps of one size have their inputs in the same place: decode steps look them up.
        self._tensors = lru_cache(maxsize=512)(self._tensors_of_size)
        # Which sequence's tables each row holds, and how many blocks of them. Tables and not
        # sequences: one that loses its blocks may find others, and its old row, in the same step.
        self._written: list[tuple[tuple[BlockTable, ...], int]] = []

    def build(
        self,
        batch: Several[StepItem],
        lora_slots: Several[int] | None = None,
        pad_to: int = 0,
        width: int = 1,
        pad_rows: int = 0,
    ) -> StepInputs:
        """The inputs of a scheduled batch.

        lora_slots: the adapter slot of each scheduled sequence, −1 for none; None for none at all.
            It is used from the position on at which the sequence's adapter is active.
        pad_to: for a batch of which every row is sampled, the sequences to pad it to, with ones
            that have no context. Logits are then wanted of every row.
        width: the rows to which each sequence is padded then, behind its own. What pads the batch
            writes nothing.
        pad_rows: for any batch, the rows to pad it to, behind all sequences. Those that pad it to
            ``pad_to`` have none then, and logits are wanted of the rows that are sampled.
        """
        if self._sent is not None:
            self._sent.synchronize()
        updates = self._update_tables(batch)
        seqs = max(len(batch), pad_to)
        counts = np.full(seqs, 0 if pad_rows else width, np.int64)
        starts = np.zeros(seqs, np.int64)
        padded = width > 1
        token_ids: list[int] = []
        for row, item in enumerate(batch):
            starts[row] = item.start
            token_ids += item.token_ids
            if padded:
                token_ids += [0] * (width - item.num_tokens)
            else:
                counts[row] = item.num_tokens
        tokens = pad_rows or int(counts.sum())
        places, used = _layout(tokens, seqs, self._groups, self._states)

        def array(name: str) -> NDArray[Any]:
            offset, length, dtype = places[name]
            end = offset + length * np.dtype(dtype).itemsize
            return self._bytes[offset:end].view(dtype)

        real = len(token_ids)
        array("token_ids")[:real] = token_ids
        array("token_ids")[real:] = 0
        query_start = array("query_start")
        query_start[0] = 0
        np.cumsum(counts, out=query_start[1:])
        context_lens = array("context_lens")
        context_lens[:] = starts + counts
        context_lens[len(batch) :] = 0
        if tokens == seqs and not pad_rows:
            rows, positions = np.arange(seqs), starts
        else:
            rows = np.repeat(np.arange(seqs), counts)
            positions = np.arange(len(rows)) - query_start[rows] + starts[rows]
            if pad_rows:
                rows = np.pad(rows, (0, tokens - real))
                positions = np.pad(positions, (0, tokens - real))
        array("positions")[:] = positions
        slots = array("slot_mapping").reshape(self._groups, tokens)
        blocks = self._tables[:, rows, positions // self.block_size].astype(np.int64)
        slots[:] = blocks * self.block_size + positions % self.block_size
        slots[:, real:] = -1
        if padded:
            own = np.fromiter((item.num_tokens for item in batch), np.int64, len(batch))
            behind = np.arange(real) % width >= own[np.arange(real) // width]
            slots[:, :real][:, behind] = -1
        if pad_to and not pad_rows:
            last = np.arange(tokens)
        else:
            logits = np.fromiter((item.num_logits for item in batch), np.int64, len(batch))
            ends = np.repeat(query_start[1 : len(batch) + 1], logits)
            # Of each sequence its last rows, as many as it samples tokens.
            last = ends - np.repeat(logits.cumsum(), logits) + np.arange(logits.sum())
        array("last_rows")[: len(last)] = last
        if self._states:
            self._write_states(batch, array)
        groups = None
        if lora_slots is not None:
            of_sequence = np.full(seqs, -1, np.int32)
            of_sequence[: len(batch)] = lora_slots
            active = np.zeros(seqs, np.int64)
            active[: len(batch)] = [item.sequence.adapter_start or 0 for item in batch]
            in_use = np.where(positions >= active[rows], of_sequence[rows], -1).astype(np.int32)
            in_use[real:] = -1
            if pad_to or (in_use >= 0).any():
                groups = _group(in_use, array, padded=pad_to > 0)
        # Where each has one, nobody needs to know the rows, and nobody can if they change.
        each = None if tokens == seqs or pad_rows else tuple(counts.tolist())
        size = (tokens, seqs, len(last), pad_rows or int(counts.max()), groups, each)
        if self.tell is not None and batch:
            data, reads = self._bytes[:used].tobytes(), _reads(batch, query_start)
            self.tell(StepMessage(size, data, *updates, pad_to, width, pad_rows, reads))
        if self._sent is not None:
            self._device[:used].copy_(self._host[:used], non_blocking=True)
            self._sent.record()
        inputs = self._tensors(*size)
        if self._states and (turns := _turns(batch)):
            states: StateBatch | None = None
            for turn in reversed(turns):
                states = turn.batch(self._device.device, states)
            inputs = replace(inputs, states=states)
        return inputs

    def follow(self, message: StepMessage) -> StepInputs:
        """The inputs that rank 0 has built."""
        if self._sent is not None:
            self._sent.synchronize()
        used = len(message.data)
        self._bytes[:used] = np.frombuffer(message.data, np.uint8)
        self._tables.reshape(-1)[message.blocks_at] = message.blocks
        if self._sent is not None:
            self._send_tables(message.blocks_at, message.blocks)
            self._device[:used].copy_(self._host[:used], non_blocking=True)
            self._sent.record()
        return self._tensors(*message.size)

    def _tensors_of_size(
        self,
        tokens: int,
        seqs: int,
        sampling: int,
        max_query: int,
        adapted: tuple[int, int, int] | None,
        rows: tuple[int, ...] | None,
    ) -> StepInputs:
        """Where the inputs of a step of this size lie on the device.

        sampling: rows whose logits are wanted. adapted: what :func:`_group` returns, None if no row
        has an adapter. rows: of each sequence, None if they are not known.
        """
        places, _ = _layout(tokens, seqs, self._groups, self._states)

        def tensor(name: str, length: int | None = None) -> Tensor:
            offset, full, dtype = places[name]
            length = full if length is None else length
            kind = torch.int64 if dtype is np.int64 else torch.int32
            return self._device[offset : offset + length * kind.itemsize].view(kind)

        slots = tensor("slot_mapping").view(self._groups, tokens)
        of_group = [
            AttentionBatch(
                query_start=tensor("query_start"),
                context_lens=tensor("context_lens"),
                block_tables=self._device_tables[group, :seqs],
                slot_mapping=slots[group],
                max_query=max_query,
                rows=rows,
            )
            for group in range(self._groups)
        ]
        lora = None
        if adapted is not None:
            adapted_rows, segments, longest = adapted
            lora = LoRABatch(
                slots=tensor("lora_slots"),
                order=tensor("lora_order", adapted_rows),
                segment_starts=tensor("lora_starts", segments + 1),
                segment_slots=tensor("lora_segments", segments),
                max_segment=longest,
            )
        states = None
        if self._states:
            states = StateBatch(
                query_start=tensor("query_start"),
                read=tensor("read"),
                write=tensor("write"),
                snapshot=tensor("snapshot"),
                snapshot_rows=tensor("snapshot_rows"),
                max_query=max_query,
            )
        return StepInputs(
            token_ids=tensor("token_ids"),
            positions=tensor("positions"),
            attention=[of_group[group] for group in self._group_of_layer],
            last_rows=tensor("last_rows", sampling),
            lora=lora,
            states=states,
        )

    def _write_states(self, batch: Several[StepItem], array: Callable[[str], NDArray[Any]]) -> None:
        """Which states each sequence reads and writes; rows that pad the batch write none."""
        read, write, snapshot, rows = map(array, _STATES)
        for each in (read, write, snapshot):
            each[len(batch) :] = -1
        rows[len(batch) :] = 1
        for row, item in enumerate(batch):
            state = item.sequence.state
            assert state is not None, "a sequence that runs has states"
            read[row], write[row], snapshot[row] = state.read, state.slot, state.snapshot
            rows[row] = state.snapshot_tokens - item.start if state.snapshot >= 0 else 1

    def _update_tables(self, batch: Several[StepItem]) -> tuple[list[int], list[int]]:
        """Write the blocks each row's sequence has gained, or all where the row changed hands.

        Returns where in the tables they are, and the blocks.
        """
        at: list[range] = []
        values: list[int] = []
        del self._written[len(batch) :]
        for row, item in enumerate(batch):
            tables, length = item.sequence.block_tables, item.sequence.num_table_blocks
            written = 0
            if row == len(self._written):
                self._written.append((tables, length))
            else:
                before, known = self._written[row]
                if before is tables:
                    written = known
                if written == length:
                    continue
                self._written[row] = (tables, length)
            for group, table in enumerate(tables):
                gained = table.blocks[written:]
                self._tables[group, row, written:length] = gained
                if self._sent is not None or self.tell is not None:
                    first = (group * len(self._tables[0]) + row) * self.max_blocks + written
                    at.append(range(first, first + len(gained)))
                    values += gained
        places = list(chain(*at))
        if self._sent is not None:
            self._send_tables(places, values)
        return places, values

    def _send_tables(self, at: list[int], blocks: list[int]) -> None:
        if at:
            update = send([at, blocks], torch.int64, self._device.device)
            self._device_tables.view(-1).index_copy_(0, update[0], update[1].int())


def _reads(batch: Several[StepItem], query_start: NDArray[np.int32]) -> list[tuple[int, int]]:
    """See :class:`StepMessage`."""
    return [
        (int(query_start[row]), item.prompt_reader.logit_rows(item.num_tokens, item.start))
        for row, item in enumerate(batch)
        if item.prompt_reader is not None
    ]


def _group(slots: NDArray[np.int32], array: Any, padded: bool) -> tuple[int, int, int]:
    """Write the arrays of a LoRABatch; returns (rows adapted, segments, rows of the longest).

    Padded, every array has its full length: the segments after the last are empty.
    """
    array("lora_slots")[:] = slots
    adapted = np.flatnonzero(slots >= 0)
    order = adapted[np.argsort(slots[adapted], kind="stable")]
    used, lengths = np.unique(slots[order], return_counts=True)
    array("lora_order")[: len(order)] = order
    starts = array("lora_starts")
    starts[0] = 0
    np.cumsum(lengths, out=starts[1 : len(used) + 1])
    segments = array("lora_segments")
    segments[: len(used)] = used
    if not padded:
        return len(order), len(used), int(lengths.max())
    array("lora_order")[len(order) :] = 0
    starts[len(used) + 1 :] = len(order)
    segments[len(used) :] = -1
    return len(slots), len(segments), len(slots)


@dataclass
class _Turn:
    """Rows that are computed at once in layers with states; see :class:`StateBatch` for the names.

    counts: rows of each sequence.
    """

    rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    write: list[int] = field(default_factory=list)
    snapshot: list[int] = field(default_factory=list)
    snapshot_rows: list[int] = field(default_factory=list)

    def add(self, rows: Iterable[int], read: int, write: int, snapshot: int, after: int) -> None:
        """Add a sequence."""
        before = len(self.rows)
        self.rows += rows
        self.counts.append(len(self.rows) - before)
        self.read.append(read)
        self.write.append(write)
        self.snapshot.append(snapshot)
        self.snapshot_rows.append(after)

    def batch(self, device: torch.device, later: StateBatch | None) -> StateBatch:
        """On a device, before ``later``."""

        def sent(values: list[int]) -> Tensor:
            return send(values, torch.int32, device)

        return StateBatch(
            query_start=sent([0, *accumulate(self.counts)]),
            read=sent(self.read),
            write=sent(self.write),
            snapshot=sent(self.snapshot),
            snapshot_rows=sent(self.snapshot_rows),
            max_query=max(self.counts),
            rows=send(self.rows, torch.int64, device),
            later=later,
        )


def _turns(batch: Several[StepItem]) -> list[_Turn]:
    """How a step is computed in layers with states, if it verifies drafts; empty if it does not.

    A kernel keeps two states of a sequence: after some row, and after the last. So of a sequence
    whose draft is verified two rows are computed in each turn, and the states after both are kept.
    Its own slot, which the first turn reads, is written last.
    """
    if not any(item.sequence.state is not None and item.sequence.state.between for item in batch):
        return []
    first, others = _Turn(), list[_Turn]()
    start = 0
    for item in batch:
        state, rows = item.sequence.state, range(start, start + item.num_tokens)
        start += item.num_tokens
        assert state is not None, "a sequence that runs has states"
        if not state.between:
            after = state.snapshot_tokens - item.start if state.snapshot >= 0 else 1
            first.add(rows, state.read, state.slot, state.snapshot, after)
            continue
        slots, read = [*state.between, state.slot], state.read
        for number, place in enumerate(range(0, len(rows), 2)):
            if number > len(others):
                others.append(_Turn())
            turn = others[number - 1] if number else first
            *between, last = slots[place : place + 2]
            turn.add(rows[place : place + 2], read, last, between[0] if between else -1, 1)
            read = last
    return [first, *others]
