"""Drafts by a head, EAGLE-3 or MTP, which reads hidden states of the model it drafts for.

After every step the head reads what the step has computed: of each position the hidden states of
the target's layers, and the token that follows. So it has always read all that the target has.
Drafting goes on from there, a token of each sequence in a pass, with the head's own hidden states
for positions that the target has not computed.

Its keys and values are in the target's blocks, as those of a further layer. So a prefix that the
cache holds needs no hidden states, which are nowhere: the head has read it as well. Of the last
token of such a prefix it has seen the token which followed when it was computed, and that may be
another one now. That may cost a draft token, and nothing else.

What drafting writes into blocks is written anew when the target has computed the same positions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nybble.engine.block_manager import BlockManager
from nybble.engine.config import EngineConfig
from nybble.engine.drafter import FIRST_GUESS, Draft, Worth, grade
from nybble.engine.failure import is_out_of_memory
from nybble.engine.inputs import InputBuffers, StepItem
from nybble.engine.parts import KVCache
from nybble.engine.runner import ModelRunner
from nybble.engine.sequence import Sequence
from nybble.engine.speculation import StepCosts
from nybble.engine.transfer import send
from nybble.kernels.attention_batch import AttentionBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Item:
    """What a pass computes of one sequence; see :class:`nybble.engine.inputs.StepItem`.

    token_ids: of each position the token after it.
    """

    sequence: Sequence
    start: int
    token_ids: list[int]

    prompt_reader = None
    num_logits = 1
    decodes = False
    verifies = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class _Last:
    """What the head has computed last of a sequence.

    position: the one after it. hidden: ``(hidden,)``, what :meth:`Head.forward` returned.
    """

    position: int
    hidden: Tensor


class Head(Protocol):
    """A layer behind the target's, as a module. It keeps nothing of sequences.

    method: its name in metrics.
    """

    @property
    def method(self) -> str: ...

    def fuse(self, captured: Tensor) -> Tensor:
        """Of the target's hidden states ``(rows, layers · target_hidden)``: ``(rows, hidden)``."""
        ...

    def forward(
        self,
        token_ids: Tensor,
        hidden: Tensor,
        positions: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
    ) -> Tensor:
        """Hidden states ``(rows, hidden)``.

        token_ids: int64 ``(rows,)``, of each row the token after its position.
        hidden: ``(rows, hidden)``, what :meth:`fuse` makes of the target's hidden states at the
            position, or what this returned for the position before.
        positions: int64 ``(rows,)``.
        """
        ...

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest next token of each row, int64 ``(rows,)``, and its probability.

        hidden: ``(rows, hidden)``, what :meth:`forward` has computed.
        """
        ...


def warm_up(head: Head, runner: ModelRunner) -> None:
    """Compile every kernel variant that drafting will use; nothing on the CPU."""
    if runner.device.type != "cuda":
        return
    decoder = runner.decoder
    width = len(decoder.captures) * decoder.architecture.hidden
    with torch.inference_mode():
        for inputs in runner.idle_inputs():
            rows = len(inputs.token_ids)
            captured = torch.zeros(rows, width, dtype=decoder.embedding.dtype, device=runner.device)
            hidden = head.forward(
                inputs.token_ids,
                head.fuse(captured),
                inputs.positions,
                runner.caches[-1],
                inputs.attention[-1],
            )
            head.choose(hidden[inputs.last_rows])


class HeadDrafter:
    """Drafts with a head; see :class:`nybble.engine.drafter.Drafter`."""

    first_guess = FIRST_GUESS

    def __init__(
        self, head: Head, runner: ModelRunner, blocks: BlockManager, config: EngineConfig
    ) -> None:
        """runner, blocks: of the target, whose last layer in the cache is the head's."""
        self.method = head.method
        self.costs = StepCosts()
        self._head = head
        self._runner = runner
        self._blocks = blocks
        self._inputs = InputBuffers(
            max_seqs=config.max_num_seqs,
            max_tokens=config.max_batched_tokens,
            max_blocks=-(-runner.decoder.max_model_len // config.block_size),
            block_size=config.block_size,
            group_of_layer=runner.layout.group_of_layer,
            device=runner.device,
        )
        self._last: dict[Sequence, _Last] = {}

    def reading(self, sequence: Sequence) -> float:
        return 0.0

    def release(self, sequence: Sequence) -> None:
        self._last.pop(sequence, None)

    def see(self, batch: Iterable[StepItem]) -> None:
        captured = self._runner.captured
        assert captured is not None, "the decoder captures what the head reads"
        items: list[_Item] = []
        rows: list[int] = []
        row = 0
        for item in batch:
            sequence, start = item.sequence, item.start
            assert isinstance(sequence, Sequence)
            # Of the last token of a prompt that is not continued the next is not known.
            end = min(sequence.num_computed_tokens, len(sequence.token_ids) - 1)
            self._last.pop(sequence, None)
            # The head has no rows for tokens that an adapter has added.
            if end > start and sequence.tokens is None:
                items.append(_Item(sequence, start, sequence.token_ids[start + 1 : end + 1]))
                rows += range(row, row + end - start)
            row += item.num_tokens
        try:
            if items:
                at = send(rows, torch.int64, self._runner.device)
                self._pass(items, self._head.fuse(captured[at]))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # It has not read these tokens, which may cost drafts and nothing else.
            self._give_up(f"the {self.method} head read {len(rows)} tokens")

    def draft(self, limits: Mapping[Sequence, int], worth: Worth) -> dict[Sequence, Draft]:
        room = {
            sequence: fitting
            for sequence, limit in limits.items()
            if (last := self._last.get(sequence)) is not None
            and last.position == sequence.num_computed_tokens
            and (fitting := self._reserve(sequence, limit)) > 0
        }
        found: dict[Sequence, tuple[list[int], list[int]]] = {each: ([], []) for each in room}
        active = list(room)
        # Drafting goes on from here again in the next step, if nothing of it is verified.
        ends = {sequence: self._last[sequence] for sequence in room}
        try:
            while active:
                started = time.monotonic()
                if passes := [each for each in active if found[each][0]]:
                    self._pass(
                        [
                            _Item(each, self._last[each].position, found[each][0][-1:])
                            for each in passes
                        ],
                        torch.stack([self._last[each].hidden for each in passes]),
                    )
                self._choose(active, found)
                if passes:
                    self.costs.observe(len(passes), time.monotonic() - started)
                active = [
                    sequence
                    for sequence in active
                    if len(found[sequence][0]) < room[sequence]
                    and found[sequence][0][-1] not in sequence.stop_token_ids
                    and worth(sequence, found[sequence][1])
                ]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._give_up(f"drafting for {len(room)} sequences")
        self._last |= ends
        return {
            sequence: Draft(tuple(tokens), tuple(grades))
            for sequence, (tokens, grades) in found.items()
            if tokens
        }

    def _give_up(self, doing: str) -> None:
        logger.warning("out of memory while %s", doing)
        if self._runner.device.type == "cuda":
            torch.cuda.empty_cache()

    def _reserve(self, sequence: Sequence, limit: int) -> int:
        """How many tokens can be drafted, up to ``limit``; takes blocks for all but the last."""
        known = sequence.num_computed_tokens
        if self._blocks.grow(sequence, known + limit - 1):
            return limit
        return min(limit, sequence.num_table_blocks * self._blocks.block_size - known + 1)

    def _pass(self, items: Several[_Item], hidden: Tensor) -> None:
        """Compute positions, and keep what the last of each sequence has become."""
        inputs = self._inputs.build(items)
        computed = self._head.forward(
            inputs.token_ids,
            hidden,
            inputs.positions,
            self._runner.caches[-1],
            inputs.attention[-1],
        )
        for item, last in zip(items, computed[inputs.last_rows], strict=True):
            self._last[item.sequence] = _Last(item.start + item.num_tokens, last)

    def _choose(
        self, sequences: Several[Sequence], found: dict[Sequence, tuple[list[int], list[int]]]
    ) -> None:
        """Add the next token of each sequence."""
        hidden = torch.stack([self._last[each].hidden for each in sequences])
        tokens, shares = self._head.choose(hidden)
        # One transfer brings both; a vocabulary is smaller than what float64 counts exactly.
        chosen = torch.stack([tokens.double(), shares.double()]).tolist()
        for sequence, token, share in zip(sequences, *chosen, strict=True):
            found[sequence][0].append(int(token))
            found[sequence][1].append(grade(share))
