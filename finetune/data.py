"""Training examples: JSON lines to token ids with a loss on the assistant's tokens only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that no loss is taken on


class DataError(ValueError):
    """A data file cannot be used: the message names file and line, and what was expected."""


@dataclass(frozen=True)
class Example:
    """Token ids, and the same ids as labels with IGNORED where no loss is taken."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows of one or more examples each; int64 ``(rows, length)``.

    labels[t] is the token at t or IGNORED; position_ids start anew with every example, by which
    transformers keeps examples in one row from attending to each other.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    @property
    def targets(self) -> int:
        """Tokens with a loss: the first of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def read_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Example]:
    """One example per line: ``{"messages": […]}``, ``{"prompt": …, "completion": …}`` or
    ``{"text": …}``; the last has a loss on every token. Longer ones are cut at ``max_length``.

    Raises DataError.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            segments = _segments(json.loads(line), tokenizer)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} line {number}: {error}") from error
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in segments:
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if learned else [IGNORED] * len(part)
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels[1:]):
            raise DataError(
                f"{path} line {number}: no assistant token within the first {max_length} tokens"
            )
        examples.append(Example(ids, labels))
    if not examples:
        raise DataError(f"{path} has no examples")
    return examples


def _segments(row: Any, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The example's text in pieces, each with whether it is to be learned."""
    end = str(tokenizer.eos_token or "")
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return _chat_segments(row["messages"], tokenizer)
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return [(row["prompt"], False), (row["completion"] + end, True)]
        if isinstance(row.get("text"), str):
            return [(row["text"] + end, True)]
    raise ValueError(
        "expected an object with 'messages', with 'prompt' and 'completion', or 'text'"
    )


def _chat_segments(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    if not tokenizer.chat_template:
        raise ValueError("the model has no chat template; use 'prompt' and 'completion'")

    def render(count: int, *, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(text, str)
        return text

    segments: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {index} has no role and content")
        if message["role"] != "assistant":
            continue
        # The prompt as the model will see it when it has to answer, then the answer.
        before, after = render(index, prompt=True), render(index + 1, prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                f"the chat template changes the text before message {index} once it is answered; "
                "use 'prompt' and 'completion'"
            )
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    if not segments:
        raise ValueError("there is no assistant message to learn from")
    return segments


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
            labels[index, start] = IGNORED  # the example before does not predict it
            positions[index, start:stop] = torch.arange(stop - start)
            start = stop
        positions[index, start:] = torch.arange(length - start)
    return Batch(ids, labels, positions)
