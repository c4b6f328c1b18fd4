"""Turns text and messages into token ids, without blocking the event loop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel

from nybble.engine import Engine
from nybble.engine.conversation import ChatEncoder, Tools, Turn, chosen_template, turn_of
from nybble.loaders.adapter_tokens import TextTokenizer
from nybble.loaders.templates import (
    TemplateFailedError,
    TemplateInvalidError,
    TemplateRefusedError,
    TemplateRenderer,
)
from nybble.server.api.chat_schema import Message, TemplateOptions
from nybble.server.api.output.harmony import CHANNEL
from nybble.server.api.schema import Prompt
from nybble.server.http.errors import ApiError

T = TypeVar("T")
TextT = TypeVar("TextT", str, tuple[str, str])

# Text longer than this many characters is processed in another thread.
_LONG_TEXT = 4096
# Characters encoded at a time. Encoding needs some 200 bytes of memory per token, and each
# character may be a token.
_AT_A_TIME = 1 << 16
# The most that /tokenize and /detokenize accept. Other text is limited by the context length.
MAX_TEXT_BYTES, MAX_TOKENS = 1 << 20, 1 << 20
# Tokens of all inputs of one request together: OpenAI's limit for embeddings.
_MAX_TOGETHER = 300_000


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as token ids, and as the text of which they were made."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class OwnTemplates:
    """The chat template of an adapter, or several by name, in place of the model's."""

    adapter: str
    templates: str | Mapping[str, str]

    @classmethod
    def of(cls, adapter: str | None, engine: Engine) -> OwnTemplates | None:
        """None if requests to it are rendered in the model's."""
        found = engine.chat_templates_of(adapter)
        return None if adapter is None or found is None else cls(adapter, found)


