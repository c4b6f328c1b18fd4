"""Text and messages to token ids, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from pydantic_core import from_json
from transformers import PreTrainedTokenizerBase

from nybble.server.api.chat_schema import Message, TemplateOptions, text_of
from nybble.server.api.schema import Prompt
from nybble.server.http.errors import ApiError
from nybble.server.templates import TemplateFailedError, TemplateRefusedError, TemplateRenderer

T = TypeVar("T")

# Text longer than this many characters is worked on in another thread.
_LONG_TEXT = 4096
# Encoding takes some 200 bytes for each token, and a token may be a byte: so much at a time.
_AT_A_TIME = 1 << 16
# What /tokenize and /detokenize take. A context's text is bounded by the context.
MAX_TEXT_BYTES, MAX_TOKENS = 1 << 20, 1 << 20
# Of the inputs of one request together: OpenAI's limit for embeddings.
_MAX_TOGETHER = 300_000


class Prompts:
    """The tokenizer and chat template of one model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        max_model_len: int,
        templates: TemplateRenderer,
        *,
        trust_chat_templates: bool = False,
    ) -> None:
        """trust_chat_templates: whether requests may bring templates of their own."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may ask for either; both would change prompts silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._model = model
        self._max_model_len = max_model_len
        self._longest = max(map(len, self._backend.get_vocab()))
        self._max_characters = max_model_len * self._longest
        self._max_together = max(_MAX_TOGETHER, max_model_len)
        self._templates = templates
        self._trust_chat_templates = trust_chat_templates
        # One at a time, whatever many ask for: it takes much memory, which each thread's allocator
        # keeps for its next. The encoder has threads of its own.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nybble-tokenize")

    async def encode(
        self, text: str, *, special_tokens: bool = True, any_length: bool = False
    ) -> tuple[int, ...]:
        """Token ids of ``text``; special_tokens: with those the model's inputs begin with.

        Raises ApiError 400 for text that is far beyond the context, without encoding all of it;
        with ``any_length``, for text beyond 1 MiB.
        """
        if any_length:
            _require_size("prompt", len(text.encode()), MAX_TEXT_BYTES, "bytes")
        else:
            self._require_room(text)

        def work() -> tuple[int, ...]:
            if not any_length:
                self._require_few_tokens(text)
            return self._encode(text, special_tokens)

        return await self._off_loop(len(text), work)

    async def encode_all(
        self, prompts: Sequence[Prompt], *, special_tokens: bool = True, any_length: bool = False
    ) -> list[tuple[int, ...]]:
        """Token ids of prompts of one kind, texts with those that inputs begin or end with.

        Raises ApiError 400 as :meth:`encode` does, and where they are too many together.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        given = [prompt for prompt in prompts if not isinstance(prompt, str)]
        self._require_few_together(given)
        length = sum(map(len, texts))
        if any_length:
            _require_size("prompt", sum(len(t.encode()) for t in texts), MAX_TEXT_BYTES, "bytes")
        else:
            for text in texts:
                self._require_room(text)
        encoded = await self._off_loop(
            length, lambda: self._encode_batches(texts, special_tokens, any_length)
        )
        return [*map(tuple, given), *encoded]

    def _encode_batches(
        self, texts: Sequence[str], special_tokens: bool, any_length: bool
    ) -> list[tuple[int, ...]]:
        encoded: list[tuple[int, ...]] = []
        batch: list[str] = []
        size = 0
        for index, text in enumerate(texts):
            if not any_length:
                self._require_few_tokens(text)
            batch.append(text)
            size += len(text)
            if size >= _AT_A_TIME or index == len(texts) - 1:
                found = self._backend.encode_batch_fast(batch, add_special_tokens=special_tokens)
                encoded += [tuple(each.ids) for each in found]
                batch, size = [], 0
                self._require_few_together(encoded)
        return encoded

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ``token_ids``, special tokens included.

        Raises ApiError 400 for more than 1,048,576 of them.
        """
        _require_size("tokens", len(token_ids), MAX_TOKENS, "tokens")
        return await self._off_loop(
            len(token_ids),
            lambda: self._backend.decode(list(token_ids), skip_special_tokens=False),
        )

    @cached_property
    def around(self) -> tuple[int, int]:
        """How many special tokens texts are given before and after."""
        (plain,), (whole,) = (
            self._backend.encode_batch_fast(["a"], add_special_tokens=special)
            for special in (False, True)
        )
        for before in range(len(whole.ids) - len(plain.ids) + 1):
            if whole.ids[before : before + len(plain.ids)] == plain.ids:
                return before, len(whole.ids) - len(plain.ids) - before
        return 0, 0

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it."""

        def work() -> list[str]:
            return [self._backend.id_to_token(token) or "" for token in token_ids]

        return await self._off_loop(len(token_ids), work)

    async def chat(
        self,
        messages: Sequence[Message],
        options: TemplateOptions,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        any_length: bool = False,
    ) -> tuple[int, ...]:
        """Token ids of a conversation in the model's own template, up to the assistant's turn.

        Raises ApiError 400 where the model has no template or the template refuses, 500 where it
        takes too much time or memory, and as :meth:`encode` does.
        """
        if options.chat_template is not None and not self._trust_chat_templates:
            raise ApiError(
                400,
                "chat_template is taken only by a server with --trust-request-chat-template",
                param="chat_template",
                code="unsupported_parameter",
            )
        if not (options.chat_template or self._tokenizer.chat_template):
            raise ApiError(
                400,
                f"model {self._model!r} has no chat template: use /v1/completions, "
                "or put a chat_template.jinja into the model's folder",
                param="messages",
                code="no_chat_template",
            )
        if len(messages) > self._max_model_len:  # a message is a token at least
            raise self._too_long(f"{len(messages)} messages")
        turns = [_turn(message) for message in messages]
        template = options.chat_template
        if template is None:
            template = self._tokenizer.get_chat_template(tools=list(tools) if tools else None)
        variables = {**self._tokenizer.special_tokens_map, **_variables(options, template)}
        try:
            future = self._templates.submit(template, turns, tools, variables)
            text = await asyncio.wrap_future(future)
        except TemplateRefusedError as error:
            raise ApiError(
                400,
                f"the chat template of {self._model!r} refuses these messages: {error}",
                param="messages",
                code="invalid_value",
            ) from None
        except TemplateFailedError as error:
            raise ApiError(
                500,
                f"the chat template of {self._model!r} cannot be used: {error}",
                code="chat_template_failed",
            ) from None
        special = options.add_special_tokens is True
        return await self.encode(text, special_tokens=special, any_length=any_length)

    def _require_room(self, text: str) -> None:
        if len(text) > self._max_characters:
            raise self._too_long(
                f"{len(text)} characters, beyond the {self._max_characters} of the longest tokens"
            )

    def _require_few_tokens(self, text: str) -> None:
        """Raises ApiError 400 for a text whose parts have far more tokens than the context."""
        if len(text) <= _AT_A_TIME:
            return
        least = 0
        for start in range(0, len(text), _AT_A_TIME):
            part = text[start : start + _AT_A_TIME]
            (encoding,) = self._backend.encode_batch_fast([part], add_special_tokens=False)
            # Cutting may cut a token into as many as it has characters.
            least += max(0, len(encoding) - self._longest)
            if least > self._max_model_len:
                raise self._too_long(f"{least} tokens at least")

    def _require_few_together(self, encoded: Sequence[Sequence[int]]) -> None:
        if (tokens := sum(map(len, encoded))) > self._max_together:
            raise ApiError(
                400,
                f"the prompts have {tokens} tokens or more together, expected at most "
                f"{self._max_together}: send several requests",
                param="prompt",
                code="too_many_tokens",
            )

    def _too_long(self, found: str) -> ApiError:
        return ApiError(
            400,
            f"the text has {found}, but prompt and output together are limited to "
            f"{self._max_model_len} tokens",
            param="prompt",
            code="context_length_exceeded",
        )

    def _encode(self, text: str, special_tokens: bool) -> tuple[int, ...]:
        # The batch form lets other threads run meanwhile; the single one does not. The fast one
        # leaves out where in the text each token stands.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special_tokens)
        return tuple(encoding.ids)

    async def _off_loop(self, length: int, function: Callable[[], T]) -> T:
        if length <= _LONG_TEXT:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)


