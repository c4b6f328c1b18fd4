"""The engine as its callers see it: requests from any event loop, asynchronous streams out of it.

One thread owns all mutable state (:mod:`nybble.engine.engine_thread`); nothing but its queue and
the outputs crosses threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as Several
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from nybble.engine.adapters import AdapterInfo, AdapterRegistry, AdapterUsage
from nybble.engine.base_layers import whole_projections
from nybble.engine.block_manager import BlockManager
from nybble.engine.config import EngineConfig, resolve_device
from nybble.engine.decoder import Decoder
from nybble.engine.detokenizer import Detokenizer
from nybble.engine.draft_model import (
    MAX_GPU_HEAD_DIM,
    cached_architecture,
    captured_layers,
    check_speculation,
    draft_cache,
    load_draft_decoder,
    load_head,
)
from nybble.engine.drafter import Drafter
from nybble.engine.engine_thread import EngineThread
from nybble.engine.generation_config import (
    eos_token_ids,
    read_generation_config,
    sampling_defaults,
)
from nybble.engine.head_drafter import Head, HeadDrafter, warm_up
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.model_drafter import ModelDrafter
from nybble.engine.ngram_drafter import NgramDrafter
from nybble.engine.parallel import TensorParallel
from nybble.engine.prompt_reader import (
    EmbeddingSettings,
    read_embedding_settings,
    read_pooling,
)
from nybble.engine.ranks import NoRanks, check_ranks, start_ranks
from nybble.engine.request import (
    AdapterMixture,
    ContextLengthError,
    EngineOverloadedError,
    NotANumberError,
    ParameterError,
    Pooling,
    Request,
    RequestOutput,
    SamplingParams,
    require_known_tokens,
)
from nybble.engine.runner import ModelRunner, free_kv_bytes
from nybble.engine.sampler import SequenceSampler
from nybble.engine.scheduler import Scheduler
from nybble.engine.sequence import Sequence
from nybble.engine.speculation import Speculation
from nybble.engine.state_cache import StateCache, cache_sizes
from nybble.engine.stats import EngineStats
from nybble.engine.streams import Stream
from nybble.engine.tokens import Tokens
from nybble.engine.vocabulary import Vocabulary
from nybble.kernels.backend import backend_for
from nybble.kernels.progress import Progress, track
from nybble.loaders.model_config import generates
from nybble.loaders.tokenizer import check_vocabulary, load_tokenizer
from nybble.models import Architecture, UnsupportedModelError, architecture_of

if TYPE_CHECKING:
    from nybble.loaders import Checkpoint

logger = logging.getLogger(__name__)

# The LoRA kernels hold a tile of so many ranks in registers.
_MAX_GPU_LORA_RANK = 256


class Engine:
    """Continuous batching over one model.

    sampling_defaults: what the model's makers recommend for requests that name no value.
    pooling: how they make an embedding of a prompt; None for a way the engine does not know.
    embedding: what else they say of embeddings.
    generates: whether it has an output layer.
    num_labels: of a model that classifies sequences, which has scores for them; 0 for others.
    vocabulary: what the tokenizer's tokens stand for.
    tokens: all of this of the base model; see :meth:`tokens_of`.
    model_type: the architecture's name.
    eos_token_ids: tokens that end a sequence unless its parameters say otherwise.
    max_num_seqs: sequences computed in one step.
    draft_method: by what tokens are drafted; None if they are not.
    draft_runner: of the draft model; None if there is none. draft_head: a head, likewise.
    """

    def __init__(
        self,
        runner: ModelRunner,
        new_scheduler: Callable[[], Scheduler],
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        eos_token_ids: frozenset[int],
        sampling_defaults: Mapping[str, float],
        config: EngineConfig,
        max_model_len: int,
        model_type: str,
        pooling: Pooling | None = "last",
        draft_runner: ModelRunner | None = None,
        *,
        embedding: EmbeddingSettings | None = None,
        generates: bool = True,
        draft_method: str | None = None,
        draft_head: Head | None = None,
    ) -> None:
        self._draft_head = draft_head
        self.draft_method = draft_method
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.model_type = model_type
        self.pooling = pooling
        self.embedding = embedding or EmbeddingSettings()
        self.generates = generates
        score = runner.decoder.score
        self.num_labels = 0 if score is None else len(score)
        self.max_model_len = max_model_len
        self.sampling_defaults = sampling_defaults
        self.eos_token_ids = eos_token_ids
        self._runner = runner
        self._draft_runner = draft_runner
        self.tokens = Tokens(
            tokenizer, vocabulary, runner.decoder.architecture.vocab, eos_token_ids
        )
        self._thread = EngineThread(runner, new_scheduler, config, self.tokens)
        self._adapters = self._thread.adapters
        self.max_num_seqs = config.max_num_seqs
        self._config = config
        self._max_in_flight = config.max_num_seqs + config.max_waiting
        self._in_flight: set[str] = set()
        self._ranks = NoRanks()  # that end with the engine

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: EngineConfig,
        progress: Progress = True,
        ranks: NoRanks | None = None,
        draft: Checkpoint | None = None,
    ) -> Engine:
        """Build an engine from a checkpoint; ``warm_up`` and ``start`` come next.

        draft: of a draft model or a head, if one is to draft.
        ranks: processes to compute it with, which can compute other models afterwards; None to
            start those that the config asks for, which end with the engine.

        Raises UnsupportedModelError for an architecture the decoder does not compute, and
        ValueError where the KV cache cannot hold a single block, the device cannot be used or the
        settings contradict, and RankFailedError if a rank ends meanwhile.
        """
        architecture = architecture_of(checkpoint.config)
        check_ranks(architecture, config)
        check_speculation(checkpoint, draft, config)
        if ranks is not None:
            try:
                return cls._load(checkpoint, architecture, config, progress, ranks, draft)
            except Exception:
                ranks.forget()
                raise
        ranks = start_ranks(config)
        try:
            engine = cls._load(checkpoint, architecture, config, progress, ranks, draft)
        except BaseException:
            ranks.close()
            raise
        engine._ranks = ranks
        return engine

    @classmethod
    def _load(
        cls,
        checkpoint: Checkpoint,
        architecture: Architecture,
        config: EngineConfig,
        progress: Progress,
        ranks: NoRanks,
        draft: Checkpoint | None,
    ) -> Engine:
        max_model_len = config.max_model_len or architecture.default_max_model_len
        if max_model_len > architecture.max_model_len:
            raise ValueError(
                f"max_model_len is {max_model_len}, but the model goes up to "
                f"{architecture.max_model_len}"
            )
        device = resolve_device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the thread's current device
        if config.kv_dtype == "fp8" and device.type == "cpu":
            raise ValueError(
                "kv_dtype is 'fp8', which needs a GPU; expected 'int8' or 'auto' on the CPU"
            )
        # Latents are no heads: their kernels have tiles of their own.
        heads = [each for each in architecture.attentions if each not in architecture.latents]
        widest = max((attention.head_dim for attention in heads), default=0)
        if device.type == "cuda" and widest > MAX_GPU_HEAD_DIM:
            raise UnsupportedModelError(
                f"the model's heads have {widest} entries; on a GPU {MAX_GPU_HEAD_DIM} is the most"
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
        if device.type != "cpu" and config.adapters is not None and config.adapters.dtype != "auto":
            raise ValueError(
                f"the dtype of adapters is {config.adapters.dtype!r}, which is for the CPU: leave "
                "it out (--lora-dtype auto)"
            )
        if device.type == "cuda" and config.adapters is not None:
            rank = config.adapters.max_rank
            if rank > _MAX_GPU_LORA_RANK:
                raise ValueError(
                    f"max_rank is {rank}, expected at most {_MAX_GPU_LORA_RANK} on a GPU"
                )
        if config.deterministic and device.type == "cpu":
            for attention in architecture.attentions:
                if attention.head_dim % 16:
                    raise ValueError(
                        f"deterministic: the model's heads have {attention.head_dim} entries,"
                        " and the CPU kernels take multiples of 16"
                    )
        if config.deterministic and device.type == "cuda" and architecture.latents:
            raise ValueError(
                f"deterministic: a GPU reads the latents of {architecture.family} models in an "
                "order that depends on the step; turn deterministic off, or choose the device cpu"
            )
        if config.deterministic and device.type == "cuda" and architecture.recurrents:
            raise ValueError(
                f"deterministic: a GPU reads prompts of {architecture.family} models in chunks, "
                "and rounds as they are cut; turn deterministic off, or choose the device cpu"
            )
        own = TensorParallel(0, config.tensor_parallel_size).part_of(architecture)
        layout = KVCacheLayout.of(cached_architecture(own, draft), config, max_model_len)
        drafts_cache = draft_cache(draft, config, max_model_len)

        def sizes(nbytes: int) -> tuple[int, int, int]:
            """Blocks, states, and blocks of the draft model."""
            if drafts_cache is None:
                return *cache_sizes(own, config, layout, max_model_len, nbytes), 0
            drafts = drafts_cache.bytes_of(nbytes, layout.sequence_bytes(max_model_len))
            blocks = cache_sizes(own, config, layout, max_model_len, nbytes - drafts)
            return *blocks, drafts_cache.blocks_in(drafts)

        if config.kv_cache_bytes is not None:
            sizes(config.kv_cache_bytes)
        tokenizer = load_tokenizer(checkpoint.folder)
        check_vocabulary(tokenizer, architecture.vocab)
        vocabulary = Vocabulary(tokenizer.backend_tokenizer)
        ranks.tell("load", checkpoint, config, max_model_len, vocabulary.size)
        weights = track(checkpoint.weights(), "Loading weights", progress, unit="tensors")
        decoder = Decoder(
            architecture,
            weights,
            device=device,
            dtype=config.dtype,
            max_model_len=max_model_len,
            num_tokens=vocabulary.size,
            backend=backend_for(
                device,
                config.dtype,
                deterministic=config.deterministic,
                activations=config.activations,
            ),
            group=ranks.group,
            captures=captured_layers(architecture, draft),
            folder=checkpoint.folder,
        )
        head = load_head(draft, decoder, device, config.dtype)
        adapters = None
        if config.adapters is not None:
            adapters = ranks.new_slots(
                architecture,
                count=config.adapters.slots,
                max_rank=config.adapters.max_rank,
                device_bytes=config.adapters.device_bytes,
                device=device,
                dtype=config.dtype,
                base=decoder.base,
                whole=partial(whole_projections, checkpoint, architecture, config.dtype)
                if ranks.group.size > 1
                else None,
                in_8_bits=config.adapters.dtype == "int8",
            )
        draft_decoder = None
        if draft is not None and drafts_cache is not None:
            draft_decoder = load_draft_decoder(
                draft,
                config,
                drafts_cache.max_model_len,
                min(vocabulary.size, architecture.vocab),
                progress,
            )
        free = min([free_kv_bytes(device), *ranks.answers()])
        nbytes = config.kv_cache_bytes or free
        num_blocks, num_states, num_draft_blocks = sizes(nbytes)
        if num_states and num_states < config.max_num_seqs:
            logger.warning(
                "the KV cache has room for the states of %d sequences: no more run at once, though "
                "max_num_seqs is %d",
                num_states,
                config.max_num_seqs,
            )
            config = replace(config, max_num_seqs=num_states)
        ranks.tell("begin", layout, num_blocks)
        max_model_len = layout.longest_sequence(num_blocks, max_model_len)
        settings = read_generation_config(checkpoint.folder)

        def new_scheduler() -> Scheduler:
            states = None
            if num_states:
                states = StateCache(
                    num_states,
                    config.max_num_seqs,
                    config.block_size,
                    snapshots=config.prefix_caching,
                )
            blocks = BlockManager(
                num_blocks,
                config.block_size,
                windows=layout.windows,
                prefix_caching=config.prefix_caching,
                states=states,
            )
            speculation = None
            if config.speculate != "off":
                drafter = new_drafter(blocks)
                adaptive = config.speculate == "auto"
                speculation = Speculation(
                    drafter,
                    config.max_draft_tokens,
                    adaptive=adaptive,
                    prompt_row=1 - architecture.head_share,
                )
            return Scheduler(
                blocks, config.max_num_seqs, config.max_batched_tokens, speculation=speculation
            )

        draft_runner = None
        if drafts_cache is not None and draft_decoder is not None:
            # Kernels of one order are not needed: drafts change no output.
            draft_config = replace(config, adapters=None, deterministic=False, speculate="off")
            draft_runner = ModelRunner(
                draft_decoder, draft_config, drafts_cache.layout, num_draft_blocks
            )

        def new_drafter(blocks: BlockManager) -> Drafter:
            if head is not None:
                return HeadDrafter(head, runner, blocks, config)
            if drafts_cache is None or draft_runner is None:
                return NgramDrafter()
            draft_runner.reset()
            own_blocks = BlockManager(
                num_draft_blocks,
                config.block_size,
                windows=drafts_cache.layout.windows,
                prefix_caching=config.prefix_caching,
            )
            return ModelDrafter(draft_runner, own_blocks, config.max_batched_tokens)

        runner = ranks.new_runner(decoder, config, layout, num_blocks, adapters, num_states)
        ranks.answers()
        method: str | None = None
        if config.speculate != "off":
            method = head.method if head else "ngram" if draft is None else "draft"
        return cls(
            runner=runner,
            new_scheduler=new_scheduler,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            eos_token_ids=eos_token_ids(settings, checkpoint.config, tokenizer, architecture.vocab),
            sampling_defaults=sampling_defaults(settings),
            config=config,
            max_model_len=max_model_len,
            model_type=str(checkpoint.config.model_type),
            pooling=read_pooling(checkpoint.folder),
            draft_runner=draft_runner,
            embedding=read_embedding_settings(checkpoint),
            generates=generates(checkpoint.config),
            draft_method=method,
            draft_head=head,
        )

    def warm_up(self, progress: Progress = True) -> None:
        """Compile and measure what a GPU needs before its first request; nothing on the CPU."""
        self._runner.warm_up(progress)
        if self._draft_runner is not None:
            self._draft_runner.warm_up(progress)
        if self._draft_head is not None:
            warm_up(self._draft_head, self._runner)

    def start(self) -> None:
        """Start the engine thread."""
        self._ranks.serve(self._thread.fail)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; requests in flight raise EngineStoppedError."""
        self._thread.stop()
        self._ranks.close()

    def abandon(self) -> None:
        """End requests in flight with EngineStoppedError now, and not after the step's computation.

        :meth:`stop` then waits for the thread for a second at most.
        """
        self._thread.abandon()

    @property
    def vocab_size(self) -> int:
        """Rows of the logits; a tokenizer may know fewer tokens."""
        return self._runner.decoder.architecture.vocab

    @property
    def architecture(self) -> Architecture:
        """What the model is made of."""
        return self._runner.decoder.architecture

    @property
    def hidden_size(self) -> int:
        """Numbers in an embedding."""
        return self._runner.decoder.architecture.hidden

    def kv_cache_tokens(self, mean: float) -> float:
        """Tokens of sequences of ``mean`` tokens each that can be in the KV cache at once."""
        return self._runner.layout.tokens_in(self.stats().kv_blocks_total, mean)

    @property
    def kv_block_size(self) -> int:
        """Tokens in a block of the KV cache."""
        return self._config.block_size

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and requests are taken."""
        return self._thread.healthy

    @property
    def failure(self) -> str | None:
        """Why the engine takes no requests, where it has failed and not begun again."""
        return self._thread.failure

    def when_dead(self, function: Callable[[], None]) -> None:
        """Have ``function`` called, on any thread, when the engine has failed for good."""
        self._thread.when_dead(function)

    def stats(self) -> EngineStats:
        """Figures of the last step; safe from any thread."""
        return self._thread.stats

    def load_adapter(
        self, name: str, path: str, *, replace: bool = True, expected: str | None = None
    ) -> AdapterInfo:
        """Read an adapter (a folder or hub name) and serve it as ``name``; blocks while reading.

        A name that is taken changes hands at once, and requests that have begun keep the version
        they began with; unless ``replace``, it is refused.

        expected: the version that it is to replace; None for any or none.

        Raises AdapterError, which changes nothing, AdapterConflictError if the name has another
        version than is expected, and ParameterError if adapters are off.
        """
        return self._require_adapters().load(name, path, replace=replace, expected=expected)

    def load_mixture(
        self,
        name: str,
        mixture: AdapterMixture,
        *,
        replace: bool = True,
        expected: str | None = None,
    ) -> AdapterInfo:
        """Serve a mixture of loaded adapters, as they are now, as ``name``; see load_adapter.

        Raises AdapterError too if the files of an adapter have changed since it was loaded, and
        ParameterError if one is not loaded or cannot be mixed.
        """
        adapters = self._require_adapters()
        return adapters.load_mixture(name, mixture, replace=replace, expected=expected)

    def roll_back_adapter(
        self, name: str, to: str, *, folder: Path | None = None, expected: str | None = None
    ) -> AdapterInfo:
        """Serve an earlier version of a name again; see load_adapter.

        to: one of those of :meth:`adapter_versions`.
        folder: where its files are now; None if they are where they were.

        Raises AdapterError too if its files have changed, ParameterError if it is unknown.
        """
        return self._require_adapters().roll_back(name, to, folder=folder, expected=expected)

    def unload_adapter(self, name: str, *, expected: str | None = None) -> None:
        """Take an adapter away from new requests. Those that have begun finish.

        Raises ParameterError for an unknown name, and AdapterConflictError if it has another
        version than is expected.
        """
        self._require_adapters().unload(name, expected=expected)

    def forget_adapter(self, name: str) -> None:
        """Forget the earlier versions of a name, whose files are being removed."""
        self._require_adapters().forget(name)

    def pin_adapter(self, name: str, pinned: bool, *, expected: str | None = None) -> AdapterInfo:
        """Have an adapter read now and stay in memory while others can make room, or no longer.

        Raises ParameterError for an unknown name, and if pinned adapters would take more than half
        of the memory, AdapterConflictError if it has another version than is expected.
        """
        return self._require_adapters().pin(name, pinned, expected=expected)

    def prefetch_adapter(self, name: str) -> AdapterInfo:
        """Have an adapter read into memory before requests come for it, if there is room.

        Copies that are pinned, or that requests wait for, do not make room for it. Raises
        ParameterError for an unknown name.
        """
        return self._require_adapters().prefetch(name)

    def adapter_versions(self, name: str) -> list[AdapterInfo]:
        """What a name has stood for since the start, the newest first; empty if nothing."""
        return [] if self._adapters is None else self._adapters.versions(name)

    def adapter(self, name: str) -> AdapterInfo | None:
        """The loaded adapter of this name; safe from any thread."""
        return None if self._adapters is None else self._adapters.info(name)

    def defaults_for(self, adapter: str | None) -> Mapping[str, float]:
        """What is recommended for requests to an adapter that name no value; None for the base."""
        version = None if self._adapters is None else self._adapters.version(adapter)
        own = None if version is None else version.sampling
        return self.sampling_defaults if own is None else own

    def chat_templates_of(self, adapter: str | None) -> str | Mapping[str, str] | None:
        """An adapter's own chat template, or several by name; None for the base model's."""
        version = None if self._adapters is None else self._adapters.version(adapter)
        return None if version is None else version.template

    def tokens_of(self, adapter: str | AdapterMixture | None) -> Tokens:
        """The tokens of an adapter: the base model's, or those and its own."""
        version = None if self._adapters is None else self._adapters.version(adapter)
        own = None if version is None else version.tokens
        return self.tokens if own is None else own

    def before_serving_tokens(self, function: Callable[[Tokens], None]) -> None:
        """Have ``function`` called with an adapter's own tokens before any request can have it.

        That is on the thread that loads it.
        """
        if self._adapters is not None:
            self._adapters.prepare = function

    def adapters(self) -> list[AdapterInfo]:
        """Every loaded adapter, by name; safe from any thread."""
        return [] if self._adapters is None else self._adapters.infos()

    def adapter_usage(self) -> AdapterUsage:
        """Where the loaded adapters are, and which are in use; safe from any thread."""
        return AdapterUsage() if self._adapters is None else self._adapters.usage()

    def _require_adapters(self) -> AdapterRegistry:
        if self._adapters is None:
            raise ParameterError("adapter", "this server was started without room for adapters")
        return self._adapters

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput]:
        """Stream what the engine adds to a request; closing the stream cancels it.

        Raises ParameterError for a request that can never be served, EngineOverloadedError when
        the queue is full, EngineStoppedError when the engine stops or has failed,
        AdapterReplacedError when its adapter has other tokens since the request was read,
        AdapterUnavailableError when the adapter can no longer be read, NotANumberError where what
        the model computed is no number.
        """
        if request.adapter is not None:
            self._require_adapters()
        sequence = self._new_sequence(request)
        stream = Stream(asyncio.get_running_loop(), asyncio.Queue())
        if request.request_id in self._in_flight:
            raise ValueError(f"request id {request.request_id!r} is already in flight")
        if len(self._in_flight) >= self._max_in_flight:
            raise EngineOverloadedError(
                f"{len(self._in_flight)} requests are in flight, the most this server takes"
            )
        self._thread.submit(sequence, stream)
        self._in_flight.add(request.request_id)
        finished = False
        try:
            while not finished:
                output = await stream.queue.get()
                if isinstance(output, Exception):
                    finished = True
                    raise output
                finished = output.finish_reason is not None
                _require_numbers(output)
                yield output
        finally:
            self._in_flight.discard(request.request_id)
            if not finished:
                self._thread.cancel(request.request_id)

    def check(
        self, prompt: Several[int], params: SamplingParams, tokens: Tokens | None = None
    ) -> int:
        """The most tokens that a prompt can be continued by with these parameters.

        tokens: of the request's adapter; None for the base model's.

        Raises ParameterError for an empty prompt and for token ids the model does not have, and
        ContextLengthError if prompt and output together are longer than a sequence may be.
        """
        if not prompt:
            raise ParameterError("prompt", "the prompt is empty")
        rows = (tokens or self.tokens).rows
        require_known_tokens("prompt", prompt, rows)
        for name in ("logit_bias", "allowed_token_ids", "logprob_token_ids", "stop_token_ids"):
            require_known_tokens(name, getattr(params, name) or (), rows)
        least = 1 if params.max_tokens is None else params.max_tokens
        room = self.max_model_len - len(prompt)
        if least > room:
            raise ContextLengthError(
                "prompt" if room <= 0 else "max_tokens",
                f"the prompt has {len(prompt)} tokens and asks for {least} more at least, but "
                f"together they are limited to {self.max_model_len}"
                if least
                else f"the prompt has {len(prompt)} tokens, but it is limited to "
                f"{self.max_model_len}",
            )
        return room if params.max_tokens is None else params.max_tokens

    def _new_sequence(self, request: Request) -> Sequence:
        prompt, params = request.prompt_token_ids, request.params
        if request.pooling is None and not self.generates:
            kind = "classifies" if self.num_labels else "makes embeddings"
            raise ParameterError("model", f"this model {kind}: it has no output layer for text")
        if request.pooling is not None:
            params = replace(params, max_tokens=0)
        tokens = request.tokens or self.tokens_of(request.adapter)
        known = tuple(takewhile(lambda token: 0 <= token < tokens.rows, request.prediction))
        if known != request.prediction:  # the tokenizer may know tokens that the model cannot say
            request = replace(request, prediction=known)
        ends = self.end_tokens(params, request.adapter, tokens)
        sampler = SequenceSampler(
            params, prompt, ends=ends, bad_words=_bad_words(params, tokens), vocab=tokens.rows
        )
        return Sequence(
            request,
            max_tokens=self.check(prompt, params, tokens),
            detokenizer=Detokenizer(tokens.vocabulary, prompt, params),
            sampler=sampler,
            stop_token_ids=ends,
            tokens=None if tokens is self.tokens else tokens,
        )

    def end_tokens(
        self, params: SamplingParams, adapter: str | None, tokens: Tokens
    ) -> frozenset[int]:
        """The tokens that end a sequence with these parameters, of this adapter.

        tokens: of the adapter.

        A stop string that is the name of a special token stands for that token, which has no text
        to be found in.
        """
        eos = frozenset[int]() if params.ignore_eos else tokens.ends
        version = None if self._adapters is None else self._adapters.version(adapter)
        if version is not None and not params.ignore_eos:
            eos |= version.end_tokens
        named = (tokens.vocabulary.special_id(stop) for stop in params.stop)
        ends = eos.union(params.stop_token_ids, (token for token in named if token is not None))
        # A tokenizer may know more tokens than the model can say.
        return frozenset(token for token in ends if token < tokens.rows)


def _bad_words(params: SamplingParams, tokens: Tokens) -> tuple[tuple[int, ...], ...]:
    """The tokens of each bad word, alone and after a space."""
    texts = [text for word in params.bad_words for text in (word.lstrip(), " " + word.lstrip())]
    backend = tokens.tokenizer.backend_tokenizer
    encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    words = {tuple(each.ids): None for each in encoded if each.ids}
    # A tokenizer may know more tokens than the model can say.
    return tuple(word for word in words if max(word) < tokens.rows)


def _require_numbers(output: RequestOutput) -> None:
    """Of what was read of a prompt; raises NotANumberError."""
    read = output.embedding
    if output.prompt_logprobs is not None:
        read = output.prompt_logprobs.logprobs
    if read is not None and np.isnan(read).any():
        raise NotANumberError