class Prompts:
    """The tokenizer and chat template of one model."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        model: str,
        max_model_len: int,
        templates: TemplateRenderer,
        *,
        trust_chat_templates: bool = False,
    ) -> None:
        """max_model_len: tokens of prompt and output together.

        trust_chat_templates: whether requests may bring templates of their own.
        """
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._model = model
        self._max_model_len = max_model_len
        self._longest = max(map(len, self._backend.get_vocab()))
        self._max_characters = max_model_len * self._longest
        self._max_together = max(_MAX_TOGETHER, max_model_len)
        self._templates = templates
        self._trust_chat_templates = trust_chat_templates
        self._chat_encoder = ChatEncoder(tokenizer)
        # One thread, however many requests there are: encoding takes much memory, and each thread's
        # allocator keeps it for later. The encoder has threads of its own.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nybble-tokenize")
        # Another for long conversations before they are text, which take seconds at worst.
        self._long_chats = ThreadPoolExecutor(1, thread_name_prefix="nybble-chat")

    def with_tokenizer(self, tokenizer: TextTokenizer) -> Prompts:
        """The same for an adapter whose tokenizer has more tokens than the model's."""
        other = copy(self)
        other._tokenizer = tokenizer
        other._backend = tokenizer.backend_tokenizer
        added = other._backend.get_added_tokens_decoder().values()
        other._longest = max(self._longest, *(len(token.content) for token in added))
        other._max_characters = self._max_model_len * other._longest
        other._chat_encoder = self._chat_encoder.with_tokenizer(tokenizer)
        return other

    async def encode(
        self, text: str, *, special_tokens: bool = True, any_length: bool = False
    ) -> tuple[int, ...]:
        """Token ids of ``text``.

        special_tokens: whether to add the special tokens with which the model's inputs begin or
            end.
        any_length: accept up to 1 MiB of text, whatever the context length.

        Raises ApiError 400 for text that is far longer than the context, without encoding all of
        it, or, with ``any_length``, for more than 1 MiB.
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

    def markers(self, text: str) -> tuple[int, ...]:
        """Token ids of markers and short text between them."""
        return self._encode(text, special_tokens=False)

    async def encode_each(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts with special tokens, whatever the context length.

        Raises ApiError 400 for one of more than 1 MiB, and if they have too many tokens together.
        """
        encode = partial(self._encode_batch, special_tokens=True, parse_special=True)
        return await self._each(texts, encode)

    async def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, ...]]:
        """The same of texts as the tokenizer joins them in pairs, for models that compare them."""

        def encode(some: list[tuple[str, str]]) -> list[tuple[int, ...]]:
            return [tuple(encoding.ids) for encoding in self._backend.encode_batch_fast(some)]

        return await self._each(pairs, encode)

    async def cut(self, texts: Sequence[str], sizes: Sequence[int]) -> list[str]:
        """The beginnings of texts, each of so many tokens or fewer. Raises ApiError 400 as
        :meth:`encode_each` does."""
        encode = partial(self._encode_batch, special_tokens=False, parse_special=True)
        encoded = await self._each(texts, encode)

        def decoded(text: str, token_ids: tuple[int, ...], size: int) -> str:
            if len(token_ids) <= size:
                return text
            # A cut may leave a part of a character.
            kept = self._backend.decode(list(token_ids[:size]), skip_special_tokens=False)
            return kept.rstrip("\ufffd")

        def work() -> list[str]:
            return list(map(decoded, texts, encoded, sizes))

        return await self._off_loop(sum(map(len, encoded)), work)

    async def _each(
        self,
        texts: Sequence[TextT],
        encode: Callable[[list[TextT]], list[tuple[int, ...]]],
    ) -> list[tuple[int, ...]]:
        for text in texts:
            whole = text if isinstance(text, str) else "".join(text)
            _require_size("prompt", len(whole.encode()), MAX_TEXT_BYTES, "bytes")
        length = sum(map(_length, texts))
        return await self._off_loop(
            length, lambda: self._encode_batches(texts, encode, any_length=True)
        )

    async def encode_all(
        self,
        prompts: Sequence[Prompt],
        *,
        special_tokens: bool = True,
        any_length: bool = False,
        parse_special: bool = True,
    ) -> list[tuple[int, ...]]:
        """Token ids of prompts, which are either all text or all token ids.

        special_tokens: whether to add the special tokens with which inputs begin or end. A text
            that begins with BOS gets no second one.
        parse_special: whether the text of a special token becomes that token. A prompt which a
            client has made with a chat template needs this.

        Raises ApiError 400 as :meth:`encode` does, and if the prompts together have too many
        tokens.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        given = [prompt for prompt in prompts if not isinstance(prompt, str)]
        self.require_few_together(given)
        if any_length:
            _require_size("prompt", sum(len(t.encode()) for t in texts), MAX_TEXT_BYTES, "bytes")
        else:
            for text in texts:
                self._require_room(text)
        encode = partial(
            self._encode_batch, special_tokens=special_tokens, parse_special=parse_special
        )
        length = sum(map(len, texts))
        encoded = await self._off_loop(
            length, lambda: self._encode_batches(texts, encode, any_length)
        )
        return [*map(tuple, given), *encoded]

    def _encode_batches(
        self,
        texts: Sequence[TextT],
        encode: Callable[[list[TextT]], list[tuple[int, ...]]],
        any_length: bool,
    ) -> list[tuple[int, ...]]:
        encoded: list[tuple[int, ...]] = []
        batch: list[TextT] = []
        size = 0
        for index, text in enumerate(texts):
            if not any_length and isinstance(text, str):
                self._require_few_tokens(text)
            batch.append(text)
            size += _length(text)
            if size >= _AT_A_TIME or index == len(texts) - 1:
                encoded += encode(batch)
                batch, size = [], 0
                self.require_few_together(encoded)
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

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as it is written in the vocabulary; "" for an unknown id."""

        def work() -> list[str]:
            return [self._backend.id_to_token(token) or "" for token in token_ids]

        return await self._off_loop(len(token_ids), work)

    async def chat(
        self,
        messages: Sequence[Message],
        options: TemplateOptions,
        own: OwnTemplates | None = None,
        *,
        tools: Tools | None = None,
        any_length: bool = False,
        parse_special: bool = False,
    ) -> ChatPrompt:
        """A conversation in the model's chat template, up to the assistant's turn.

        own: those of the request's adapter, instead of the model's.
        parse_special: whether the text of a special token in a message becomes that token (see
            :class:`nybble.engine.conversation.ChatEncoder`).

        Raises ApiError 400 if

        - the model has no template,
        - the template refuses the messages or leaves one out,
        - the request brings a template of its own and this is not allowed,
        - the text is too long, as in :meth:`encode`;

        and ApiError 500 if the template takes too much time or memory, 400 if it is the request's.
        """
        template = self.template(options, own, tools=bool(tools))
        whose = "the request" if options.chat_template is not None else self._whose(own)
        if len(messages) > self._max_model_len:  # a message has at least one token
            raise self._too_long(f"{len(messages)} messages")
        most = max(self._max_characters, MAX_TEXT_BYTES)

        def as_turns() -> list[Turn]:
            if _size(messages, most + 1) > most:
                raise self._too_long(f"more than {most} characters")
            return [turn_of(message.model_dump(exclude_none=True)) for message in messages]

        size = _size(messages, _AT_A_TIME + 1)
        turns = await self._aside(size, as_turns)
        try:
            text = await self._chat_encoder.rendered(
                template,
                turns,
                tools,
                _variables(options, template),
                self._render,
                shielded=not parse_special,
                length=size,
                aside=self._aside,
            )
        except TemplateInvalidError as error:
            raise ApiError(
                400,
                f"the chat template of {whose} is not valid: {error}",
                param="messages",
                code="no_chat_template",
            ) from None
        except TemplateRefusedError as error:
            raise ApiError(
                400,
                f"the chat template of {whose} refuses these messages: {error}",
                param="messages",
                code="invalid_value",
            ) from None
        except TemplateFailedError as error:
            # A template which the request brought is the client's fault.
            brought = options.chat_template is not None
            raise ApiError(
                400 if brought else 500,
                f"the chat template of {whose} cannot be used: {error}",
                param="chat_template" if brought else None,
                code="chat_template_failed",
            ) from None
        if any_length:
            _require_size("messages", len(text.encode()), MAX_TEXT_BYTES, "bytes")
        else:
            self._require_room(text)
        before, after = self._chat_encoder.around if options.add_special_tokens else ((), ())

        def work() -> tuple[int, ...]:
            if not any_length:
                self._require_few_tokens(text)
            ids = self._chat_encoder.encode(text, shielded=not parse_special)
            return (*before, *ids, *after)

        return ChatPrompt(await self._off_loop(len(text), work), text)

    def template(
        self, options: TemplateOptions, own: OwnTemplates | None = None, *, tools: bool
    ) -> str:
        """The chat template of a request with or without tools. Raises ApiError 400 as
        :meth:`chat` does."""
        if options.chat_template is None:
            return self._template(own, tools=tools)
        if not self._trust_chat_templates:
            raise ApiError(
                400,
                "chat_template is accepted only if the server has --trust-request-chat-template",
                param="chat_template",
                code="unsupported_parameter",
            )
        return options.chat_template

    def _whose(self, own: OwnTemplates | None) -> str:
        """Whose chat template it is, for errors."""
        return repr(self._model) if own is None else f"adapter {own.adapter!r}"

    def _template(self, own: OwnTemplates | None, *, tools: bool) -> str:
        templates = self._tokenizer.chat_template if own is None else own.templates
        try:
            template = chosen_template(templates, tools=tools)
        except ValueError as error:
            raise ApiError(
                400,
                f"the chat templates of {self._whose(own)} cannot be used: {error}",
                param="messages",
                code="no_chat_template",
            ) from None
        if template is None:
            raise ApiError(
                400,
                f"model {self._model!r} has no chat template: use /v1/completions, "
                "or put a chat_template.jinja into the model's folder",
                param="messages",
                code="no_chat_template",
            )
        return template

    async def _render(
        self,
        template: str,
        turns: Sequence[Turn],
        tools: Tools | None,
        variables: dict[str, Any],
    ) -> str:
        return await asyncio.wrap_future(self._templates.submit(template, turns, tools, variables))

    def _require_room(self, text: str) -> None:
        if len(text) > self._max_characters:
            raise self._too_long(
                f"{len(text)} characters, beyond the {self._max_characters} of the longest tokens"
            )

    def _require_few_tokens(self, text: str) -> None:
        """Raises ApiError 400 if a text has far more tokens than the context, counted in parts."""
        if len(text) <= _AT_A_TIME:
            return
        least = 0
        for start in range(0, len(text), _AT_A_TIME):
            part = text[start : start + _AT_A_TIME]
            (encoding,) = self._backend.encode_batch_fast([part], add_special_tokens=False)
            # A cut through a token may turn it into as many tokens as it has characters.
            least += max(0, len(encoding) - self._longest)
            if least > self._max_model_len:
                raise self._too_long(f"{least} tokens at least")

    def require_few_together(self, encoded: Sequence[Sequence[int]]) -> None:
        """Raises ApiError 400 if the prompts of a request have too many tokens together."""
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
            f"the text has {found}, but the model's context has {self._max_model_len} tokens, for "
            "prompt and output together",
            param="prompt",
            code="context_length_exceeded",
        )

    def _encode_batch(
        self, texts: list[str], *, special_tokens: bool, parse_special: bool
    ) -> list[tuple[int, ...]]:
        if parse_special and special_tokens:
            return self._chat_encoder.encode_inputs(texts)
        if parse_special:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [tuple(encoding.ids) for encoding in encodings]
        before, after = self._chat_encoder.around if special_tokens else ((), ())
        return [(*before, *self._chat_encoder.encode_plain(text), *after) for text in texts]

    @property
    def around(self) -> tuple[int, int]:
        """How many special tokens are added before and after a text."""
        before, after = self._chat_encoder.around
        return len(before), len(after)

    def _encode(self, text: str, special_tokens: bool) -> tuple[int, ...]:
        (ids,) = self._encode_batch([text], special_tokens=special_tokens, parse_special=True)
        return ids

    async def _aside(self, length: int, function: Callable[[], T]) -> T:
        """The function's result, computed on a thread for long conversations if this is one."""
        if length <= _AT_A_TIME:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._long_chats, function)

    async def _off_loop(self, length: int, function: Callable[[], T]) -> T:
        if length <= _LONG_TEXT:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)