def _require_size(param: str, found: int, most: int, unit: str) -> None:
    if found > most:
        raise ApiError(
            400,
            f"{param} has {found} {unit}, expected at most {most} at a time",
            param=param,
            code="invalid_value",
        )


def _variables(options: TemplateOptions, template: str) -> dict[str, Any]:
    """What a template is given besides messages, tools and special tokens."""
    variables: dict[str, Any] = {}
    if options.continue_final_message:
        variables["continue_final_message"] = True
    variables["add_generation_prompt"] = not options.continue_final_message
    if options.add_generation_prompt is not None:
        variables["add_generation_prompt"] = options.add_generation_prompt
    if options.documents is not None:
        variables["documents"] = options.documents
    return {
        **variables,
        **_reasoning(options.reasoning_effort, template),
        **_checked(options.chat_template_kwargs or {}),
    }


def _reasoning(effort: str | None, template: str) -> dict[str, Any]:
    """An effort in the template's own words. Raises ApiError 400 where it has none for it."""
    if effort is None:
        return {}
    variables: dict[str, Any] = {}
    if "reasoning_effort" in template:
        variables["reasoning_effort"] = effort
    if "enable_thinking" in template:
        variables["enable_thinking"] = effort != "none"
    if not variables and effort != "none":
        raise ApiError(
            400,
            f"reasoning_effort is {effort!r}, but the model's chat template knows of no reasoning; "
            "expected 'none'",
            param="reasoning_effort",
            code="unsupported_parameter",
        )
    return variables


def _checked(template_kwargs: dict[str, Any]) -> dict[str, Any]:
    reserved = {"messages", "conversation", "tools", "tokenize", "chat_template"}
    reserved |= {"add_generation_prompt", "continue_final_message", "return_dict", "documents"}
    if taken := sorted(reserved & template_kwargs.keys()):
        raise ApiError(
            400,
            f"chat_template_kwargs may not contain {taken[0]!r}",
            param="chat_template_kwargs",
            code="invalid_value",
        )
    return template_kwargs


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it: plain text, arguments of tool calls as objects."""
    turn = message.model_dump(exclude_none=True)
    if message.role == "developer":  # the newer name of the system's role
        turn["role"] = "system"
    if isinstance(message.content, list):
        turn["content"] = text_of(message.content)
    turn.setdefault("content", "")
    for index, call in enumerate(turn.get("tool_calls", ())):
        function = call["function"]
        try:
            # As bodies are read: half a surrogate pair, for one, is no text that can be encoded.
            arguments = from_json(function["arguments"] or "{}", allow_inf_nan=False)
            function["arguments"] = arguments
        except ValueError:
            raise ApiError(
                400,
                f"the arguments of call {index} to {function['name']!r} are not JSON",
                param="messages",
                code="invalid_value",
            ) from None
    return turn
