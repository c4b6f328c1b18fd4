"""A request being computed: its tokens, how far they are, its KV blocks, and its output."""

from __future__ import annotations

import time
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b

from nybble.engine.adapter_cache import AdapterVersion
from nybble.engine.detokenizer import Detokenizer
from nybble.engine.prompt_reader import EmbeddingReader, LogprobReader
from nybble.engine.request import FinishReason, Request, RequestOutput
from nybble.engine.sampler import Sampled, SequenceSampler
from nybble.engine.speculation import Acceptance
from nybble.engine.state_cache import SequenceState
from nybble.engine.tokens import Tokens


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class CachedPrefix:
    """What the prefix cache holds of a sequence that waits.

    tokens: of its beginning, which need not be computed. blocks_in_use: of their blocks, those that
    running sequences hold, so that sharing them takes none of the free ones.
    """

    tokens: int
    blocks_in_use: int


NOTHING_CACHED = CachedPrefix(0, 0)


@dataclass
class BlockTable:
    """The KV blocks that a sequence holds in one group of layers, in the order of its tokens.

    blocks: their ids; a list that only grows.
    num_unseen: leading blocks that were taken back because no layer of the group sees them any
        more; their places in the list stay.
    """

    blocks: list[int] = field(default_factory=list)
    num_unseen: int = 0

    @property
    def held(self) -> list[int]:
        return self.blocks[self.num_unseen :]


@dataclass
class VirtualCounter:
    """What a tenant was served, in tokens divided by its weight; see :mod:`.fair_queue`."""

    value: float = 0.0


class CachedTokens:
    """Tokens whose keys and values are computed into blocks of a KV cache, from the first on.

    num_computed_tokens: leading tokens whose keys and values are in the cache.
    block_tables: the KV blocks in each group of layers, all of the same length; another, empty
        tuple once all are taken back.
    state: what is held of layers that keep states; None if the model has none.
    block_hashes: the prefix-cache keys of the leading full blocks, as far as they are known.
    adapter_start: the first position at which an adapter is active; None for never.
    """

    def __init__(self, token_ids: Several[int], cache_salt: str = "") -> None:
        """cache_salt: the prefix cache is shared only among those with the same salt."""
        self.token_ids: list[int] = list(token_ids)
        self.num_computed_tokens = 0
        self.block_tables: tuple[BlockTable, ...] = ()
        self.state: SequenceState | None = None
        self.block_hashes: list[bytes] = []
        self.adapter_start: int | None = 0
        self._cache_salt = cache_salt

    @property
    def prefix_root(self) -> bytes:
        """What the keys of the prefix cache begin with: a salt keeps the blocks to those who know
        it."""
        if not self._cache_salt:
            return b""
        salt = self._cache_salt.encode(errors="surrogatepass")
        return blake2b(salt, digest_size=16, person=b"cache_salt").digest()

    def prefix_mark(self, first: int, last: int) -> bytes:
        """What the key of the block of these positions is marked with, beside its tokens."""
        return b""

    @property
    def may_share_prefix(self) -> bool:
        """Whether the first tokens may be taken from the prefix cache."""
        return True

    @property
    def adapter_slot(self) -> int:
        """The device slot of the adapter, −1 for the base model."""
        return -1

    @property
    def num_held_blocks(self) -> int:
        return sum(len(table.blocks) - table.num_unseen for table in self.block_tables)

    @property
    def num_table_blocks(self) -> int:
        """The length of the block tables."""
        return len(self.block_tables[0].blocks) if self.block_tables else 0

    @property
    def num_uncomputed_tokens(self) -> int:
        """1 while decoding; more while the prompt (or a preempted sequence) is prefilled."""
        return len(self.token_ids) - self.num_computed_tokens


