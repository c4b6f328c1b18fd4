"""Text and messages to token ids, without holding up the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from nybble.server.api.chat_schema import Message
from nybble.server.errors import ApiError
from nybble.server.templates import TemplateFailedError, TemplateRefusedError, TemplateRenderer
from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# Text longer than this many characters is worked on in another thread.
_LONG_TEXT = 4096


class Prompts:
    """The tokenizer and chat template of one model."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: str, templates: TemplateRenderer
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may ask for either; both would change prompts silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._model = model
        self._templates = templates
        # Encoding takes some hundred times the text's memory, which each thread's allocator keeps
        # for its next: one thread is as fast, since the encoder has threads of its own.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nybble-tokenize")

    async def encode(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``; special_tokens: with those the model's inputs begin with."""
        return await self._off_loop(len(text), lambda: self._encode(text, special_tokens))

    async def encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of each text, with those the model's inputs begin or end with."""
        return await self._off_loop(
            sum(map(len, texts)),
            lambda: [tuple(each.ids) for each in self._backend.encode_batch_fast(list(texts))],
        )

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ``token_ids``, special tokens included."""
        return await self._off_loop(
            len(token_ids),
            lambda: self._backend.decode(list(token_ids), skip_special_tokens=False),
        )

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation in the model's own template, up to the assistant's turn.

        Raises ApiError 400 where the model has no template or the template refuses, 500 where it
        takes too much time or memory.
        """
        if not self._tokenizer.chat_template:
            raise ApiError(
                400,
                f"model {self._model!r} has no chat template: use /v1/completions, "
                "or put a chat_template.jinja into the model's folder",
                param="messages",
                code="no_chat_template",
            )
        turns = [_turn(message) for message in messages]
        template = self._tokenizer.get_chat_template(tools=list(tools) if tools else None)
        variables = {**self._tokenizer.special_tokens_map, **_checked(template_kwargs or {})}
        render = self._templates.render
        try:
            text = await asyncio.to_thread(render, template, turns, tools, variables)
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
        return await self.encode(text, special_tokens=False)

    def _encode(self, text: str, special_tokens: bool) -> tuple[int, ...]:
        # The batch form lets other threads run meanwhile; the single one does not. The fast one
        # leaves out where in the text each token stands.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special_tokens)
        return tuple(encoding.ids)

    async def _off_loop(self, length: int, function: Callable[[], T]) -> T:
        if length <= _LONG_TEXT:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)


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
        turn["content"] = "\n".join(part.text for part in message.content)
    turn.setdefault("content", "")
    for index, call in enumerate(turn.get("tool_calls", ())):
        function = call["function"]
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            raise ApiError(
                400,
                f"the arguments of call {index} to {function['name']!r} are not JSON",
                param="messages",
                code="invalid_value",
            ) from None
    return turn
