"""Runs the sequences of API requests on the engine: n per prompt, admission, measurement."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

from nybble.engine import (
    Engine,
    Guide,
    Pooling,
    Request,
    RequestOutput,
    SamplingParams,
    Tokens,
)
from nybble.server.http.errors import ApiError
from nybble.server.observability.metrics import Metrics
from nybble.server.tenancy.admission import Admission
from nybble.server.tenancy.limits import Limits
from nybble.server.tenancy.tenants import Tenant
from nybble.server.tenancy.usage import UsageLedger

# Enough short texts to fill a step's token budget. On a small server at most a quarter of its
# sequences is used, so that embeddings do not crowd out other requests.
_EMBEDDINGS_IN_FLIGHT = 16
# To the engine, a tenant's lines of batches are a tenant of their own with this part of its weight.
# So seats, KV blocks and the steps' tokens go to others first, and are taken back for them.
_BACKGROUND_WEIGHT = 1e-4


@dataclass(frozen=True)
class SequenceGroup:
    """The sequences of one API request: ``n`` for each prompt.

    Sequence ``i`` continues prompt ``i // n``; ``n`` is that of its parameters.

    timeout: seconds the group may take.
    background: whether it takes only the room that others leave: a line of a batch.
    priority: of each of its requests.
    cache_salt: of each of its requests.
    pooling: if set, the prompts' embeddings are computed, a few at a time.
    few_at_a_time: whether only a few sequences are in flight, however many prompts there are.
    prediction: tokens that the outputs probably have; None if the request says nothing of it.
    tokens: those that the prompts were read with.
    """

    id: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    tokens: Tokens
    guide: Guide | None = None
    adapter: str | None = None
    tenant: Tenant | None = None
    timeout: float | None = None
    priority: int = 0
    cache_salt: str = ""
    pooling: Pooling | None = None
    prediction: tuple[int, ...] | None = None
    background: bool = False
    few_at_a_time: bool = False

    @property
    def n(self) -> int:
        return self.params.n

    @property
    def size(self) -> int:
        return len(self.prompts) * self.n

    def request(self, index: int) -> Request:
        params = self.params.of_sequence(index % self.n)
        guide = None if self.guide is None else self.guide.fork()
        prompt = self.prompts[index // self.n]
        id = f"{self.id}-{index}"
        request = Request(
            id,
            prompt,
            params,
            guide,
            self.adapter,
            priority=self.priority,
            cache_salt=self.cache_salt,
            pooling=self.pooling,
            prediction=self.prediction or (),
            tokens=self.tokens,
        )
        name, weight = ("", 1.0) if self.tenant is None else (self.tenant.name, self.tenant.weight)
        if self.background:
            name, weight = f"{name} (batches)", weight * _BACKGROUND_WEIGHT
        return replace(request, tenant=name, weight=weight)


@dataclass
class Usage:
    """Token counts of a group. A prompt counts once, however many sequences continue it."""

    group: SequenceGroup
    _latest: dict[int, RequestOutput] = field(default_factory=dict)

    def add(self, index: int, output: RequestOutput) -> None:
        self._latest[index] = output

    @property
    def begun(self) -> bool:
        """Whether there has been an output."""
        return bool(self._latest)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.group.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(output.completion_tokens for output in self._latest.values())

    @property
    def predicted_tokens(self) -> tuple[int, int] | None:
        """Draft tokens that were accepted, and rejected; None if the group has no prediction."""
        if not self.group.prediction:
            return None if self.group.prediction is None else (0, 0)
        drafted, accepted = self.draft_tokens
        return accepted, drafted - accepted

    @property
    def draft_tokens(self) -> tuple[int, int]:
        """Draft tokens that were verified, and those of them that were accepted."""
        outputs = self._latest.values()
        accepted = sum(output.accepted_draft_tokens for output in outputs)
        return sum(output.draft_tokens for output in outputs), accepted

    @property
    def draft_details(self) -> dict[str, dict[str, int]]:
        """The field of a response's ``usage`` that counts drafts, of every API; none if there are
        no drafts. No official API has it, so that clients take it for an extra field."""
        drafted, accepted = self.draft_tokens
        if not drafted:
            return {}
        return {
            "draft_tokens_details": {"draft_tokens": drafted, "accepted_draft_tokens": accepted}
        }

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were in the prefix cache before this group."""
        return sum(
            output.cached_tokens
            for index, output in self._latest.items()
            # A prompt's later sequences hit what its first one has just cached.
            if index % self.group.n == 0
        )