class Sequence(CachedTokens):
    """Mutable state of one request; owned by the engine thread.

    stop_token_ids: tokens that end it, those of the model's vocabulary and those the request names.
    counter: of its tenant, whose sequences share it; settled when it is queued.
    num_charged_tokens: leading tokens of the prompt that its tenant need not pay for (again).
    tokens: those of an adapter that has tokens of its own; None for the base model's.
    adapter: the version of the request's adapter, settled when the request is taken.
    cached_prefix: what the prefix cache held of it when it was last looked up, while it waits.
    prefix_valid_until: the step from which on it is looked up again.
    overtaken: others admitted while it lacked an adapter slot or blocks.
    prompt_reader: what is still to be read of the prompt, until its result is taken.
    acceptance: what became of its drafts.
    """

    def __init__(
        self,
        request: Request,
        max_tokens: int,
        detokenizer: Detokenizer,
        sampler: SequenceSampler,
        stop_token_ids: frozenset[int] = frozenset(),
        tokens: Tokens | None = None,
    ) -> None:
        super().__init__(request.prompt_token_ids, request.cache_salt)
        self.tokens = tokens
        self.request = request
        self.request_id = request.request_id
        self.tenant = request.tenant
        self.weight = request.weight
        self.counter = VirtualCounter()
        self.max_tokens = max_tokens
        self.stop_token_ids = stop_token_ids
        self.detokenizer = detokenizer
        self.sampler = sampler
        self.status = SequenceStatus.WAITING
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_cached_tokens: int | None = None
        self.num_charged_tokens = 0
        self.arrived = time.monotonic()
        self.queue_seconds = 0.0
        self._adapter: AdapterVersion | None = None
        self.cached_prefix = NOTHING_CACHED
        self.prefix_valid_until = 0
        self.overtaken = 0
        self.acceptance = Acceptance()
        self.prompt_reader: LogprobReader | EmbeddingReader | None = None
        if request.pooling is not None:
            self.prompt_reader = EmbeddingReader(request.prompt_token_ids, request.pooling)
        elif (alternatives := request.params.prompt_logprobs) is not None:
            self.prompt_reader = LogprobReader(request.prompt_token_ids, alternatives)

    @property
    def adapter(self) -> AdapterVersion | None:
        return self._adapter

    @adapter.setter
    def adapter(self, version: AdapterVersion) -> None:
        self._adapter = version
        self.adapter_start = version.start(self.request.prompt_token_ids)

    def prefix_mark(self, first: int, last: int) -> bytes:
        """What the key of the block of these positions is marked with, beside its tokens.

        An adapter changes every key and value from where it is active on.
        """
        begins = self.adapter_start is not None and first <= self.adapter_start < last
        return self.adapter.digest if begins and self.adapter is not None else b""

    @property
    def adapter_slot(self) -> int:
        """The device slot of the adapter while running, −1 if the base model computes all."""
        if self.adapter_start is None:
            return -1
        return -1 if self._adapter is None or self._adapter.slot is None else self._adapter.slot

    @property
    def may_share_prefix(self) -> bool:
        """Whether its first tokens may be taken from the prefix cache."""
        return self.prompt_reader is None or not self.prompt_reader.whole

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def draft_room(self) -> int:
        """The most draft tokens it can use: the last token that it may have is sampled."""
        return self.max_tokens - self.num_output_tokens - 1

    @property
    def goes_on(self) -> bool:
        """Whether it certainly continues after its newest token, whatever the text is."""
        return (
            not self.request.params.stop
            and self.request.guide is None
            and self.num_output_tokens < self.max_tokens
            and self.token_ids[-1] not in self.stop_token_ids
        )

    def advance(self, sampled: Sampled) -> RequestOutput:
        """What its newest token, which was sampled so, adds to its output. Raises GuideError."""
        token = sampled[0]
        guide = self.request.guide
        complete = guide is not None and guide.accept(token)
        reason: FinishReason | None = None
        text = ""
        if token in self.stop_token_ids:
            reason = "stop"
            if self.request.params.include_stop_str_in_output:
                text = self.detokenizer.add(token)
        else:
            text = self.detokenizer.add(token)
            if self.detokenizer.stopped or complete:
                reason = "stop"
            elif self.num_output_tokens >= self.max_tokens:
                reason = "length"
        if reason is not None:
            text += self.detokenizer.flush()
        return self.output(sampled, text, reason)

    def output(
        self, sampled: Sampled | None, text: str, reason: FinishReason | None
    ) -> RequestOutput:
        """The next item of its stream; what was read of the prompt goes with the first."""
        reader, self.prompt_reader = self.prompt_reader, None
        logprob = None if sampled is None else sampled[1]
        return RequestOutput(
            text=text,
            token_ids=() if sampled is None else sampled[:1],
            logprobs=() if logprob is None else (logprob,),
            finish_reason=reason,
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_output_tokens,
            cached_tokens=self.num_cached_tokens or 0,
            queue_seconds=self.queue_seconds,
            prompt_logprobs=reader.result() if isinstance(reader, LogprobReader) else None,
            embedding=reader.result() if isinstance(reader, EmbeddingReader) else None,
            stop_string=None if reason is None else self.detokenizer.stopped_by,
            draft_tokens=self.acceptance.drafted,
            accepted_draft_tokens=self.acceptance.accepted,
        )
