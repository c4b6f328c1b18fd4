"""A model in one's own program, without a server.

    with LLM("demo") as llm:
        for completion in llm.generate(["def add(", "def sub("], SamplingParams(max_tokens=32)):
            print(completion.text)

All prompts of a call are one batch of the engine's: it computes as many at once as ``max_num_seqs``
allows and takes the next as soon as one has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import threading
import weakref
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast

import torch
from transformers import PreTrainedTokenizerBase

from nybble.engine import (
    AdapterConfig,
    AdapterUnavailableError,
    Engine,
    EngineConfig,
    EngineStoppedError,
    ParameterError,
    PromptLogprobs,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
    resolve_device,
)
from nybble.engine.config import require_whole
from nybble.engine.conversation import (
    ChatEncoder,
    Tools,
    Turn,
    at_once,
    chosen_template,
    read_template,
    turn_of,
)
from nybble.engine.memory import check_memory, memory_explained
from nybble.engine.named_arguments import named_arguments
from nybble.engine.ranks import check_ranks
from nybble.engine.request import FinishReason
from nybble.kernels.progress import Bar
from nybble.loaders import Checkpoint
from nybble.loaders.adapter import files_stamp
from nybble.loaders.adapter_tokens import TextTokenizer
from nybble.loaders.templates import TemplateFailedError, TemplateRefusedError, TemplateRenderer
from nybble.models import architecture_of
from nybble.quantizers.drafts import prepared_draft, rounded_draft_parts, stored_draft
from nybble.quantizers.prepare import prepare_checkpoint, rounded_parts

T = TypeVar("T")

# A text, or the token ids of one.
Prompt = str | Sequence[int]
# A conversation as OpenAI writes it: ``[{"role": "user", "content": "…"}, …]``.
Conversation = Sequence[Mapping[str, Any]]


# What the engine calls otherwise, as its errors have it.
_OPTIONS = {
    "max_rank": "max_lora_rank",
    "slots is": "max_loras is",
    "host_bytes": "lora_host_bytes",
    "device_bytes": "lora_device_bytes",
    "own_settings": "lora_own_settings",
    "kv_dtype": "kv_cache_dtype",
    "dtype of adapters": "lora_dtype",
}

_ROOM = "use kv_cache_bytes, max_num_seqs and max_model_len"
_IN_FOLDER = "the model's folder has its tokenizer and config"
_NO_PLACE = "weights have to fit on the device"
# What vLLM, llama-cpp-python and transformers call an option, or have instead.
_ELSEWHERE = {
    "adapters": "give generate(…, adapter=…) a folder or hub name",
    "allowed_local_media_path": "models here read text only",
    "block_size": _ROOM,
    "config_format": _IN_FOLDER,
    "cpu_offload_gb": _NO_PLACE,
    "device_map": "use device",
    "disable_log_stats": "nothing is logged; progress=False hides the bars",
    "enable_chunked_prefill": "long prompts are always computed in chunks of max_batched_tokens",
    "enable_prefix_caching": "prefixes are always kept while there is room",
    "enforce_eager": "there is no compilation to leave out",
    "gpu_memory_utilization": _ROOM,
    "hf_overrides": _IN_FOLDER,
    "hf_token": "huggingface_hub has it: set HF_TOKEN",
    "kv_cache_memory": "use kv_cache_bytes, a number",
    "kv_cache_memory_bytes": "use kv_cache_bytes",
    "load_format": "the files show their format",
    "load_in_4bit": 'use quantize="nf4"',
    "lora_device_memory": "use lora_device_bytes, a number",
    "lora_host_memory": "use lora_host_bytes, a number",
    "lora_modules": "give generate(…, adapter=…) a folder or hub name",
    "max_cpu_loras": "use lora_host_bytes",
    "max_num_batched_tokens": "use max_batched_tokens",
    "max_seq_len": "use max_model_len",
    "model_name": "use model",
    "model_path": "use model",
    "n_batch": "use max_batched_tokens",
    "n_ctx": "use max_model_len",
    "n_gpu_layers": 'use device="cuda"',
    "n_threads": "use threads",
    "num_speculative_tokens": "use max_draft_tokens",
    "pipeline_parallel_size": "use tensor_parallel_size",
    "quantization": "the files show their format; to round a 16-bit model, use quantize",
    "quantization_config": "the files show their format; to round a 16-bit model, use quantize",
    "revision": "give model a folder of that revision, which huggingface_hub downloads",
    "sampling_params": "give generate(…, params=…) them",
    "seed": "use SamplingParams(seed=…)",
    "served_model_name": "only a server has names for its model",
    "skip_tokenizer_init": "give generate() token ids; the tokenizer is loaded all the same",
    "speculative_config": "use speculate, draft_model and max_draft_tokens",
    "speculative_model": "use draft_model",
    "swap_space": "sequences that have to give way are computed again",
    "task": "LLM generates; a server has /v1/embeddings, /v1/score and /v1/rerank",
    "tokenizer": _IN_FOLDER,
    "tokenizer_mode": _IN_FOLDER,
    "torch_dtype": "use dtype",
    "trust_remote_code": "code in a model's folder is never run",
    "use_gpu": 'use device="cuda"',
}


@contextmanager
def _options_named() -> Iterator[None]:
    """Replace the engine's setting names in errors by those of LLM's options."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, option in _OPTIONS.items():
            message = re.sub(rf"\b{name}\b", option, message)
        error.args = (message,)
        raise


