"""What is learned from a line of data, and what is only read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nybble.finetune.data import (
    IGNORED,
    DataError,
    Example,
    pack,
    read_examples,
    to_batch,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture
def tokenizer(tiny_model: Callable[..., Path]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model())  # type: ignore[no-any-return]


def written(folder: Path, *rows: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "and the dog"},
    {"role": "assistant", "content": "it barks"},
]


def test_only_what_the_assistant_says_is_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (example,) = read_examples(written(tmp_path, {"messages": CHAT}), tokenizer, max_length=500)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(example.ids) == whole
    learned = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(learned) == "hi there<|im_end|>\nit barks<|im_end|>\n"
    assert all(
        label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True)
    )


def test_a_prompt_is_read_and_its_completion_learned_up_to_the_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = written(tmp_path, {"prompt": "the dog ", "completion": "barks"}, {"text": "the moon"})
    first, second = read_examples(path, tokenizer, max_length=100)
    learned = [label for label in first.labels if label != IGNORED]
    assert tokenizer.decode(learned) == "barks<|im_end|>"
    assert second.labels == second.ids


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "line 1: expected an object with 'messages'"),
        ({"prompt": "a"}, "line 1: expected an object with 'messages'"),
        ({"messages": CHAT[:2]}, "line 1: there is no assistant message to learn from"),
        ({"messages": [{"role": "assistant"}]}, "message 0 has no role and content"),
        ({"prompt": "the dog " * 60, "completion": "x"}, "no assistant token within the first 100"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(written(tmp_path, row), tokenizer, max_length=100)


def test_broken_json_and_empty_files_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(DataError, match=r"data\.jsonl line 2: "):
        read_examples(path, tokenizer, max_length=100)
    path.write_text("\n")
    with pytest.raises(DataError, match="has no examples"):
        read_examples(path, tokenizer, max_length=100)
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path / "absent", tokenizer, max_length=100)


def test_a_template_that_rewrites_what_came_before_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="the chat template changes the text before message 2"):
        read_examples(written(tmp_path, {"messages": CHAT}), tokenizer, max_length=100)


def example(length: int, start: int = 10) -> Example:
    ids = list(range(start, start + length))
    return Example(ids, ids)


def test_packing_keeps_the_order_and_fills_rows() -> None:
    rows = pack([example(n) for n in (5, 4, 3, 8, 1)], 9)
    assert [[len(e.ids) for e in row] for row in rows] == [[5, 4], [3], [8, 1]]


def test_no_example_predicts_the_next_one_and_padding_is_not_learned() -> None:
    batch = to_batch([[example(3), example(2, 50)], [example(4, 80)]])
    assert batch.input_ids.tolist() == [[10, 11, 12, 50, 51], [80, 81, 82, 83, 0]]
    assert batch.labels.tolist() == [
        [IGNORED, 11, 12, IGNORED, 51],
        [IGNORED, 81, 82, 83, IGNORED],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.targets == 6
    assert batch.input_ids.dtype == torch.int64
