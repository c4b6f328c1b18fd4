"""The thread that owns all mutable state: sequences, blocks, adapter slots.

A step is schedule → compute → sample → emit. Messages come in through one queue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from nybble.engine.adapter_cache import AdapterVersion
from nybble.engine.adapters import AdapterRegistry
from nybble.engine.config import EngineConfig
from nybble.engine.failure import Restarts, describe, is_out_of_memory
from nybble.engine.request import (
    AdapterReplacedError,
    AdapterUnavailableError,
    DisallowedTokenError,
    EngineFailedError,
    EngineStoppedError,
    GuideError,
    NoTokenError,
    OutOfMemoryError,
    RequestOutput,
)
from nybble.engine.runner import ModelRunner
from nybble.engine.sampler import Sampled, SequenceSampler, start_sampling
from nybble.engine.scheduler import ScheduledBatch, Scheduler
from nybble.engine.sequence import Sequence
from nybble.engine.speculation import accepted
from nybble.engine.stats import Counters, EngineStats
from nybble.engine.streams import Outputs, Stream, deliver
from nybble.engine.tokens import Tokens
from nybble.loaders import AdapterError

logger = logging.getLogger(__name__)

# How long the thread may take to see that the engine has failed, and then to end.
_PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class _Add:
    sequence: Sequence
    stream: Stream


@dataclass(frozen=True)
class _Cancel:
    request_id: str


class _Stop:
    pass


class EngineThread(threading.Thread):
    """Computes steps until it is told to stop. Its public methods may be called from any thread.

    A failure ends every request in flight with EngineFailedError. The thread then restarts its
    loop with the same weights and adapters and an empty KV cache, up to ``config.restarts`` times
    in ten minutes.

    adapters: the loaded adapters; None if the engine has no adapter slots.
    stats: figures as of the last step.
    failure: why requests are refused; None unless the engine has failed and not restarted.
    """

    def __init__(
        self,
        runner: ModelRunner,
        new_scheduler: Callable[[], Scheduler],
        config: EngineConfig,
        tokens: Tokens,
    ) -> None:
        """tokens: the base model's."""
        super().__init__(name="nybble-engine", daemon=True)
        self._runner = runner
        self._new_scheduler = new_scheduler
        self._scheduler = new_scheduler()
        # A function in the inbox is called on this thread.
        self._inbox: SimpleQueue[_Add | _Cancel | _Stop | Callable[[], None]] = SimpleQueue()
        self.adapters: AdapterRegistry | None = None
        if config.adapters is not None and runner.adapters is not None:
            self.adapters = AdapterRegistry(
                runner.adapters,
                config.adapters.host_bytes,
                config.adapters.own_settings,
                tokens,
                post=self._inbox.put,
                on_failure=self._fail_adapter,
            )
            self._scheduler.adapters = self.adapters.cache
        self._idle = True
        # On a GPU, detokenizing the last step's tokens overlaps with the next step. On a CPU both
        # need the same cores, so there is nothing to gain.
        self._overlap = runner.device.type == "cuda"
        self._deferred: list[tuple[Sequence, Sampled]] = []
        self._streams: dict[str, tuple[Sequence, Stream]] = {}
        self._batch: ScheduledBatch = []  # the step that is being computed
        self._restarts = Restarts(config.restarts)
        self._counters = Counters()
        self.stats: EngineStats = self._counters.snapshot(self._scheduler, 0)
        self.failure: str | None = None
        self._when_dead: Callable[[], None] = lambda: None
        self._dead = False  # failed for good, or abandoned
        self._stopping = False
        # Held while a request is queued and while a failure is recorded: otherwise a request
        # could be queued after the failure has ended all others, and never be answered.
        self._entrance = threading.Lock()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and accepts requests."""
        return self.is_alive() and self.failure is None and not self._stopping

    def stop(self) -> None:
        """End the thread and wait for it; requests in flight raise EngineStoppedError."""
        self._stopping = True
        self._inbox.put(_Stop())
        if self.is_alive():
            self.join(_PATIENCE_SECONDS if self._dead else None)
        if self.adapters is not None:
            self.adapters.close()

    def abandon(self) -> None:
        """End requests in flight with EngineStoppedError, whatever is being computed."""
        with self._entrance:
            self._stopping = self._dead = True
        self._fail_all(EngineStoppedError("the engine was stopped"))

    def when_dead(self, function: Callable[[], None]) -> None:
        """Call ``function``, on some thread, once the engine has failed for good."""
        with self._entrance:
            self._when_dead, dead = function, self._dead
        if dead:
            function()

    def submit(self, sequence: Sequence, stream: Stream) -> None:
        """Queue a sequence. Raises EngineStoppedError if the engine is not running.

        A sequence with an adapter needs an engine with adapter slots. It raises UnknownAdapterError
        if its adapter is not loaded, and AdapterReplacedError if that has other tokens by now.
        """
        with self._entrance:
            if not self.healthy:
                raise EngineStoppedError(
                    "the engine is not running"
                    if self.failure is None
                    else f"the engine has failed: {self.failure}"
                )
            name = sequence.request.adapter
            if name is None:
                self._inbox.put(_Add(sequence, stream))
                return

            def send(version: AdapterVersion) -> None:
                if version.tokens is not sequence.tokens:
                    raise AdapterReplacedError(
                        f"adapter {name!r} was replaced by one with other tokens while the request "
                        "was read: send it again"
                    )
                sequence.adapter = version
                self._inbox.put(_Add(sequence, stream))

            assert self.adapters is not None
            self.adapters.submit(name, send, sequence.tenant)

    def fail(self, error: Exception) -> None:
        """Have the engine fail, also if the thread waits for a device that does not answer."""

        def raise_it() -> None:
            raise error

        self._inbox.put(raise_it)
        self.join(_PATIENCE_SECONDS)
        if self.is_alive() and not self._stopping:
            logger.error("the engine thread does not answer; %s", error)
            self._die(describe(error))

    def cancel(self, request_id: str) -> None:
        """Drop a request before the next step."""
        self._inbox.put(_Cancel(request_id))

    def run(self) -> None:
        if self._runner.device.type == "cuda":
            torch.cuda.set_device(self._runner.device)  # the current device is per thread
        while True:
            try:
                if self.failure is not None:
                    self._begin_again()
                self._serve()
                failure = None
            except BaseException as error:  # of any kind, or callers would wait for ever
                if not self._dead:  # else it misses what was ended meanwhile
                    logger.exception("the engine thread failed")
                failure = describe(error)
            with self._entrance:
                if self._dead:
                    return
                self._stopping |= failure is None
                self.failure = failure
            if failure is None:
                self._fail_all(EngineStoppedError("the engine was stopped"))
                return
            self._counters.failures += 1
            self.stats = replace(
                self.stats,
                running=0,
                waiting=0,
                failures=self._counters.failures,
                restarts=self._restarts.taken,
            )
            if self._stopping or not self._restarts.take():
                self._die(failure)
                return
            self._fail_all(EngineFailedError(f"the engine has failed: {failure}"))
            if self._stopping:  # its message may be among those that were dropped
                return
            logger.warning("the engine begins again, with an empty KV cache")

    def _die(self, failure: str) -> None:
        """Fail for good."""
        with self._entrance:
            self.failure = failure
            self._dead, told = True, self._when_dead
        self._fail_all(EngineFailedError(f"the engine has failed: {failure}"))
        told()

    def _serve(self) -> None:
        """Apply messages and compute steps until told to stop."""
        while self._take_messages():
            started = time.monotonic()
            try:
                batch, outputs = self._step()
            except Exception as error:
                if not (is_out_of_memory(error) and self._batch):
                    raise
                self._give_up_one(error)
                continue
            if batch:
                self._count(batch, time.monotonic() - started)
            # Before the outputs: a caller that has its last output must see its blocks freed.
            self.stats = self._counters.snapshot(self._scheduler, self._restarts.taken)
            deliver(outputs)

    def _count(self, batch: ScheduledBatch, seconds: float) -> None:
        self._counters.add_step(batch, seconds)
        if (speculation := self._scheduler.speculation) is not None:
            rows = speculation.rows(
                sum(item.num_tokens for item in batch), sum(item.num_logits for item in batch)
            )
            speculation.observe(rows, seconds)

    def _begin_again(self) -> None:
        self._batch = []
        self._deferred.clear()
        self._idle = True
        self._runner.reset()
        self._scheduler = self._new_scheduler()
        if self.adapters is not None:
            self.adapters.restart()
            self._scheduler.adapters = self.adapters.cache
        self.stats = self._counters.snapshot(self._scheduler, self._restarts.taken)
        self.failure = None

    def _give_up_one(self, error: Exception) -> None:
        """End the sequence with the most tokens in a step that ran out of memory.

        The other sequences go on in the next step.
        """
        logger.error("out of memory in a step of %d sequences: %s", len(self._batch), error)
        # max() returns the first of equals: reversed, that is the youngest.
        sequence = max(reversed(self._batch), key=lambda item: item.num_tokens).sequence
        for item in self._batch:
            # A prompt reader may have seen hidden states of this step and would count them twice
            # when the step is computed again. Preempting makes it start afresh.
            # So may the states of layers that keep them.
            seen = item.prompt_reader is not None or item.sequence.state is not None
            if item.sequence is not sequence and seen:
                self._scheduler.preempt(item.sequence)
        _, stream = self._streams.pop(sequence.request_id)
        self._scheduler.finish(sequence)
        failure = OutOfMemoryError(
            "the server has no memory left to compute this request: send a shorter one, or fewer "
            "at once"
        )
        stream.send(failure)
        if self._overlap:
            torch.cuda.empty_cache()

    def _take_messages(self) -> bool:
        """Apply everything in the inbox, waiting if there is nothing to compute.

        Returns False when told to stop.
        """
        idle = self._idle
        while True:
            try:
                message = self._inbox.get(block=idle)
            except Empty:
                return True
            idle = False
            if isinstance(message, _Stop):
                return False
            if isinstance(message, _Add):
                self._streams[message.sequence.request_id] = (message.sequence, message.stream)
                self._scheduler.add(message.sequence)
            elif not isinstance(message, _Cancel):
                message()
            elif message.request_id in self._streams:
                sequence, _ = self._streams.pop(message.request_id)
                self._scheduler.finish(sequence)

    @torch.inference_mode()
    def _step(self) -> tuple[ScheduledBatch, Outputs]:
        """What was computed, if anything, and what callers get of it."""
        self._batch = []
        batch = self._batch = self._scheduler.schedule()
        # An empty schedule waits for a message (such as "adapter read"): block on the inbox.
        self._idle = not batch
        outputs: Outputs = []
        if not batch:
            if self._overlap:
                self._write_deferred()
            return batch, outputs
        logits = self._runner.run(batch)
        samplers: list[SequenceSampler] = []
        allowed: list[Tensor | None] = []
        for item in batch:
            if item.samples:
                sampler, guide = item.sequence.sampler, item.sequence.request.guide
                samplers.append(sampler)
                samplers += [sampler.after(item.draft[:n]) for n in range(1, item.num_logits)]
                if guide is None:
                    allowed += [None] * item.num_logits
                else:
                    allowed += guide.allowed_along(item.draft) if item.draft else [guide.allowed()]
        pending = None
        if samplers:
            pending = start_sampling(self._runner.decoder.backend, logits, samplers, allowed)
        if self._overlap:
            self._write_deferred()
        sampled = iter(pending.result() if pending else [])
        # Past this point the step has side effects and cannot be retried after an out-of-memory
        # error.
        self._batch = []
        ended: list[Sequence] = []
        for item in batch:
            sequence = item.sequence
            if sequence.num_output_tokens == 0:
                self._counters.prompt_tokens += item.num_tokens - len(item.draft)
            tokens = list(islice(sampled, item.num_logits))
            if item.draft:
                tokens = accepted(item.draft, tokens)
                self._counters.add_draft(len(item.draft), len(tokens) - 1)
                sequence.acceptance.drafted += len(item.draft)
                sequence.acceptance.accepted += len(tokens) - 1
            if item.proposal is not None and (speculation := self._scheduler.speculation):
                found = [token[0] for token in tokens if not isinstance(token, NoTokenError)]
                speculation.observe_tokens(
                    item.proposal, len(item.draft), found, sequence.acceptance
                )
            stream = self._streams[sequence.request_id][1]
            finished, taken = False, 0
            for token in tokens:
                if isinstance(token, NoTokenError):
                    outputs.append((stream, token))
                    finished = True
                    break
                taken += 1
                output = self._take(sequence, token)
                if output is not None:
                    outputs.append((stream, output))
                    finished = isinstance(output, Exception) or output.finish_reason is not None
                    if finished:
                        break
            if item.completes and not item.samples:
                outputs.append((stream, sequence.output(None, "", "length")))
                finished = True
            self._scheduler.computed(item, taken)
            if finished:
                del self._streams[sequence.request_id]
                ended.append(sequence)
        if self._scheduler.speculation is not None:
            self._scheduler.speculation.see(batch)
        for sequence in ended:
            self._scheduler.finish(sequence)
        return batch, outputs

    def _take(self, sequence: Sequence, token: Sampled) -> RequestOutput | Exception | None:
        """Give a sequence its next token; returns what to send, None if that is done later."""
        sequence.sampler.record(token[0])
        sequence.token_ids.append(token[0])
        self._counters.generation_tokens += 1
        if self._overlap and sequence.goes_on:
            self._deferred.append((sequence, token))
            return None
        if any(each is sequence for each, _ in self._deferred):
            # Accepted draft tokens come before the last, after which nothing more is sent.
            self._write_deferred()
        try:
            return sequence.advance(token)
        except (GuideError, DisallowedTokenError) as error:
            return error

    def _write_deferred(self) -> None:
        """Detokenize and send the last step's tokens while the device computes the next step."""
        outputs: Outputs = []
        for sequence, sampled in self._deferred:
            entry = self._streams.get(sequence.request_id)
            if entry is not None and entry[0] is sequence:  # else it was cancelled
                text = sequence.detokenizer.add(sampled[0])
                outputs.append((entry[1], sequence.output(sampled, text, None)))
        self._deferred.clear()
        deliver(outputs)

    def _fail_adapter(self, version: AdapterVersion, error: AdapterError) -> None:
        """End the requests that wait for an adapter whose files cannot be read.

        If another version has replaced it under the same name, requests that have not started yet
        use that one: the files may simply have been overwritten.
        """
        assert self.adapters is not None
        failure = AdapterUnavailableError(str(error))
        successor = self.adapters.successor(version)
        for sequence in [s for s in self._scheduler.waiting if s.adapter is version]:
            unread = sequence.num_cached_tokens is None
            if successor is not None and unread and successor.tokens is sequence.tokens:
                self._scheduler.change_adapter(sequence, successor)
                continue
            _, stream = self._streams.pop(sequence.request_id)
            self._scheduler.finish(sequence)
            stream.send(failure)

    def _fail_all(self, error: Exception) -> None:
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, _Add):
                self._streams[message.sequence.request_id] = (message.sequence, message.stream)
        for _, stream in self._streams.values():
            stream.send(error)
        self._streams.clear()
