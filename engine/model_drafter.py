"""Drafts by a smaller model with the same tokenizer: what it would say, greedily.

The draft model has a KV cache of its own. It reads every sequence's tokens there, the prompt first,
and drafts for all sequences at once: a pass computes one more token of each. A step over several
tokens of the large model then takes hardly longer than one over a single token, so that what it
says as the small one does comes cheap.

What the cache holds of rejected tokens is computed anew: keys and values stay only as far as the
sequence has said what was drafted. Adapters are not applied to drafts.

Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023; a draft
ends where the draft model is not sure, as in llama.cpp (``--draft-p-min``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch

from nybble.engine.block_manager import BlockManager
from nybble.engine.drafter import FIRST_GUESS, Draft, Worth, grade
from nybble.engine.failure import is_out_of_memory
from nybble.engine.inputs import StepItem
from nybble.engine.runner import ModelRunner
from nybble.engine.sequence import CachedTokens, Sequence
from nybble.engine.speculation import StepCosts

logger = logging.getLogger(__name__)

# A pass over more tokens of a sequence reads a prompt. It says nothing of what a draft costs.
_FEW = 16
_NEWEST = 0.3  # the weight of the newest measurement of what a prompt's token takes


class _Drafted(CachedTokens):
    """What the draft model has of a sequence: its tokens, and drafted ones after them.

    num_known: tokens that the sequence had when it was last looked at.
    num_published: leading tokens that other sequences can find in the prefix cache.
    """

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(sequence.token_ids, sequence.request.cache_salt)
        self.num_known = len(self.token_ids)
        self.num_published = 0

    def follow(self, token_ids: Several[int]) -> None:
        """Take over what the sequence has said by now.

        Of what was drafted, the keys and values of tokens that it has said are kept.
        """
        kept = self.num_known
        most = min(len(token_ids), self.num_computed_tokens)
        while kept < most and self.token_ids[kept] == token_ids[kept]:
            kept += 1
        self.num_computed_tokens = min(self.num_computed_tokens, kept)
        self.token_ids[self.num_known :] = token_ids[self.num_known :]
        self.num_known = len(token_ids)


@dataclass(frozen=True)
class _Item:
    """What a pass computes of one sequence; see :class:`nybble.engine.inputs.StepItem`."""

    sequence: _Drafted
    num_tokens: int

    prompt_reader = None

    @property
    def start(self) -> int:
        return self.sequence.num_computed_tokens

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.token_ids[self.start : self.start + self.num_tokens]

    @property
    def num_logits(self) -> int:
        """1 if all its tokens are then computed, so that the next can be chosen."""
        return int(self.num_tokens == self.sequence.num_uncomputed_tokens)

    @property
    def decodes(self) -> bool:
        return self.num_tokens == self.num_logits == 1

    @property
    def verifies(self) -> bool:
        return False


class ModelDrafter:
    """Drafts with a model of its own; see :class:`nybble.engine.drafter.Drafter`.

    It takes blocks of its own cache only: a sequence for which there are none is not drafted.
    """

    method = "draft"
    first_guess = FIRST_GUESS

    def __init__(self, runner: ModelRunner, blocks: BlockManager, max_batched_tokens: int) -> None:
        """max_batched_tokens: the most that a pass computes."""
        self.costs = StepCosts()
        self._runner = runner
        self._blocks = blocks
        self._most = max_batched_tokens
        self._drafted: dict[Sequence, _Drafted] = {}
        self._cached: dict[Sequence, int] = {}  # tokens of sequences that have not begun
        self._seconds_per_token = 0.0  # of prompts

    def reading(self, sequence: Sequence) -> float:
        if (own := self._drafted.get(sequence)) is not None:
            computed = own.num_computed_tokens
        else:
            if sequence not in self._cached:  # what is found there takes time to look up
                self._cached[sequence] = self._blocks.cached_prefix(_Drafted(sequence)).tokens
            computed = self._cached[sequence]
        tokens = len(sequence.token_ids) - computed
        return tokens * self._seconds_per_token if tokens > _FEW else 0.0

    def see(self, batch: Iterable[StepItem]) -> None: ...

    def release(self, sequence: Sequence) -> None:
        self._cached.pop(sequence, None)
        own = self._drafted.pop(sequence, None)
        if own is not None:
            self._blocks.release(own)

    def draft(self, limits: Mapping[Sequence, int], worth: Worth) -> dict[Sequence, Draft]:
        wanted = {}
        for sequence, limit in limits.items():
            own = self._followed(sequence)
            if own is not None and (fitting := self._reserve(own, limit)):
                wanted[sequence] = own, fitting
        found: dict[Sequence, tuple[list[int], list[int]]] = {each: ([], []) for each in wanted}
        try:
            active = self._catch_up(wanted, found)
            while active := [
                sequence
                for sequence in active
                if len(found[sequence][0]) < wanted[sequence][1]
                and found[sequence][0][-1] not in sequence.stop_token_ids
                and worth(sequence, found[sequence][1])
            ]:
                for sequence in active:
                    wanted[sequence][0].token_ids.append(found[sequence][0][-1])
                self._pass([(_Item(wanted[each][0], 1), each) for each in active], found)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # What was drafted so far is as good as before.
            logger.warning("out of memory while drafting for %d sequences", len(wanted))
            if self._runner.device.type == "cuda":
                torch.cuda.empty_cache()
        return {
            sequence: Draft(tuple(tokens), tuple(grades))
            for sequence, (tokens, grades) in found.items()
            if tokens
        }

    def _followed(self, sequence: Sequence) -> _Drafted | None:
        """What there is of a sequence, with the tokens it has by now; None if there can be none."""
        own = self._drafted.get(sequence)
        if own is not None:
            own.follow(sequence.token_ids)
            self._blocks.publish(own, own.num_published)
            self._blocks.release_unseen(own)
            own.num_published = own.num_computed_tokens
            return own
        known, vocab = len(sequence.token_ids), self._runner.decoder.architecture.vocab
        # An output layer that is padded has tokens which the smaller model may not have, and so may
        # an adapter.
        if sequence.tokens is not None:
            return None
        if known >= self._runner.decoder.max_model_len or max(sequence.token_ids) >= vocab:
            return None
        own = _Drafted(sequence)
        own.num_computed_tokens = own.num_published = self._blocks.share_prefix(own)
        self._cached.pop(sequence, None)
        # All at once: sequences that have a part each could wait for each other.
        if not self._blocks.grow(own, known):
            self._blocks.release(own)
            return None
        self._drafted[sequence] = own
        return own

    def _reserve(self, own: _Drafted, limit: int) -> int:
        """How many tokens can be drafted, up to ``limit``; takes blocks for all but the last."""
        known = len(own.token_ids)
        limit = min(limit, self._runner.decoder.max_model_len - known + 1)
        if limit <= 0 or not self._blocks.grow(own, known):
            return 0
        return limit if self._blocks.grow(own, known + limit - 1) else 1

    def _catch_up(
        self,
        wanted: Mapping[Sequence, tuple[_Drafted, int]],
        found: dict[Sequence, tuple[list[int], list[int]]],
    ) -> list[Sequence]:
        """Compute what the sequences have said since, the least first; returns which are done."""
        room, items = self._most, []
        for sequence in sorted(wanted, key=lambda each: wanted[each][0].num_uncomputed_tokens):
            own = wanted[sequence][0]
            count = min(own.num_uncomputed_tokens, room)
            if count:
                items.append((_Item(own, count), sequence))
                room -= count
        done = [sequence for item, sequence in items if item.num_logits]
        self._pass(items, found)
        return done

    def _pass(
        self,
        items: list[tuple[_Item, Sequence]],
        found: dict[Sequence, tuple[list[int], list[int]]],
    ) -> None:
        """Compute tokens, and add the next token of those of which all are computed."""
        if not items:
            return
        started = time.monotonic()
        rows = sum(item.num_tokens for item, _ in items)
        logits = self._runner.run([item for item, _ in items])
        largest, tokens = logits.max(dim=-1)
        shares = (largest - logits.logsumexp(dim=-1)).exp()
        # One transfer brings both; a vocabulary is smaller than what float64 counts exactly.
        chosen = torch.stack([tokens.double(), shares.double()]).tolist()
        sampling = [sequence for item, sequence in items if item.num_logits]
        for item, _ in items:
            item.sequence.num_computed_tokens += item.num_tokens
        for sequence, token, share in zip(sampling, *chosen, strict=True):
            found[sequence][0].append(int(token))
            found[sequence][1].append(grade(share))
        seconds = time.monotonic() - started
        if all(item.num_tokens <= _FEW for item, _ in items):
            self.costs.observe(rows, seconds)
            return
        newest = seconds / rows
        if known := self._seconds_per_token:
            newest = known + _NEWEST * (newest - known)
        self._seconds_per_token = newest
