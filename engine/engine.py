"""The engine: one thread that owns all mutable state, and asynchronous streams out of it.

Callers on any event loop put requests into one queue; the thread schedules, computes, samples, and
hands each loop its outputs once per step. Nothing but the queue and the outputs crosses threads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import torch
from nybble.engine.adapter_cache import AdapterVersion
from nybble.engine.adapter_slots import AdapterSlots
from nybble.engine.adapters import AdapterInfo, AdapterRegistry
from nybble.engine.block_manager import BlockManager
from nybble.engine.config import EngineConfig, resolve_device
from nybble.engine.decoder import Decoder, DecoderShape
from nybble.engine.detokenizer import Detokenizer
from nybble.engine.failure import Restarts, describe, is_out_of_memory
from nybble.engine.generation_config import (
    eos_token_ids,
    read_generation_config,
    sampling_defaults,
)
from nybble.engine.prompt_reader import EmbeddingReader, LogprobReader, read_pooling
from nybble.engine.request import (
    AdapterUnavailableError,
    EngineFailedError,
    EngineOverloadedError,
    EngineStoppedError,
    FinishReason,
    GuideError,
    OutOfMemoryError,
    ParameterError,
    Pooling,
    Request,
    RequestOutput,
)
from nybble.engine.runner import ModelRunner, free_kv_bytes, kv_blocks
from nybble.engine.sampler import PendingSample, Sampled, SequenceSampler
from nybble.engine.scheduler import ScheduledBatch, Scheduler
from nybble.engine.sequence import Sequence
from nybble.engine.size_counts import SizeCounts
from nybble.kernels.progress import Progress, track
from nybble.loaders import AdapterError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from nybble.loaders import Checkpoint

logger = logging.getLogger(__name__)

_RETRY_AFTER_SECONDS = 5


@dataclass(frozen=True)
class EngineStats:
    """A snapshot after the last step. Token, preemption and step figures count since the start.

    step_seconds: time spent in steps. step_sequences, step_tokens: how many each step computed.
    failures: of the engine thread. restarts: after them.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    step_sequences: SizeCounts = field(default_factory=SizeCounts)
    step_tokens: SizeCounts = field(default_factory=SizeCounts)
    failures: int = 0
    restarts: int = 0


