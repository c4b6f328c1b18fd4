"""What is learned from a line of data, and what is only read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nybble.finetune.data import (
    IGNORED,
    DataError,
    Example,
    pack,
    read_examples,
    to_batch,
)


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
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0 has the role 'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "content of message 0 is neither text"),
        ({"messages": [{**CHAT[2], "weight": 0.5}]}, "weight of message 0 is neither 0 nor 1"),
        ({"messages": [{**CHAT[2], "weight": 0}]}, "there is no assistant message to learn from"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "not a list of function calls"),
        ({"messages": CHAT, "tools": "x"}, "'tools' is not a list of objects"),
        ({"prompt": "the dog " * 60, "completion": "x"}, "no assistant token within the first 100"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(written(tmp_path, row), tokenizer, max_length=100)


def test_an_answer_of_weight_0_is_read_and_not_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = [dict(message) for message in CHAT]
    messages[2]["weight"] = 0  # type: ignore[assignment]
    (example,) = read_examples(written(tmp_path, {"messages": messages}), tokenizer, max_length=500)
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    learned = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(learned) == "it barks<|im_end|>\n"


def test_tools_and_their_calls_reach_the_template_as_objects(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = (
        "{{ tools[0].function.name }}: {% for m in messages %}{{ m.role }} {{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.item }}{% endfor %};{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"item": 7}'}}
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "the moon"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }
    (example,) = read_examples(written(tmp_path, row), tokenizer, max_length=500)
    assert tokenizer.decode(example.ids) == "look: system the moon;assistant 7;"
    learned = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(learned) == "7;"


def test_what_python_calls_a_line_break_inside_a_string_ends_no_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n{"text": "four"}', encoding="utf-8")
    assert len(read_examples(path, tokenizer, max_length=100)) == 2


def test_a_prompt_begins_as_the_server_begins_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A tokenizer that puts a token before every text, as Llama's does."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    rows = ({"prompt": "the dog ", "completion": "barks"}, {"messages": CHAT})
    plain, chat = read_examples(written(tmp_path, *rows), tokenizer, max_length=500)
    learned = [label for label in plain.labels if label != IGNORED]
    assert plain.ids == tokenizer("the dog ")["input_ids"] + learned
    assert plain.ids.count(0) == 1
    assert 0 not in chat.ids


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