@dataclass(frozen=True)
class SequenceTimes:
    """Timestamps of a finished sequence, in seconds of the monotonic clock.

    reason: why it ended.
    arrived: when the request came.
    started: when it was first computed.
    first: its first token; meaningless if ``tokens`` is 0.
    last: its last token; meaningless if ``tokens`` is 0.
    ended: when it ended.
    """

    id: str
    adapter: str | None
    prompt_tokens: int
    tokens: int
    reason: str
    arrived: float
    started: float
    first: float
    last: float
    ended: float


class Generation:
    """Runs groups on the engine, within the limits of admission and tenants, and measures them."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        admission: Admission,
        limits: Limits,
        ledger: UsageLedger,
        ended: Callable[[SequenceTimes], None] | None = None,
    ) -> None:
        """ended: called for every finished sequence, in the context of its HTTP request."""
        self.engine = engine
        self._limits = limits
        self._ledger = ledger
        self._ended = ended
        self._metrics = metrics
        self._admission = admission

    async def run(self, group: SequenceGroup) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """Yield (index of the sequence, output) as they come; closing cancels all sequences.

        Raises ApiError 429 if the server or the tenant is at a limit, and what Engine.generate
        raises.
        """
        capacity = self._admission.capacity
        most = capacity.seats if group.background else capacity.sequences
        if self._in_flight(group) > most:
            where = "in a batch at most" if group.background else "this server takes at most"
            raise ApiError(
                400,
                f"the request asks for {group.size} sequences, {where} {most} at once",
                param="n",
                code="invalid_value",
            )
        async with self._admitted(group):
            with self._counted(group) as usage:
                outputs = self._alone(group) if group.size == 1 else self._merged(group)
                async with aclosing(outputs):
                    async for item in outputs:
                        usage.add(*item)
                        yield item

    async def _alone(self, group: SequenceGroup) -> AsyncGenerator[tuple[int, RequestOutput]]:
        async with aclosing(self._sequence(group, 0)) as outputs:
            async for output in outputs:
                yield 0, output

    @contextmanager
    def _counted(self, group: SequenceGroup) -> Iterator[Usage]:
        """Counts what a group has used, however it ends, unless it never began."""
        usage = Usage(group)
        try:
            yield usage
        finally:
            if usage.begun:
                self._ledger.add(
                    "" if group.tenant is None else group.tenant.name,
                    group.adapter,
                    prompt=usage.prompt_tokens,
                    cached=usage.cached_tokens,
                    completion=usage.completion_tokens,
                )

    def _in_flight(self, group: SequenceGroup) -> int:
        """The most sequences of a group that are in flight at a time."""
        if group.pooling is None and not group.few_at_a_time:
            return group.size
        capacity = self._admission.capacity
        most = capacity.seats if group.background else max(1, capacity.sequences // 4)
        return min(group.size, _EMBEDDINGS_IN_FLIGHT, most)

    def _needed(self, group: SequenceGroup) -> float:
        """Estimated KV cache, in tokens, of the group's sequences in flight."""
        needs, room = self._admission.needs, self.engine.max_model_len
        tokens = 0.0
        for prompt in group.prompts:
            limit = room - len(prompt)
            if group.pooling is not None:
                limit = 0
            elif group.params.max_tokens is not None:
                limit = min(limit, group.params.max_tokens)
            tokens += needs.of_prompt(len(prompt)) + group.n * needs.of_output(limit)
        return tokens * self._in_flight(group) / group.size

    @asynccontextmanager
    async def _admitted(self, group: SequenceGroup) -> AsyncGenerator[None]:
        admission, sequences = self._admission, self._in_flight(group)
        async with AsyncExitStack() as stack:
            if group.background:
                await stack.enter_async_context(admission.in_background(sequences))
            else:
                stack.enter_context(admission.admit(group.tenant, sequences, self._needed(group)))
            if group.tenant is not None:
                tokens = sum(map(len, group.prompts))
                await stack.enter_async_context(
                    self._limits.admit(group.tenant, tokens, background=group.background)
                )
            yield

    async def _merged(self, group: SequenceGroup) -> AsyncGenerator[tuple[int, RequestOutput]]:
        # Bounded: a slow client's outputs wait in the engine's streams, not here as well.
        queue: asyncio.Queue[tuple[int, RequestOutput] | Exception] = asyncio.Queue(group.size)
        # Once a prompt's first sequence has a token, the prompt is in the prefix cache. Its other
        # sequences wait for that.
        prefilled = [asyncio.Event() for _ in group.prompts]
        places = asyncio.Semaphore(self._in_flight(group))

        async def pump(index: int) -> None:
            event = prefilled[index // group.n]
            if index % group.n:
                await event.wait()
            try:
                async with (
                    places,
                    aclosing(self._sequence(group, index)) as outputs,
                ):
                    async for output in outputs:
                        event.set()
                        await queue.put((index, output))
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.create_task(pump(index)) for index in range(group.size)]
        try:
            unfinished = group.size
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item[1].finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sequence(self, group: SequenceGroup, index: int) -> AsyncGenerator[RequestOutput]:
        request, tenant, metrics = group.request(index), group.tenant, self._metrics
        metrics.begin(request)
        arrived = started = first = previous = time.monotonic()
        tokens, cached, reason = 0, 0, "cancelled"
        drafted = accepted = 0
        awaited = not group.background  # nobody waits for a batch: its times would hide others'
        try:
            async with aclosing(self.engine.generate(request)) as outputs:
                async for output in outputs:
                    metrics.generated(request, len(output.token_ids))
                    if output.draft_tokens > drafted:  # the first token of a step
                        brought = output.accepted_draft_tokens - accepted
                        metrics.drafted(request, output.draft_tokens - drafted, brought)
                        drafted, accepted = output.draft_tokens, output.accepted_draft_tokens
                    if tenant is not None:
                        self._limits.spend(tenant, len(output.token_ids))
                    now = time.monotonic()
                    if request.pooling is not None:
                        if awaited:
                            metrics.queue_time.observe(output.queue_seconds)
                        reason = "stop"
                        yield output
                        return
                    if not tokens:
                        cached = output.cached_tokens
                        first, started = now, arrived + output.queue_seconds
                        if awaited:
                            metrics.time_to_first_token.observe(now - arrived)
                            metrics.queue_time.observe(output.queue_seconds)
                            metrics.prefill_time.observe(now - started)
                    elif awaited:
                        metrics.inter_token_latency.observe(now - previous)
                    previous = now
                    tokens += len(output.token_ids)
                    if output.finish_reason is not None:
                        reason = output.finish_reason
                        if awaited:
                            metrics.e2e_latency.observe(now - arrived)
                            metrics.decode_time.observe(now - first)
                            metrics.inference_time.observe(now - started)
                            metrics.output_tokens.observe(tokens)
                            if tokens > 1:
                                metrics.time_per_output_token.observe((now - first) / (tokens - 1))
                    yield output
        except Exception:
            reason = "error"
            raise
        finally:
            metrics.finished.labels(reason).inc()
            prompt_tokens = len(request.prompt_token_ids)
            if tokens and awaited:
                ended = reason == "stop"
                self._admission.needs.add(prompt_tokens, cached, tokens, ended=ended)
            if self._ended is not None:
                self._ended(
                    SequenceTimes(
                        request.request_id,
                        request.adapter,
                        prompt_tokens,
                        tokens,
                        reason,
                        arrived,
                        started,
                        first,
                        previous,
                        time.monotonic(),
                    )
                )