@dataclass(frozen=True)
class _Stream:
    """Where a request's outputs go."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[RequestOutput | Exception]


_Outputs = dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput | GuideError]]]


@dataclass(frozen=True)
class _Add:
    sequence: Sequence
    stream: _Stream


@dataclass(frozen=True)
class _Cancel:
    request_id: str


class _Stop:
    pass


class Engine:
    """Continuous batching over one model. See the module's docstring for who owns what.

    sampling_defaults: what the model's makers recommend for requests that name no value.
    pooling: how they make an embedding of a prompt; None for a way the engine does not know.
    model_type: the architecture's name.

    An engine that fails ends every request in flight with EngineFailedError. It then begins again,
    with the same weights and adapters and an empty KV cache, as often as the settings allow.
    """

    def __init__(
        self,
        runner: ModelRunner,
        new_scheduler: Callable[[], Scheduler],
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: frozenset[int],
        sampling_defaults: Mapping[str, float],
        config: EngineConfig,
        max_model_len: int,
        model_type: str,
        pooling: Pooling | None = "last",
    ) -> None:
        self.tokenizer = tokenizer
        self.model_type = model_type
        self.pooling = pooling
        self.max_model_len = max_model_len
        self._runner = runner
        self._new_scheduler = new_scheduler
        self._scheduler = new_scheduler()
        self._eos_token_ids = eos_token_ids
        self.sampling_defaults = sampling_defaults
        self._max_in_flight = config.max_num_seqs + config.max_waiting
        # A function is run on the engine thread.
        self._inbox: SimpleQueue[_Add | _Cancel | _Stop | Callable[[], None]] = SimpleQueue()
        self._adapters: AdapterRegistry | None = None
        if config.adapters is not None and runner.adapters is not None:
            self._adapters = AdapterRegistry(
                runner.adapters,
                config.adapters.host_bytes,
                post=self._inbox.put,
                on_failure=self._fail_adapter,
            )
            self._scheduler.adapters = self._adapters.cache
        self._idle = True
        # A GPU computes while its last tokens become text; a CPU has nothing to gain from waiting.
        self._overlap = runner.device.type == "cuda"
        self._deferred: list[tuple[Sequence, Sampled]] = []
        self._in_flight: set[str] = set()
        self._streams: dict[str, tuple[Sequence, _Stream]] = {}
        self._thread = threading.Thread(target=self._run, name="nybble-engine", daemon=True)
        self._restarts = Restarts(config.restarts)
        self._failures = 0
        self._failure: str | None = None
        self._when_dead: Callable[[], None] = lambda: None
        self._stopping = False
        # Held while a request is let in, so that none comes in behind the news of a failure.
        self._entrance = threading.Lock()
        self._batch: ScheduledBatch = []  # what is being computed
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._steps = 0
        self._step_seconds = 0.0
        self._step_sequences = self._step_tokens = SizeCounts()
        self._stats = self._snapshot()

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, config: EngineConfig, progress: Progress = True
    ) -> Engine:
        """Build an engine from a checkpoint; ``warm_up`` and ``start`` come next.

        Raises UnsupportedModelError for an architecture the decoder does not compute, and
        ValueError where the KV cache cannot hold a single block, the device cannot be used or the
        settings contradict.
        """
        shape = DecoderShape.from_config(checkpoint.config)
        max_model_len = config.max_model_len or shape.max_model_len
        if max_model_len > shape.max_model_len:
            raise ValueError(
                f"max_model_len is {max_model_len}, but the model goes up to {shape.max_model_len}"
            )
        device = resolve_device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the thread's current device
        if config.kv_dtype != "auto" and device.type == "cpu":
            raise ValueError(
                f"kv_dtype is {config.kv_dtype!r}, which needs a GPU; expected 'auto' on the CPU"
            )
        if config.kv_dtype == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError(
                "kv_dtype is 'fp8', which needs a GPU of compute capability 8.9 (Ada) or newer; "
                "expected 'int8' or 'auto'"
            )
        if device.type == "cuda" and config.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype is {config.dtype}; expected float16 or bfloat16 on a GPU")
        if device.type == "cpu" and config.dtype != torch.bfloat16 and checkpoint.format != "none":
            logger.warning(
                "dtype is %s: the CPU kernels compute in bfloat16; 4-bit weights are dequantized "
                "at every step, many times slower",
                str(config.dtype).removeprefix("torch."),
            )
        if config.kv_cache_bytes is not None:
            kv_blocks(config.kv_cache_bytes, shape, config)
        weights = track(checkpoint.weights(), "Loading weights", progress, unit="tensors")
        decoder = Decoder(
            checkpoint.config,
            weights,
            device=device,
            dtype=config.dtype,
            max_model_len=max_model_len,
        )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
        if not tokenizer.is_fast:
            raise ValueError(f"{checkpoint.folder} has no tokenizer.json: streaming needs one")
        adapters = None
        if config.adapters is not None:
            adapters = AdapterSlots(
                checkpoint.config,
                count=config.adapters.slots,
                max_rank=config.adapters.max_rank,
                device=device,
                dtype=config.dtype,
            )
        # More blocks than every sequence at full length could fill would only waste memory.
        most = config.max_num_seqs * -(-max_model_len // config.block_size)
        kv_bytes = config.kv_cache_bytes or free_kv_bytes(device)
        num_blocks = min(kv_blocks(kv_bytes, shape, config), most)
        max_model_len = min(max_model_len, num_blocks * config.block_size)
        settings = read_generation_config(checkpoint.folder)

        def new_scheduler() -> Scheduler:
            blocks = BlockManager(
                num_blocks, config.block_size, prefix_caching=config.prefix_caching
            )
            return Scheduler(blocks, config.max_num_seqs, config.max_batched_tokens)

        return cls(
            runner=ModelRunner(decoder, config, num_blocks, adapters),
            new_scheduler=new_scheduler,
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids(settings, checkpoint.config, tokenizer),
            sampling_defaults=sampling_defaults(settings),
            config=config,
            max_model_len=max_model_len,
            model_type=str(checkpoint.config.model_type),
            pooling=read_pooling(checkpoint.folder),
        )

    def warm_up(self, progress: Progress = True) -> None:
        """Compile and measure what a GPU needs before its first request; nothing on the CPU."""
        self._runner.warm_up(progress)

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; requests in flight raise EngineStoppedError."""
        self._stopping = True
        self._inbox.put(_Stop())
        if self._thread.is_alive():
            self._thread.join()
        if self._adapters is not None:
            self._adapters.close()

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence unless its parameters say otherwise."""
        return self._eos_token_ids

    @property
    def vocab_size(self) -> int:
        """Rows of the logits; a tokenizer may know fewer tokens."""
        return self._runner.decoder.shape.vocab

    @property
    def hidden_size(self) -> int:
        """Numbers in an embedding."""
        return self._runner.decoder.shape.hidden

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and requests are taken."""
        return self._thread.is_alive() and self._failure is None and not self._stopping

    @property
    def failure(self) -> str | None:
        """Why the engine takes no requests, where it has failed and not begun again."""
        return self._failure

    def when_dead(self, function: Callable[[], None]) -> None:
        """Have ``function`` called, on any thread, when the engine has failed for good."""
        self._when_dead = function
        if self._failure is not None and not self._thread.is_alive():
            function()

    def stats(self) -> EngineStats:
        """Figures of the last step; safe from any thread."""
        return self._stats

    def load_adapter(self, name: str, path: str, *, replace: bool = True) -> AdapterInfo:
        """Read an adapter (a folder or hub name) and serve it as ``name``; blocks while reading.

        A name that is taken changes hands at once, and requests that have begun keep the version
        they began with; unless ``replace``, it is refused. Raises AdapterError, which changes
        nothing, and ParameterError where adapters are off.
        """
        return self._require_adapters().load(name, path, replace=replace)

    def unload_adapter(self, name: str) -> None:
        """Take an adapter away from new requests. Raises ParameterError for an unknown name."""
        self._require_adapters().unload(name)

    def adapter(self, name: str) -> AdapterInfo | None:
        """The loaded adapter of this name; safe from any thread."""
        return None if self._adapters is None else self._adapters.info(name)

    def adapters(self) -> list[AdapterInfo]:
        """Every loaded adapter, by name; safe from any thread."""
        return [] if self._adapters is None else self._adapters.infos()

    def _require_adapters(self) -> AdapterRegistry:
        if self._adapters is None:
            raise ParameterError("adapter", "this server was started without room for adapters")
        return self._adapters

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput]:
        """Stream what the engine adds to a request; closing the stream cancels it.

        Raises ParameterError for a request that can never be served, EngineOverloadedError when
        the queue is full, EngineStoppedError when the engine stops or has failed,
        AdapterUnavailableError when the request's adapter can no longer be read.
        """
        sequence = self._new_sequence(request)
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        if request.request_id in self._in_flight:
            raise ValueError(f"request id {request.request_id!r} is already in flight")
        if len(self._in_flight) >= self._max_in_flight:
            raise EngineOverloadedError(
                f"{len(self._in_flight)} requests are in flight, the most this server takes",
                _RETRY_AFTER_SECONDS,
            )
        with self._entrance:
            if not self.healthy:
                raise EngineStoppedError(
                    "the engine is not running"
                    if self._failure is None
                    else f"the engine has failed: {self._failure}"
                )
            self._submit(sequence, stream)
        self._in_flight.add(request.request_id)
        finished = False
        try:
            while not finished:
                output = await stream.queue.get()
                if isinstance(output, Exception):
                    finished = True
                    raise output
                finished = output.finish_reason is not None
                yield output
        finally:
            self._in_flight.discard(request.request_id)
            if not finished:
                self._inbox.put(_Cancel(request.request_id))

    def _submit(self, sequence: Sequence, stream: _Stream) -> None:
        adapter = sequence.request.adapter
        if adapter is None:
            self._inbox.put(_Add(sequence, stream))
            return

        def send(version: AdapterVersion) -> None:
            sequence.adapter = version
            self._inbox.put(_Add(sequence, stream))

        self._require_adapters().submit(adapter, send)

    def _new_sequence(self, request: Request) -> Sequence:
        prompt, params = request.prompt_token_ids, request.params
        vocab = self._runner.decoder.shape.vocab
        if not prompt:
            raise ParameterError("prompt", "the prompt is empty")
        for parameter, ids in (("prompt", prompt), ("logit_bias", params.logit_bias)):
            for token in ids:
                if not 0 <= token < vocab:
                    raise ParameterError(
                        parameter, f"token id {token} is outside the vocabulary of {vocab}"
                    )
        room = self.max_model_len - len(prompt)
        max_tokens = 0 if request.pooling is not None else params.max_tokens
        if room < 0 or (room == 0 and max_tokens != 0):
            raise ParameterError(
                "prompt",
                f"the prompt has {len(prompt)} tokens, but prompt and output together are limited "
                f"to {self.max_model_len}",
            )
        if max_tokens is not None and max_tokens > room:
            raise ParameterError(
                "max_tokens",
                f"max_tokens is {max_tokens} and the prompt has {len(prompt)} tokens, but "
                f"together they are limited to {self.max_model_len}",
            )
        return Sequence(
            request,
            max_tokens=room if max_tokens is None else max_tokens,
            detokenizer=Detokenizer(self.tokenizer.backend_tokenizer, prompt, params.stop),
            sampler=SequenceSampler(params, prompt),
        )

    def _run(self) -> None:
        if self._runner.device.type == "cuda":
            torch.cuda.set_device(self._runner.device)  # of this thread, as where it was loaded
        while True:
            try:
                if self._failure is not None:
                    self._begin_again()
                self._serve()
                failure = None
            except BaseException as error:  # whatever it is, callers must not wait for ever
                logger.exception("the engine thread failed")
                failure = describe(error)
            with self._entrance:
                self._stopping |= failure is None
                self._failure = failure
            if failure is None:
                self._fail_all(EngineStoppedError("the engine was stopped"))
                return
            self._failures += 1
            self._stats = replace(
                self._stats,
                running=0,
                waiting=0,
                failures=self._failures,
                restarts=self._restarts.taken,
            )
            self._fail_all(EngineFailedError(f"the engine has failed: {failure}"))
            if self._stopping or not self._restarts.take():
                self._when_dead()
                return
            logger.warning("the engine begins again, with an empty KV cache")

    def _serve(self) -> None:
        """Take messages and compute steps until told to stop."""
        while self._take_messages():
            try:
                outputs = self._step()
            except Exception as error:
                if not (is_out_of_memory(error) and self._batch):
                    raise
                self._give_up_one(error)
                continue
            # Before the outputs, so that a caller who has its last one sees its blocks free.
            self._stats = self._snapshot()
            for loop, delivered in outputs.items():
                _call(loop, _deliver, delivered)

    def _begin_again(self) -> None:
        self._batch = []
        self._deferred.clear()
        self._idle = True
        self._runner.reset()
        self._scheduler = self._new_scheduler()
        if self._adapters is not None:
            self._adapters.restart()
            self._scheduler.adapters = self._adapters.cache
        self._stats = self._snapshot()
        self._failure = None

    def _give_up_one(self, error: Exception) -> None:
        """End what takes most of a step there was no memory for; the next is without it."""
        logger.error("out of memory in a step of %d sequences: %s", len(self._batch), error)
        # The youngest of several.
        sequence = max(reversed(self._batch), key=lambda item: item.num_tokens).sequence
        for item in self._batch:
            # What a reader has seen of this step it would count twice: let it begin anew.
            if item.sequence is not sequence and item.sequence.reading is not None:
                self._scheduler.preempt(item.sequence)
        _, stream = self._streams.pop(sequence.request_id)
        self._scheduler.finish(sequence)
        failure = OutOfMemoryError(
            "the server has no memory left to compute this request: send a shorter one, or fewer "
            "at once"
        )
        _call(stream.loop, stream.queue.put_nowait, failure)
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
    def _step(self) -> _Outputs:
        started = time.monotonic()
        self._batch = []
        batch = self._batch = self._scheduler.schedule()
        # Only a message can change what an empty schedule waits for: an adapter that is being read.
        self._idle = not batch
        outputs: _Outputs = defaultdict(list)
        if not batch:
            self._write_deferred()
            return outputs
        logits = self._runner.run(batch)
        for item in batch:
            if item.samples and item.sequence.request.guide is not None:
                item.sequence.sampler.allowed = item.sequence.request.guide.allowed()
        completing = [item.completes for item in batch]
        samplers = [item.sequence.sampler for item in batch if item.samples]
        pending = PendingSample(logits, samplers) if samplers else None
        self._write_deferred()
        sampled = iter(pending.result() if pending else [])
        self._batch = []  # from here on the step is no longer as if it had not been
        for item, completes in zip(batch, completing, strict=True):
            sequence = item.sequence
            if sequence.num_output_tokens == 0:
                self._prompt_tokens += item.num_tokens
            self._scheduler.computed(item)
            if completes:
                output: RequestOutput | GuideError
                if sequence.max_tokens == 0:
                    output = _output(sequence, None, "", "length")
                else:
                    token, logprob = next(sampled)
                    if self._overlap and self._goes_on(sequence, token):
                        self._append(sequence, token)
                        self._deferred.append((sequence, (token, logprob)))
                        continue
                    try:
                        output = self._advance(sequence, (token, logprob))
                    except GuideError as error:
                        output = error
                stream = self._streams[sequence.request_id][1]
                outputs[stream.loop].append((stream, output))
                if isinstance(output, GuideError) or output.finish_reason is not None:
                    del self._streams[sequence.request_id]
                    self._scheduler.finish(sequence)
        self._steps += 1
        self._step_seconds += time.monotonic() - started
        self._step_sequences = self._step_sequences.plus(len(batch))
        self._step_tokens = self._step_tokens.plus(sum(item.num_tokens for item in batch))
        return outputs

    def _advance(self, sequence: Sequence, sampled: Sampled) -> RequestOutput:
        """Give a sequence its next token and say what it added."""
        params = sequence.request.params
        token = sampled[0]
        self._append(sequence, token)
        guide = sequence.request.guide
        complete = guide is not None and guide.accept(token)
        reason: FinishReason | None = None
        text = ""
        if token in params.stop_token_ids or (
            token in self._eos_token_ids and not params.ignore_eos
        ):
            reason = "stop"
        else:
            text = sequence.detokenizer.add(token)
            if sequence.detokenizer.stopped or complete:
                reason = "stop"
            elif sequence.num_output_tokens >= sequence.max_tokens:
                reason = "length"
        if reason is not None:
            text += sequence.detokenizer.flush()
        return _output(sequence, sampled, text, reason)

    def _append(self, sequence: Sequence, token: int) -> None:
        sequence.token_ids.append(token)
        self._generation_tokens += 1

    def _goes_on(self, sequence: Sequence, token: int) -> bool:
        """Whether a sequence continues after ``token`` whatever its text says."""
        params = sequence.request.params
        return (
            not params.stop
            and sequence.request.guide is None
            and sequence.num_output_tokens + 1 < sequence.max_tokens
            and token not in params.stop_token_ids
            and (params.ignore_eos or token not in self._eos_token_ids)
        )

    def _write_deferred(self) -> None:
        """Turn the last step's tokens into text and send it, while the device computes the next."""
        outputs: _Outputs = defaultdict(list)
        for sequence, sampled in self._deferred:
            entry = self._streams.get(sequence.request_id)
            if entry is not None and entry[0] is sequence:  # else its caller has gone
                text = sequence.detokenizer.add(sampled[0])
                outputs[entry[1].loop].append((entry[1], _output(sequence, sampled, text, None)))
        self._deferred.clear()
        for loop, delivered in outputs.items():
            _call(loop, _deliver, delivered)

    def _fail_adapter(self, version: AdapterVersion, error: AdapterError) -> None:
        """End the requests that wait for an adapter that cannot be read."""
        failure = AdapterUnavailableError(str(error))
        for sequence in [s for s in self._scheduler.waiting if s.adapter is version]:
            _, stream = self._streams.pop(sequence.request_id)
            self._scheduler.finish(sequence)
            _call(stream.loop, stream.queue.put_nowait, failure)

    def _fail_all(self, error: Exception) -> None:
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, _Add):
                self._streams[message.sequence.request_id] = (message.sequence, message.stream)
        for _, stream in self._streams.values():
            _call(stream.loop, stream.queue.put_nowait, error)
        self._streams.clear()

    def _snapshot(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_total=scheduler.blocks.num_blocks,
            kv_blocks_free=scheduler.blocks.num_free_blocks,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            step_seconds=self._step_seconds,
            step_sequences=self._step_sequences,
            step_tokens=self._step_tokens,
            failures=self._failures,
            restarts=self._restarts.taken,
        )


def _output(
    sequence: Sequence, sampled: Sampled | None, text: str, reason: FinishReason | None
) -> RequestOutput:
    reader, sequence.reader = sequence.reader, None
    logprob = None if sampled is None else sampled[1]
    return RequestOutput(
        text=text,
        token_ids=() if sampled is None else sampled[:1],
        logprobs=() if logprob is None else (logprob,),
        finish_reason=reason,
        prompt_tokens=sequence.num_prompt_tokens,
        completion_tokens=sequence.num_output_tokens,
        cached_tokens=sequence.num_cached_tokens or 0,
        queue_seconds=sequence.queue_seconds,
        prompt_logprobs=reader.result() if isinstance(reader, LogprobReader) else None,
        embedding=reader.result() if isinstance(reader, EmbeddingReader) else None,
    )


def _deliver(delivered: list[tuple[_Stream, RequestOutput | GuideError]]) -> None:
    for stream, output in delivered:
        stream.queue.put_nowait(output)


def _call(loop: asyncio.AbstractEventLoop, function: object, argument: object) -> None:
    """Run on another thread's loop; a loop that has closed has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(function, argument)  # type: ignore[arg-type]
    except RuntimeError:
        if not loop.is_closed():
            raise