@dataclass(frozen=True)
class Completion:
    """What the model said to one prompt.

    text: without the end token, and without the stop string that ended it.
    token_ids: of the text, and of the end token if there was one.
    finish_reason: ``stop`` for an end token or a stop string, ``length`` for ``max_tokens`` or the
        end of the context.
    logprobs: one for each token if ``SamplingParams.logprobs`` asked for them, else empty.
    prompt_token_ids: what the prompt was encoded to.
    prompt_logprobs: if ``SamplingParams.prompt_logprobs`` asked for them.
    others: of the same prompt, if ``SamplingParams.n`` asked for more than one.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: PromptLogprobs | None = None
    others: tuple[Completion, ...] = ()


@named_arguments(_ELSEWHERE)
class LLM:
    """A model that is loaded once and asked from any thread, until it is closed.

    tokenizer: the model's, as transformers has it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        aliases: Path | None = None,
        quantize: Literal["nf4"] | None = None,
        head: Literal["auto", "int8", "16bit"] = "auto",
        merge_adapter: str | Path | None = None,
        device: str = "auto",
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        threads: int | None = None,
        max_model_len: int | None = None,
        chat_template: str | Path | None = None,
        kv_cache_bytes: int | None = None,
        kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto",
        max_num_seqs: int = 64,
        max_batched_tokens: int | None = None,
        speculate: Literal["off", "ngram", "draft", "mtp", "auto"] | None = None,
        draft_model: str | Path | None = None,
        draft_quantize: Literal["nf4"] | None = None,
        max_draft_tokens: int = 8,
        deterministic: bool = False,
        activations: Literal["auto", "int8"] = "auto",
        enable_lora: bool = False,
        max_loras: int = 8,
        max_lora_rank: int = 64,
        lora_dtype: Literal["auto", "int8"] = "auto",
        lora_own_settings: bool = True,
        lora_host_bytes: int = AdapterConfig.host_bytes,
        lora_device_bytes: int | None = None,
        tune: bool = True,
        tensor_parallel_size: int = 1,
        progress: bool = True,
    ) -> None:
        """Load a model: a folder, a hub name, an alias, or ``demo``.

        The options are those of ``nybble serve`` and have its defaults, but for max_batched_tokens,
        which is 512 everywhere: nobody waits for other requests. Sizes are in bytes. threads are
        those of PyTorch and the CPU kernels in the whole program, and in each of the other ranks'
        processes; None leaves what is set. chat_template is a template's text, or the Path of a
        file. enable_lora makes room for adapters. progress shows bars on stderr while loading. A
        script that gives a tensor_parallel_size above 1 needs ``if __name__ == "__main__":``,
        because the other ranks' processes import it; one such LLM can be open at a time.

        Raises ModelNotFoundError for a name that leads nowhere, CheckpointError and
        UnsupportedModelError for a model that cannot be loaded, OSError for a template's file that
        cannot be read, TypeError for an unknown option, and ValueError for settings that contradict
        each other or need more memory than there is.
        """
        for name, value, expected in (
            ("quantize", quantize, (None, "nf4")),
            ("draft_quantize", draft_quantize, (None, "nf4")),
            ("head", head, ("auto", "int8", "16bit")),
            ("dtype", dtype, ("auto", "bfloat16", "float16", "float32")),
        ):
            if value not in expected:
                names = ", ".join(map(str, expected))
                raise ValueError(f"{name} is {value!r}, expected one of {names}")
        require_whole("max_num_seqs", max_num_seqs)
        for name, flag in (
            ("enable_lora", enable_lora),
            ("lora_own_settings", lora_own_settings),
            ("deterministic", deterministic),
            ("tune", tune),
            ("progress", progress),
        ):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}, expected True or False")
        if isinstance(chat_template, Path):
            chat_template = read_template(chat_template)
        elif chat_template is not None and "{" not in chat_template:
            raise ValueError(f"chat_template is {chat_template!r:.60}: for a file, give its Path")
        if threads is not None:
            require_whole("threads", threads)
            if threads < 1:
                raise ValueError(f"threads is {threads}, expected at least 1")
            os.environ["OMP_NUM_THREADS"] = str(threads)  # of processes that this one starts
            torch.set_num_threads(threads)
        chosen = resolve_device(device)
        with _options_named():
            config = EngineConfig(
                device=str(chosen),
                dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
                kv_cache_bytes=kv_cache_bytes,
                kv_dtype=kv_cache_dtype,
                max_num_seqs=max_num_seqs,
                max_batched_tokens=max(EngineConfig.max_batched_tokens, max_num_seqs)
                if max_batched_tokens is None
                else max_batched_tokens,
                max_model_len=max_model_len,
                max_waiting=max_num_seqs,
                speculate=speculate or ("off" if draft_model is None else "auto"),
                max_draft_tokens=max_draft_tokens,
                deterministic=deterministic,
                activations=activations,
                adapters=AdapterConfig(
                    max_loras,
                    max_lora_rank,
                    lora_host_bytes,
                    lora_own_settings,
                    lora_device_bytes,
                    lora_dtype,
                )
                if enable_lora
                else None,
                tune=tune,
                tensor_parallel_size=tensor_parallel_size,
            )

        draft_name = None if draft_model is None else str(draft_model)

        def check(stored: Checkpoint) -> None:
            """Before anything is packed, the draft model included."""
            check_ranks(architecture_of(stored.config), config)
            draft = stored_draft(
                stored, config, draft_name, aliases=aliases, quantize=draft_quantize
            )
            check_memory(
                stored,
                config,
                draft,
                rounded_parts(str(model), stored, quantize, head),
                rounded_draft_parts(draft, str(model), draft_name, draft_quantize, quantize),
            )

        checkpoint = prepare_checkpoint(
            str(model),
            device=chosen,
            aliases=aliases,
            quantize=quantize,
            head=head,
            adapter=None if merge_adapter is None else str(merge_adapter),
            check=check,
            progress=progress,
        )
        draft = prepared_draft(
            str(model),
            config,
            draft_name,
            device=chosen,
            aliases=aliases,
            quantize=draft_quantize,
            model_quantize=quantize,
            progress=progress,
        )
        with memory_explained(checkpoint, config, draft):
            engine = Engine.load(checkpoint, config, progress, draft=draft)
            if chat_template is not None:
                engine.tokenizer.chat_template = chat_template
            engine.warm_up(progress)
        self.tokenizer: PreTrainedTokenizerBase = engine.tokenizer
        self._engine = engine
        self._adapters_enabled = enable_lora
        # Of the files of loaded adapters, when they were read.
        self._stamps: dict[str, tuple[tuple[int, int] | None, ...]] = {}
        self._templates = TemplateRenderer()
        self._chat_encoder = ChatEncoder(engine.tokenizer)
        self._numbers = itertools.count()
        self._places = asyncio.Semaphore(config.max_num_seqs + config.max_waiting)
        # A loop of its own, so that a program with a running loop (a notebook) can call it too.
        self._loop = _LoopThread()
        self._loop.start()
        engine.start()
        # When the program ends, too: Python ends threads that compute in a way that aborts it.
        self._finalizer = weakref.finalize(self, _close, engine, self._templates, self._loop)

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output together may have."""
        return self._engine.max_model_len

    @property
    def default_params(self) -> SamplingParams:
        """What is used if a call names none: what the model's generation_config.json recommends."""
        return self._default_params(None)

    def _default_params(self, adapter: str | None) -> SamplingParams:
        return SamplingParams(**cast(dict[str, Any], dict(self._engine.defaults_for(adapter))))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Path | Sequence[str | Path | None] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue every prompt; the completions come in the order of the prompts, one for each. If
        ``params.n`` asks for more, :attr:`Completion.others` has them, which are those that the
        server gives a request with this ``n`` and seed.

        prompts: texts, or token ids, which are taken as they are. One alone is a list of one.
        params: for all prompts, or one for each; :attr:`default_params` if None, or what the
            adapter's own generation_config.json recommends.
        adapter: the folder or hub name of a LoRA adapter, for all prompts or one for each; None for
            the base model. It is read when it is first asked for, and again if its files have
            changed.
        progress: show how many are done, on stderr.

        Raises ParameterError naming the prompt that cannot be served, AdapterError for an adapter
        that cannot be read, AdapterUnavailableError for one that was read and whose files are found
        to be others only now (the next call reads them), EngineStoppedError once the LLM is closed,
        and EngineFailedError if the engine fails. The other prompts are then given up.
        """
        listed = _as_list(prompts)
        adapters = self._adapters_of(adapter, len(listed))
        return self._run(self._encode(listed, adapters), params, adapters, progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Path | Sequence[str | Path | None] | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Answer one conversation, or each of several; see :meth:`generate`.

        tools: JSON schemas of functions, which the template shows to the model.
        template_variables: what the model's chat template takes beside messages and tools, for
            example ``{"enable_thinking": False}``.

        Raises also ParameterError for a model without a chat template and for messages that its
        template refuses.
        """
        conversations = _conversations(messages)
        adapters = self._adapters_of(adapter, len(conversations))
        encoded = [
            self._encode_chat(own, each, tools, template_variables or {})
            for each, own in zip(conversations, adapters, strict=True)
        ]
        return self._run(encoded, params, adapters, progress)

    def _template(self, adapter: str | None, *, tools: bool) -> str:
        """The chat template of an adapter, or else the model's."""
        templates = self._engine.chat_templates_of(adapter) or self.tokenizer.chat_template
        try:
            template = chosen_template(templates, tools=tools)
        except ValueError as error:
            raise ParameterError(
                "messages", f"the model's chat templates cannot be used: {error}"
            ) from None
        if template is None:
            raise ParameterError(
                "messages",
                "the model has no chat template: use generate(), or put a chat_template.jinja into "
                "the model's folder",
            )
        return template

    def close(self) -> None:
        """End the engine and free its memory. Calls in progress raise an error."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _encode_chat(
        self,
        adapter: str | None,
        messages: Conversation,
        tools: Sequence[dict[str, Any]] | None,
        own_variables: Mapping[str, Any],
    ) -> tuple[int, ...]:
        """The token ids that the server makes of a conversation, up to the assistant's turn."""
        template = self._template(adapter, tools=bool(tools))
        encoder = self._encoder_of(self._engine.tokens_of(adapter).tokenizer)
        try:
            turns = [turn_of(each) for each in messages]
            for number, turn in enumerate(turns):
                _require_text("messages", f"message {number}", turn["content"])
            text = at_once(encoder.rendered(template, turns, tools, own_variables, self._render))
            return tuple(encoder.encode(text))
        except (TemplateRefusedError, TemplateFailedError) as error:
            raise ParameterError(
                "messages", f"the chat template cannot render these messages: {error}"
            ) from None
        except ValueError as error:
            raise ParameterError("messages", str(error)) from None

    async def _render(
        self,
        template: str,
        turns: Sequence[Turn],
        tools: Tools | None,
        variables: dict[str, Any],
    ) -> str:
        return self._templates.render(template, turns, tools, variables)

    def _encoder_of(self, tokenizer: TextTokenizer) -> ChatEncoder:
        own = tokenizer is self.tokenizer
        return self._chat_encoder if own else self._chat_encoder.with_tokenizer(tokenizer)

    def _encode(
        self, prompts: Sequence[Prompt], adapters: Sequence[str | None]
    ) -> list[tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        by_tokenizer: dict[TextTokenizer, dict[int, str]] = {}
        for index, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            if isinstance(prompt, str):
                _require_text("prompt", f"prompt {index}", prompt)
                tokenizer = self._engine.tokens_of(adapter).tokenizer
                by_tokenizer.setdefault(tokenizer, {})[index] = prompt
            else:
                found[index] = _token_ids(index, prompt)
        for tokenizer, texts in by_tokenizer.items():
            encoded = self._encoder_of(tokenizer).encode_inputs(list(texts.values()))
            found.update(zip(texts, encoded, strict=True))
        return [found[index] for index in range(len(prompts))]

    def _run(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: Sequence[str | None],
        progress: bool,
    ) -> list[Completion]:
        count = len(prompts)
        if params is None:
            every = [self._default_params(each) for each in adapters]
        else:
            every = [params] * count if isinstance(params, SamplingParams) else list(params)
        for one in every:
            if not isinstance(one, SamplingParams):
                raise ParameterError("params", f"{one!r:.50} in params, expected SamplingParams")
        if len(every) != count:
            raise ParameterError("params", f"params has {len(every)} entries for {count} prompts")
        requests = [
            [
                Request(f"offline-{next(self._numbers)}", prompt, params, adapter=own)
                for params in map(all_params.of_sequence, range(all_params.n))
            ]
            for prompt, all_params, own in zip(prompts, every, adapters, strict=True)
        ]
        total = sum(map(len, requests))
        with Bar(total=total, desc="Generating", unit=" answers", disable=not progress) as bar:
            return self._wait_for(self._all(requests, bar))

    def _adapters_of(
        self, adapter: str | Path | Sequence[str | Path | None] | None, count: int
    ) -> list[str | None]:
        """The adapter of each prompt, all of them loaded."""
        single = adapter is None or isinstance(adapter, str | Path)
        adapters = [
            None if each is None else str(each)
            for each in cast(Sequence[str | Path | None], [adapter] * count if single else adapter)
        ]
        if len(adapters) != count:
            raise ParameterError(
                "adapter", f"adapter has {len(adapters)} entries for {count} prompts"
            )
        for path in dict.fromkeys(adapters):
            self._require_adapter(path)
        return adapters

    def _require_adapter(self, path: str | None) -> None:
        if path is None:
            return
        if not self._adapters_enabled:
            raise ParameterError(
                "adapter", "there is no room for adapters: give LLM(…, enable_lora=True)"
            )
        stamp, known = files_stamp(path), self._stamps.get(path)
        if known is not None and (not stamp or stamp == known):
            return
        with _options_named():
            self._engine.load_adapter(path, path)
        self._stamps[path] = stamp

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._finalizer.alive:
            work.close()
            raise EngineStoppedError("this LLM is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop.loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C too: what is being computed is cancelled
            future.cancel()
            raise

    async def _all(self, requests: Sequence[Sequence[Request]], bar: Bar) -> list[Completion]:
        """A completion for each prompt; requests: of each prompt, one for each of its ``n``."""

        async def one(index: int, request: Request, prompt_known: asyncio.Event) -> Completion:
            if request is not requests[index][0]:
                await prompt_known.wait()  # in the prefix cache
            try:
                async with self._places:
                    completion = await self._one(request, prompt_known)
            except AdapterUnavailableError:  # the next call loads it again
                self._stamps.pop(str(request.adapter), None)
                raise
            except ParameterError as error:
                where = f"prompt {index}: " if len(requests) > 1 else ""
                raise ParameterError(error.parameter, f"{where}{error}") from None
            bar.update()
            return completion

        def several(index: int) -> list[asyncio.Task[Completion]]:
            known = asyncio.Event()
            return [group.create_task(one(index, each, known)) for each in requests[index]]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [several(index) for index in range(len(requests))]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        found = [[task.result() for task in of_prompt] for of_prompt in tasks]
        return [replace(first, others=tuple(others)) for first, *others in found]

    async def _one(self, request: Request, begun: asyncio.Event) -> Completion:
        outputs: list[RequestOutput] = []
        async with aclosing(self._engine.generate(request)) as stream:
            async for output in stream:
                begun.set()
                outputs.append(output)
        reason = outputs[-1].finish_reason
        assert reason is not None
        return Completion(
            text="".join(output.text for output in outputs),
            token_ids=tuple(token for output in outputs for token in output.token_ids),
            finish_reason=reason,
            logprobs=tuple(each for output in outputs for each in output.logprobs),
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=outputs[0].prompt_logprobs,
        )


class _LoopThread(threading.Thread):
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        super().__init__(name="nybble-llm", daemon=True)
        self.loop = asyncio.new_event_loop()

    def run(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def stop(self) -> None:
        """Let running tasks finish, then end the thread."""
        # The last reference to an LLM may be dropped on this thread, which cannot wait for itself.
        if threading.current_thread() is not self:
            asyncio.run_coroutine_threadsafe(self._drain(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _drain(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)


def _close(engine: Engine, templates: TemplateRenderer, loop: _LoopThread) -> None:
    engine.stop()  # which ends every request with an error
    templates.close()
    loop.stop()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ParameterError(
            "prompts", f"prompts is {prompts!r:.50}, expected texts or lists of token ids"
        )
    many = list(prompts)
    if many and isinstance(many[0], int):
        return [cast(Sequence[int], many)]
    return cast(list[Prompt], many)


def _conversations(messages: Conversation | Sequence[Conversation]) -> Sequence[Conversation]:
    """Several conversations, or one as a list of one."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ParameterError("messages", f"messages is {messages!r:.50}, expected a list of them")
    single = len(messages) > 0 and isinstance(messages[0], Mapping)
    found = cast(Sequence[Conversation], [messages] if single else messages)
    for conversation in found:
        if isinstance(conversation, str) or not isinstance(conversation, Sequence):
            raise ParameterError(
                "messages", f"{conversation!r:.50} in messages, expected a list of messages"
            )
        for message in conversation:
            if not isinstance(message, Mapping):
                raise ParameterError(
                    "messages",
                    f"{message!r:.50} in messages, expected a dict with role and content",
                )
    return found


def _require_text(parameter: str, name: str, text: str) -> None:
    """A Python string may have half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(parameter, f"{name} is not valid text: {error}") from None


def _token_ids(index: int, prompt: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
        raise ParameterError(
            "prompt", f"prompt {index} is {prompt!r:.50}, expected text or a list of token ids"
        )
    return tuple(prompt)
