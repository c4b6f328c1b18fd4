"""Training examples: JSON lines to token ids, with a loss only on the assistant's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.engine.conversation import (
    ChatEncoder,
    Tools,
    Turn,
    at_once,
    left_out,
    template_of,
    turn_of,
)
from nybble.finetune.rows import DataError, is_learned, read_rows, row_kind
from nybble.loaders.templates import TemplateRefusedError

_NEUTRAL = ("\n", "\x00", "a", "0", ")")

IGNORED = -100  # the label of a token without a loss


@dataclass(frozen=True)
class Example:
    """Token ids, and the same ids as labels with IGNORED for those without a loss."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows of one or more examples each; int64 ``(rows, length)``.

    labels: the token at the same place, or IGNORED.
    position_ids: restart at 0 with every example, by which transformers keeps examples in one row
        from attending to each other.
    tokens: the number of tokens, without padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    tokens: int

    @property
    def targets(self) -> int:
        """The number of tokens with a loss; the first of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def read_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Example]:
    """The examples of every line, see :mod:`nybble.finetune.rows`; a text has a loss on all tokens.

    Their tokens are those that serving has: a prompt's are encoded as a server encodes them, and an
    answer's go on from them. A conversation is one example, or several where an answer's prompt is
    not what came before it, because the template leaves out earlier thoughts.

    Longer ones are cut at ``max_length``. Raises DataError.
    """
    examples = []
    reader = _Reader(tokenizer)
    for number, row in read_rows(path):
        try:
            read = reader.examples(row)
        except TemplateRefusedError as error:
            reason = f"the chat template refuses these messages: {error}"
            raise DataError(path, number, reason) from error
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(path, number, str(error)) from error
        cut = [Example(each.ids[:max_length], each.labels[:max_length]) for each in read]
        learned = [each for each in cut if any(label != IGNORED for label in each.labels[1:])]
        if not learned:
            raise DataError(
                path, number, f"no assistant token within the first {max_length} tokens"
            )
        examples += learned
    if not examples:
        raise DataError(path, None, "has no examples")
    return examples


class _Reader:
    """Rows to examples, by one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._encoder = ChatEncoder(tokenizer)
        self._end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def examples(self, row: dict[str, Any]) -> list[Example]:
        kind = row_kind(row)
        if kind == "messages":
            return self._of_chat(row["messages"], row.get("tools") or None)
        if kind == "text":
            (whole,) = self._encoder.encode_inputs([row["text"]])
            before, after = map(len, self._encoder.around)
            ids, continuation = list(whole[:before]), list(whole[before : len(whole) - after])
        else:
            prompt = row["prompt"]
            ids = list(self._encoder.encode_inputs([prompt])[0])
            continuation = self._continuation(prompt, prompt + row["completion"], shielded=False)
        learned = [*continuation, *self._end]
        return [Example(ids + learned, [IGNORED] * len(ids) + learned)]

    def _of_chat(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[Example]:
        template = template_of(self._tokenizer, tools=bool(tools))
        if template is None:
            raise ValueError("the model has no chat template; use 'prompt' and 'completion'")
        turns = [
            turn_of({name: value for name, value in message.items() if name != "weight"})
            for message in messages
        ]
        examples: list[Example] = []
        for index, message in enumerate(messages):
            if not is_learned(message):
                continue
            # The prompt as the model will see it when it has to answer, then the answer.
            before = self._rendered(template, turns[:index], tools, prompt=True)
            after = self._rendered(template, turns[: index + 1], tools, prompt=False)
            if not after.startswith(before):
                raise ValueError(
                    f"the chat template changes the text before message {index} once it is "
                    "answered; use 'prompt' and 'completion'"
                )
            shielded = self._encoder.shielded([turns[index]], template)
            if left_out(shielded, after[len(before) :]) is not None:
                raise ValueError(f"the chat template leaves out the text of message {index}")
            prompt, answer = self._encode(before), self._continuation(before, after)
            done = len(examples[-1].ids) if examples else 0
            if examples and prompt[:done] == examples[-1].ids:
                labels = [*examples.pop().labels, *[IGNORED] * (len(prompt) - done)]
            else:
                labels = [IGNORED] * len(prompt)
            examples.append(Example(prompt + answer, labels + answer))
        return examples

    def _rendered(
        self, template: str, turns: Sequence[Turn], tools: Tools | None, *, prompt: bool
    ) -> str:
        variables = {"add_generation_prompt": prompt}
        return at_once(self._encoder.rendered(template, turns, tools, variables, self._render))

    async def _render(
        self, template: str, turns: Sequence[Turn], tools: Tools | None, variables: dict[str, Any]
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(turns),
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=template,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # whatever a template does to what it is given
            raise TemplateRefusedError(str(error) or type(error).__name__) from error
        assert isinstance(text, str)
        return text

    def _encode(self, text: str, *, shielded: bool = True) -> list[int]:
        return self._encoder.encode(text, shielded=shielded) if text else []

    def _continuation(self, before: str, after: str, *, shielded: bool = True) -> list[int]:
        """The tokens of ``after`` that follow those of ``before``, with which it begins."""
        prompt = self._encode(before, shielded=shielded)
        whole = self._encode(after, shielded=shielded)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # A token would reach over the border, which it cannot where the prompt's are there already.
        # After a character it does not join with, the rest is no beginning of a text either, which
        # some tokenizers put a space before.
        rest = after[len(before) :]
        for neutral in _NEUTRAL:
            first = self._encode(neutral, shielded=shielded)
            both = self._encode(neutral + rest, shielded=shielded)
            if both[: len(first)] == first:
                return both[len(first) :]
        raise ValueError(f"the tokens of {rest[:20]!r} cannot follow those of its prompt")


def pack(examples: Iterable[Example], length: int) -> list[list[Example]]:
    """Examples in order, as many to a row as fit ``length``."""
    rows: list[list[Example]] = []
    used = length
    for example in examples:
        if used + len(example.ids) > length:
            rows.append([])
            used = 0
        rows[-1].append(example)
        used += len(example.ids)
    return rows


def to_batch(rows: Sequence[Sequence[Example]]) -> Batch:
    """Rows of examples, padded at their ends; padding and first tokens carry no loss."""
    length = max(sum(len(example.ids) for example in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    positions = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + len(example.ids)
            ids[index, start:stop] = torch.tensor(example.ids)
            labels[index, start:stop] = torch.tensor(example.labels)
            labels[index, start] = IGNORED  # not predicted from the example before
            positions[index, start:stop] = torch.arange(stop - start)
            start = stop
        positions[index, start:] = torch.arange(length - start)
    tokens = sum(len(example.ids) for row in rows for example in row)
    return Batch(ids, labels, positions, tokens)
