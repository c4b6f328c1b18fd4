"""Training examples: JSON lines to token ids, with a loss only on the assistant's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.finetune.rows import DataError, is_learned, read_rows, row_kind
from nybble.loaders.templates import as_turn

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
    """Examples, one a line, see :mod:`nybble.finetune.rows`; a ``text`` has a loss on all tokens.

    Longer ones are cut at ``max_length``. Raises DataError.
    """
    examples = []
    # The tokens the server puts before a prompt, such as BOS; chat templates add their own.
    beginning = tokenizer("")["input_ids"]
    for number, row in read_rows(path):
        try:
            segments = _segments(row, tokenizer)
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            raise DataError(path, number, str(error)) from error
        ids = [] if row_kind(row) == "messages" else list(beginning)
        labels = [IGNORED] * len(ids)
        for text, learned in segments:
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if learned else [IGNORED] * len(part)
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels[1:]):
            raise DataError(
                path, number, f"no assistant token within the first {max_length} tokens"
            )
        examples.append(Example(ids, labels))
    if not examples:
        raise DataError(path, None, "has no examples")
    return examples


def _segments(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The example's text in pieces, each with whether it has a loss."""
    end = str(tokenizer.eos_token or "")
    kind = row_kind(row)
    if kind == "messages":
        return _chat_segments(row["messages"], row.get("tools"), tokenizer)
    if kind == "completion":
        return [(row["prompt"], False), (row["completion"] + end, True)]
    return [(row["text"] + end, True)]


def _chat_segments(
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[str, bool]]:
    if not tokenizer.chat_template:
        raise ValueError("the model has no chat template; use 'prompt' and 'completion'")
    turns = [_turn(message) for message in messages]

    def render(count: int, *, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            turns[:count], tools=tools or None, tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(text, str)
        return text

    segments: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if not is_learned(message):
            continue
        # First the prompt as the model sees it when serving, then the answer.
        before, after = render(index, prompt=True), render(index + 1, prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                f"the chat template changes the text before message {index} once it is answered; "
                "use 'prompt' and 'completion'"
            )
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return segments


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    return as_turn({name: value for name, value in message.items() if name != "weight"})


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