def _size(messages: Sequence[Message], enough: int) -> int:
    """How many characters and values are in messages, counted until there are ``enough``."""
    size, left = 0, list[Any](messages)
    while left and size < enough:
        node = left.pop()
        if node is None:
            continue
        size += len(node) if isinstance(node, str) else 1
        if isinstance(node, BaseModel):
            left += [*node.__dict__.values(), node.__pydantic_extra__]
        elif isinstance(node, dict):
            left += [*node, *node.values()]
        elif isinstance(node, list):
            left += node
    return size


def _length(text: str | tuple[str, str]) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def _require_size(param: str, found: int, most: int, unit: str) -> None:
    if found > most:
        raise ApiError(
            400,
            f"{param} has {found} {unit}, expected at most {most} at a time",
            param=param,
            code="invalid_value",
        )


def _variables(options: TemplateOptions, template: str) -> dict[str, Any]:
    """The variables of a template besides messages, tools and special tokens."""
    variables: dict[str, Any] = {}
    if options.continue_final_message:
        variables["continue_final_message"] = True
    variables["add_generation_prompt"] = not options.continue_final_message
    if options.add_generation_prompt is not None:
        variables["add_generation_prompt"] = options.add_generation_prompt
    if options.documents is not None:
        if options.documents and "documents" not in template:
            raise ApiError(
                400,
                "the model's chat template does not read documents: put them into a message",
                param="documents",
                code="unsupported_parameter",
            )
        variables["documents"] = options.documents
    return {
        **variables,
        **_reasoning(options, template),
        **_checked(options.chat_template_kwargs or {}),
    }


# A variable, not a field of a message or a word of the prompt.
_THINKING = re.compile(r"\b(?:if|not|set|elif|and|or)\s+thinking\b")
# What gpt-oss was trained to read, and what is nearest to the others.
_HARMONY_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}


def _reasoning(options: TemplateOptions, template: str) -> dict[str, Any]:
    """Effort and budget as variables of the template, each in the words of its family.

    Raises ApiError 400 if the template has none for an effort.
    """
    variables: dict[str, Any] = {}
    budget = options.thinking_token_budget
    if budget is not None and "thinking_budget" in template:  # Seed-OSS
        variables["thinking_budget"] = budget
    effort = options.reasoning_effort
    if effort is None:
        return variables
    asked = dict[str, Any]()
    if "reasoning_effort" in template:
        harmony = CHANNEL in template
        asked["reasoning_effort"] = _HARMONY_EFFORTS.get(effort, effort) if harmony else effort
    if "enable_thinking" in template:
        asked["enable_thinking"] = effort != "none"
    if _THINKING.search(template):  # Granite, DeepSeek V3.1
        asked["thinking"] = effort != "none"
    if not asked and effort != "none":
        raise ApiError(
            400,
            f"reasoning_effort is {effort!r}, but the model's chat template does not support "
            "reasoning; expected 'none'",
            param="reasoning_effort",
            code="unsupported_parameter",
        )
    return variables | asked


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
